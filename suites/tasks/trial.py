"""The trial of suite ``lm_eval``: a model with the case's layers changed answers the requests of lm-eval's tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...contracts import Case, Check, Cost, ExecutedPath, Facts, Item, Metric, Registry, make_key
from ..models import substream
from ..quality.block import Call
from ..quality.changed import Changed
from ..quality.language_model import language_model
from ..quality.stored import stored_metrics
from ..subject import gate_metrics, prepare_subject
from .block import Rows, TaskBlock
from .harness import answer, give, load_tasks, wrap
from .judging import judge
from .kept import Kept

SHARD = 50
"""Items of a shard: what is lost at most when an evaluation is killed."""


@dataclass(frozen=True)
class Shard:
    """The requests of some consecutive items of a task."""

    name: str
    requests: Sequence[Any]


def shards_of(task: str, requests: Sequence[Any]) -> list[Shard]:
    """Cut the requests of a task into shards of ``SHARD`` items."""
    documents = list(dict.fromkeys(request.doc_id for request in requests))
    shard_of = {doc_id: place // SHARD for place, doc_id in enumerate(documents)}
    found: dict[int, list[Any]] = {}
    for request in requests:
        found.setdefault(shard_of[request.doc_id], []).append(request)
    return [Shard(f"{task}-{number}", own) for number, own in found.items()]


class TaskTrial:
    """One step is one shard of one task; answers are kept until the case is done."""

    state: Literal["none"] = "none"

    def __init__(self, case: Case, registry: Registry) -> None:
        self.case, workload = case, case.workload
        source = registry.get("model", case.model.name).create(case.model.params)
        self.model, tokenizer = language_model(case, source)
        self.tasks = load_tasks(workload["tasks"], workload["items"])
        self.shards = [shard for name, task in self.tasks.items() for shard in shards_of(name, task.instances)]
        self.steps = len(self.shards)
        self.input_sha256 = make_key([request.args for task in self.tasks.values() for request in task.instances])
        self.subjects = {i: prepare_subject(replace(case, layers=(i,)), registry) for i in sorted(case.layers)}
        self.rows = Rows()
        self.changed: Changed | None = None
        if self.subjects:
            self.changed = Changed(case, registry, case.backend.name, self.subjects, self.model, TaskBlock)
            for block in self.blocks.values():
                block.rows = self.rows
        self.lm = wrap(self.model, tokenizer, workload["batch"], workload["window"])
        self.kept = Kept(case, registry, self.input_sha256)
        self.tokens, self.resumed, self.done = 0, 0, 0
        self._unkept: tuple[str, list[Any], int] | None = None

    @property
    def blocks(self) -> dict[int, TaskBlock]:
        """The changed layers; none where the model is as it was."""
        return self.changed.blocks if self.changed is not None else {}  # type: ignore[return-value]  # made as TaskBlock

    def begin_turn(self) -> None:
        """Nothing to make ready."""

    def run(self, step: int) -> list[Call]:
        """Answer a shard, or take its answers from before; return the last call of each changed layer."""
        shard = self.shards[step]
        for block in self.blocks.values():
            block.last = None
        before = self.kept.read(shard.name)
        answers, tokens = before or self._answered(shard)
        self._unkept = None if before else (shard.name, answers, tokens)
        give(shard.requests, answers)
        self.tokens += tokens
        self.resumed += before is not None
        self.done += 1
        return [block.last for block in self.blocks.values() if block.last is not None]

    def _answered(self, shard: Shard) -> tuple[list[Any], int]:
        self.rows.tokens = 0
        hook = self.model.register_forward_pre_hook(self.rows.begin, with_kwargs=True)
        try:
            with self.changed.applied() if self.changed is not None else contextlib.nullcontext():
                answers = answer(self.lm, shard.requests)
        finally:
            hook.remove()
        return answers, self.rows.tokens

    def verify(self, step: int, output: list[Call]) -> Check:
        """Compare what each changed layer computed last with the float64 oracle, and keep answers that pass.

        Those from before were compared when they were given.
        """
        checks = [call.check() for call in output]
        failed = [check for check in checks if not check.ok]
        worst = max(failed or checks, key=lambda check: check.error or 0.0, default=Check(True))
        if not failed and self._unkept is not None:
            self.kept.write(*self._unkept)
        return replace(worst, flips=sum(check.flips for check in checks))

    def cost(self, step: int) -> Cost:
        """Return nothing: quality has no time to compare work with."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return every item's value, each task's with its interval, and how many tokens were read for them."""
        items: list[Item] = []
        metrics: list[Metric] = []
        for name, task in self.tasks.items():
            own_items, own_metrics = judge(name, task, substream(self.case.seed, "bootstrap"))
            items += own_items
            metrics += own_metrics
        metrics.append(Metric("tokens_read", float(self.tokens), "token"))
        if self.changed is not None:
            metrics += stored_metrics(self.changed)
            metrics += gate_metrics([subject.layer for subject in self.subjects.values()])
        executed = self.changed.session.executed() if self.changed else ExecutedPath("dense", notes="the whole model")
        notes = {"reason": f"{self.resumed} of {self.steps} shards are from before a kill"} if self.resumed else {}
        return Facts(tuple(metrics), (), tuple(items), executed, notes)

    def close(self) -> None:
        """Free the backend's session, and forget the answers of a case that is done."""
        if self.changed is not None:
            self.changed.close()
        if self.done == self.steps:
            self.kept.remove()
