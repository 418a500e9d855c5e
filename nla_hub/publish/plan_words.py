"""The plan of a push in words: for a person file by file, as JSON, and why the push would be refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nla_hub.publish.plan import Plan, RepoPlan


def lines(plan: Plan) -> list[str]:
    """The plan for a person, file by file."""
    release, options = plan.release, plan.options
    found = []
    width = max((len(f"{c.size:,}") for repo in plan.repos for c in repo.changes), default=1) + 1
    for one in plan.repos:
        found.append(f"{one.repo.name}  {_described(one, plan)}")
        for change in one.changes:
            size = f"~{change.size:,}" if change.estimated else f"{change.size:,}"
            found.append(f"  {change.state:<9} {size:>{width}}  {change.name}")
        if one.remote is not None and one.remote.left_over:
            found.append(f"  (branches of pushes that were not finished: {', '.join(one.remote.left_over)})")
    if release.facts is not None:
        found.append(f"licence    {release.facts.licence.id}")
    found.append(f"release    {release.id or 'not known before its weights are made'}")
    found.append(f"tag        {_tag(plan)}")
    found.append(f"goes to    {_where(plan)}")
    if options.collection is not None:
        found.append(f"collection {options.collection}")
    n = sum(c.state in ("new", "changed", "not asked") for one in plan.repos for c in one.changes)
    found.append(f"to send    {plan.to_send:,} bytes in {n} {'file' if n == 1 else 'files'} at most")
    if plan.unasked is not None:
        found.append(f"the Hub was not asked what it has: {plan.unasked}")
    return [*found, *plan.notes]


def _described(one: RepoPlan, plan: Plan) -> str:
    kind = "model" if one.repo.kind == "model" else "data set"
    private = plan.options.private if one.private is None else one.private
    seen = "private" if private else "public"
    if plan.unasked is not None:
        return f"({kind}, {seen} if it is new)"
    if one.remote is None:
        return f"({kind}, {seen}, new)"
    return f"({kind}, {seen}{', published already' if one.is_published else ''})"


def _tag(plan: Plan) -> str:
    if plan.options.create_pr:
        return "none: a pull request has none"
    is_made_of_the_id = plan.release.id is None and plan.release.tag.endswith("-new")
    return "not known before its weights are made" if is_made_of_the_id else plan.release.tag


def _where(plan: Plan) -> str:
    if plan.options.tag_only:
        return "its tag alone; no branch is changed"
    if plan.options.create_pr:
        return "a pull request" if len(plan.repos) == 1 else f"{len(plan.repos)} pull requests"
    return plan.options.target


def to_mapping(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it."""
    return {
        "event": "plan",
        "release": plan.release.id,
        "tag": None if plan.options.create_pr else plan.release.tag,
        "target": None if plan.options.create_pr or plan.options.tag_only else plan.options.target,
        "licence": plan.release.facts.licence.id if plan.release.facts is not None else None,
        "to_send": plan.to_send,
        "unasked": plan.unasked,
        "refusals": list(plan.refusals),
        "notes": list(plan.notes),
        "repos": [
            {
                "repo": one.repo.name,
                "kind": one.repo.kind,
                "role": one.repo.role,
                "private": one.private,
                "is_new": None if plan.unasked is not None else one.remote is None,
                "files": [vars(change) for change in one.changes],
            }
            for one in plan.repos
        ],
    }


def refusal(plans: Iterable[Plan]) -> list[str]:
    """Why a push would be refused, and what to do about it; empty where nothing is known that forbids it."""
    told = list(dict.fromkeys(text for plan in plans for text in plan.refusals))
    lines_ = [f"  {line}" for text in told for line in text.splitlines()]
    return ["This push would be refused:", *lines_] if told else []
