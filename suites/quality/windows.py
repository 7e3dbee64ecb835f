"""What trials over a text share: a passage, window by window, through a model with the case's layers on a backend.

Imported by workers only. Shape letters: T tokens, C columns of scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ...contracts import Case, Cost, Item, Registry
from ..digest import sha256_of
from ..subject import Subject, prepare_subject
from ..text import evaluation_text
from .bootstrap import BLOCK
from .changed import Changed
from .language_model import language_model
from .passage import take_passage
from .scores import COLUMNS


class TextTrial:
    """A passage and the changed layers; one step is one window, whose ``scores`` a subclass appends.

    The layers are the case's own, or ``subjects`` by rising index where somebody made them already.
    """

    state: Literal["none"] = "none"

    def __init__(self, case: Case, registry: Registry, subjects: Mapping[int, Subject] | None = None) -> None:
        self.case, self.window = case, int(case.workload["window"])
        self.subjects = dict(subjects) if subjects is not None else subjects_of(case, registry)
        self.model, tokenizer = language_model(case, next(iter(self.subjects.values())).source)
        self.passage = take_passage(tokenizer, evaluation_text(), case.tokens, case.seed)
        self.steps = case.tokens // self.window
        self.input_sha256 = sha256_of(self.passage.ids)
        self.changed = Changed(case, registry, case.backend.name, self.subjects, self.model)
        self.prompt = int(case.workload.get("prompt", 0))
        self.changed.prompt = self.prompt or None
        self.scores: list[Tensor] = []

    def begin_turn(self) -> None:
        """Nothing to make ready: every step writes anew."""

    def part(self, step: int) -> slice:
        """Return the tokens of window ``step``."""
        return slice(step * self.window, (step + 1) * self.window)

    def judged(self, step: int) -> slice:
        """Return the tokens of window ``step`` that are judged: those after its prompt."""
        return slice(step * self.window + self.prompt, (step + 1) * self.window)

    def cost(self, step: int) -> Cost:
        """Return nothing: quality has no time to compare work with."""
        return Cost(0.0, 0.0)

    def items(self, names: Mapping[str, str]) -> list[Item]:
        """Return the mean scores of each BLOCK of tokens, so that two methods can be compared block by block."""
        return block_items(self.scores, f"text-{self.input_sha256[:12]}", names, self.prompt)

    def close(self) -> None:
        """Free the backend's session."""
        self.changed.close()


def subjects_of(case: Case, registry: Registry) -> dict[int, Subject]:
    """Return the case's layers after their recipe, by rising index."""
    return {index: prepare_subject(replace(case, layers=(index,)), registry) for index in sorted(case.layers)}


def block_items(windows: Sequence[Tensor], task: str, names: Mapping[str, str], prompt: int = 0) -> list[Item]:
    """Return items named by their first token: the means of columns over BLOCK tokens of one window, or its rest.

    Each window begins with ``prompt`` tokens that are not judged, and counted nevertheless.
    """
    found, start = [], 0
    for scores_TC in windows:
        start += prompt
        for part_TC in torch.split(scores_TC, BLOCK):
            means = {name: float(part_TC[:, COLUMNS.index(column)].mean()) for column, name in names.items()}
            found += [Item(task, str(start), name, value) for name, value in means.items()]
            start += len(part_TC)
    return found
