"""`nla-hub train RECIPE --plan`: what each stage takes on the hardware that the recipe declares, for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from nla_hub.cli import output
from nla_hub.memory import MARGIN
from nla_hub.training.planning.anchors import Hours
from nla_hub.training.planning.plan import Plan, StagePlan, said
from nla_hub.units import size

UNKNOWN = "not known"

ROLE_WORDS = {"av": "AV", "ar": "AR", "watching_ar": "watching AR"}
"""Of roles that are said otherwise than they are written."""


def show(plan: Plan, *, as_json: bool) -> None:
    """Print a plan and a note about this machine.

    Raises:
        RecipeError: after everything was printed, where the declared hardware has no room for it.
    """
    if as_json:
        output.print_json_lines([*map(_stage, plan.stages), _total(plan)])
    else:
        _tables(plan)
    output.message(f"Here, as a note: {_here()}.")
    plan.require()


# -- for people ----------------------------------------------------------------------------------------------


def _tables(plan: Plan) -> None:
    device = "in each process" if plan.gpu is None else f"on each of {said(plan.recipe)}"
    rows = []
    for stage in plan.stages:
        effort = stage.effort
        rows.append(
            (
                stage.name,
                _count(effort.rows),
                _count(effort.tokens),
                _count(effort.steps),
                size(stage.memory.total) if stage.memory.total else None,
                {True: "fits", False: "DOES NOT FIT", None: None}[stage.fits],
                _hours(stage.hours) if effort.seconds is not None else None,
            )
        )
    output.print_table(("stage", "rows", "tokens", "steps", device, "verdict", "hours"), rows)
    output.print_text("")
    output.print_table(
        ("stage", "at its worst moment", "bytes by role"),
        [(s.name, s.memory.moment or None, _roles(s)) for s in plan.stages if s.memory.roles or s.memory.main_memory],
    )
    output.print_text("")
    output.print_fields(dict(_facts(plan)))


def _facts(plan: Plan) -> Iterator[tuple[str, Any]]:
    if plan.gpu is not None:
        yield "GPU", f"{size(MARGIN * plan.gpu.memory)} of {size(plan.gpu.memory)} are given away ({plan.gpu.source})"
    yield (
        "hours",
        UNKNOWN + f": {plan.unknown}" if plan.hours is None else f"{_hours(plan.hours)}, export and eval aside",
    )
    if plan.label_hours is not None:
        yield (
            "of them labels",
            f"{_hours(plan.label_hours)}: a model of the run writes them",
        )
    yield "GPU hours", _span(plan.gpu_hours)
    no_price = f"{UNKNOWN}: say --gpu-price, of a GPU for an hour" if plan.price is None else UNKNOWN
    yield "money", _span(plan.money(plan.gpu_hours), money=True) if plan.money(plan.gpu_hours) else no_price
    if plan.hours is not None:
        yield "reckoned from", list(plan.hours.anchors)
    if plan.runs:
        yield "others took", [_run(plan, i) for i in range(len(plan.runs))]
    yield "labels", UNKNOWN if plan.labels is None else str(plan.labels)
    parts = ", ".join(f"{name} {size(n)}" for name, n in plan.disk.items() if n)
    yield "disk, run directory", f"{size(sum(plan.disk.values()))} at most: {parts}"


def _run(plan: Plan, i: int) -> str:
    run = plan.runs[i]
    cost = plan.money(run.gpu_hours)
    price = f", {_span(cost, money=True)} at this price" if cost is not None else ""
    return f"{run.name}: {_span(run.gpu_hours)} GPU hours{price}; {run.said} ({run.source})"


def _roles(stage: StagePlan) -> str:
    parts = [f"{ROLE_WORDS.get(role, role)} {size(n)}" for role, n in stage.memory.roles.items()]
    if stage.memory.main_memory:
        parts.append(f"main memory of a node {size(stage.memory.main_memory)}")
    return ", ".join(parts)


def _hours(found: Hours | None) -> str:
    return UNKNOWN if found is None else _span((found.low, found.high))


def _span(found: tuple[float, float] | None, *, money: bool = False) -> str:
    """Both ends of a range; money and hours alike with no more digits than they deserve."""
    if found is None:
        return UNKNOWN
    low, high = (f"{n:,.0f}" if n >= 10 else f"{n:.1f}" if n >= 1 or money else f"{n:.2f}" for n in found)
    return f"about {low}" if low == high else f"{low} to {high}"


def _count(n: int) -> str | None:
    return f"{n:,}" if n else None


# -- as JSON -------------------------------------------------------------------------------------------------


def _stage(stage: StagePlan) -> dict[str, Any]:
    return {
        "name": stage.name,
        "rows": stage.effort.rows,
        "tokens": stage.effort.tokens,
        "steps": stage.effort.steps,
        "bytes": dict(stage.memory.roles),
        "total": stage.memory.total,
        "main_memory": stage.memory.main_memory,
        "moment": stage.memory.moment or None,
        "fits": stage.fits,
        "hours": None if stage.hours is None else [stage.hours.low, stage.hours.high],
    }


def _total(plan: Plan) -> dict[str, Any]:
    hardware = plan.recipe.hardware
    return {
        "name": "all",
        "hardware": asdict(hardware),
        "usable": None if plan.gpu is None else int(MARGIN * plan.gpu.memory),
        "fits": plan.fits,
        "faults": list(plan.faults),
        "alternatives": [{"why": one.why, "settings": list(one.settings)} for one in plan.alternatives],
        "hours": None if plan.hours is None else [plan.hours.low, plan.hours.high],
        "label_hours": None if plan.label_hours is None else [plan.label_hours.low, plan.label_hours.high],
        "gpu_hours": plan.gpu_hours,
        "price": plan.price,
        "money": plan.money(plan.gpu_hours),
        "anchors": [] if plan.hours is None else list(plan.hours.anchors),
        "unknown": plan.unknown or None,
        "runs": [asdict(run) for run in plan.runs],
        "labels": None if plan.labels is None else str(plan.labels),
        "label_cost": getattr(plan.labels, "cost", None),
        "disk": plan.disk,
    }


def _here() -> str:
    """What this machine has free; nothing is judged by it."""
    from nla_hub.hardware import free_memory
    from nla_hub.pretrained import LoadOptions
    from nla_hub.sizing import device_of

    device = device_of(LoadOptions())
    free = free_memory(device)
    return f"{size(free)} are free on {device}" if free is not None else f"{device} does not say what is free"
