"""The data stage in one or several processes: gather, extract, label, merge."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import Any, TypeVar, cast

from nla_hub.errors import NLAError, RunError
from nla_hub.loading import Source
from nla_hub.training.extraction import Extraction, Report
from nla_hub.training.labelers import DividedLabeler, Labeler
from nla_hub.training.processes import Processes
from nla_hub.training.recipe import Recipe
from nla_hub.training.run import StageDirectory
from nla_hub.training.splits import UNLABELLED, data_splits

T = TypeVar("T")


def prepare_rows(
    recipe: Recipe,
    stage: StageDirectory,
    processes: Processes,
    *,
    source: Callable[[], Source],
    labeler: Callable[[], AbstractContextManager[Labeler]],
    meta: Callable[[str], dict[str, Any]],
    report: Report,
) -> dict[str, Any]:
    """The data stage, called in every process: `<split>.parquet` of each split in the stage's `checkpoint/`.

    Beside them lie `eval.jsonl`, where the evaluation protocol has no documents of its own, and the index of a mixture.

    Args:
        source: loads the trunk of the source; called where vectors are made: in every process, or in the main one alone
            where `placement.source` is "spread".
        labeler: opens the labeler; called when all vectors are there, in the main process, and in the others where they
            have a share of the labels: the labeler divides them, and `placement.source` is not "spread".
        meta: a split -> what its sidecar says.
        report: is told figures, in the main process.

    Returns:
        A summary: `rows` of each split, and what was left out.

    Raises:
        What the steps of `Extraction` raise, where it happens; a RunError in the other processes.
    """
    work = Extraction(recipe, stage.state, stage.checkpoint)
    evaluation = processes.on_main(work.begin)
    told = report if processes.is_main else None
    spread = recipe.hardware.placement.source == "spread"
    if spread:
        processes.on_main(lambda: work.extract(source, report=told))
    else:
        in_each(
            processes,
            lambda: work.extract(source, rank=processes.rank, world=processes.world, report=told),
        )
    with ExitStack() as stack:
        opened = cache(lambda: stack.enter_context(labeler()))
        if processes.on_main(lambda: bool(getattr(opened(), "divided", False))):
            if spread:
                processes.on_main(lambda: _answer(work, Processes(), opened))
            else:
                _answer(work, processes, opened)

        def finish() -> dict[str, Any]:
            with stack.pop_all():
                return _finish(work, opened(), meta, report, evaluation)

        return processes.on_main(finish)


def _answer(work: Extraction, processes: Processes, opened: Callable[[], Labeler]) -> None:
    """Have everything answered that the labels need, by all of the processes together."""
    rank, world = processes.rank, processes.world

    def labeler() -> DividedLabeler:
        return cast("DividedLabeler", opened())

    def answer(attempt: int) -> None:
        plan = processes.on_main(lambda: labeler().plan(work.label_requests(), attempt))
        if plan:
            in_each(processes, lambda: work.answer(labeler(), plan[rank::world], attempt, rank=rank, world=world))
            processes.on_main(lambda: labeler().take_over())

    for attempt in range(processes.on_main(lambda: labeler().attempts)):
        answer(attempt)


def _finish(
    work: Extraction,
    labeler: Labeler,
    meta: Callable[[str], dict[str, Any]],
    report: Report,
    evaluation: int,
) -> dict[str, Any]:
    """Label and merge; the stage's summary."""
    rows: dict[str, int] = {}
    summary: dict[str, Any] = {"rows": rows}
    for split in data_splits(work.recipe):
        counts = work.merge(split, None if split in UNLABELLED else labeler, meta(split))
        rows[split] = counts["rows"]
        report({"split": split, **{name: n for name, n in counts.items() if n}})
        for name in ("refused", "short", "without_label", "halvings"):
            if counts[name]:
                summary[name] = summary.get(name, 0) + counts[name]
    if (figures := getattr(labeler, "figures", None)) is not None:
        summary["labels"] = figures()
    if evaluation:
        summary["evaluation_documents"] = evaluation
    for name in ("bad", "repeated"):
        if n := work.gathered.total(name):
            summary[name] = n
    return summary


def in_each(processes: Processes, action: Callable[[], T]) -> T:
    """Run `action` in every process; where it fails in one, it fails in all, when all have come to its end.

    Raises:
        What `action` raises, where it happens; a RunError in the others.
    """
    if processes.world == 1:
        return action()
    import torch.distributed

    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    what = failure.what if isinstance(failure, NLAError) else failure and repr(failure)
    everyone: list[str | None] = [None] * processes.world
    torch.distributed.all_gather_object(everyone, what)
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame
    if failed := [f"process {rank}: {words}" for rank, words in enumerate(everyone) if words is not None]:
        raise RunError("Another process stopped.", faults=failed)
    return result  # type: ignore[no-any-return]
