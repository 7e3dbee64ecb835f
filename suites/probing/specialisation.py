"""Probe ``specialisation``: what the kind and the place of a token tell of its experts (after DiT-MoE, 2407.11633).

A text has neither classes nor steps of diffusion: labels are the kinds of tokens that tinymoe is judged by, and
POSITIONS equal parts of a window. Neighbours resemble each other, so chance is that of whole parts moved within each
window, and of kinds rotated within it. Shape letters: T tokens, K slots, C labels, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...contracts import Case, Check, Facts, Metric, Registry, Series
from ...moe.probes.information import (
    Shared,
    against_chance,
    counts,
    entropy,
    normalised,
    parts_moved,
    rotated,
)
from ..models import substream
from ..training.specialisation import CLASSES, classes_of
from .base import Stage, holds
from .scene import Scene

POSITIONS = 8


class Specialisation:
    """Routings of the changed layers on the passage, against two labels."""

    def __init__(self, case: Case, registry: Registry) -> None:
        self.scene, self.case = Scene(case, registry), case
        self.input_sha256 = self.scene.input_sha256
        self.chosen: dict[int, list[Tensor]] = {layer: [] for layer in sorted(case.layers)}
        self.found: dict[tuple[str, int], Shared] = {}

    @property
    def stages(self) -> Sequence[Stage]:
        """One window after another, then one layer after another."""
        windows = [partial(self.window, ids_T) for ids_T in self.scene.windows()]
        return [*windows, *(partial(self.layer, index) for index in self.chosen)]

    def window(self, ids_T: Tensor) -> list[Check]:
        """Keep the Routings of a window."""
        self.scene.forward(ids_T)
        for call in self.scene.calls:
            self.chosen[call.block.index].append(call.routing.padded(call.block.subject.spec.max_k)[0])
        first = all(len(parts) == 1 for parts in self.chosen.values())
        return self.scene.call_checks() if first else []

    def labels(self) -> dict[str, tuple[Tensor, int]]:
        """Return each label of every token, and how many values it has."""
        ids_T = self.scene.passage.ids[:-1]
        place_T = torch.arange(len(ids_T)) % self.scene.window
        part_T = place_T * POSITIONS // self.scene.window
        return {"kind": (classes_of(self.scene.tokenizer, ids_T), len(CLASSES)), "position": (part_T, POSITIONS)}

    def layer(self, index: int) -> list[Check]:
        """Judge a layer's Routing by both labels; the information must be what entropies say."""
        expert_TK = torch.cat(self.chosen[index])
        experts, checks = self.scene.shape.experts, []
        shuffles = {"kind": rotated(self.scene.window), "position": parts_moved(self.scene.window, POSITIONS)}
        for label, (label_T, values) in self.labels().items():
            seed = substream(self.case.seed, "shuffles", label, index)
            args = (label_T, expert_TK, values, experts)
            permutations = self.case.workload["permutations"]
            self.found[label, index] = found = against_chance(*args, permutations, seed, shuffles[label])
            joint_CE = counts(*args)
            checks.append(holds(abs(found.nmi - by_entropies(joint_CE)) < 1e-9, "information is not that of entropies"))
            inside = int(((expert_TK >= 0) & (expert_TK < experts)).sum())
            checks.append(holds(int(joint_CE.sum()) == inside, "assignments were lost in counting"))
        itself_T = torch.arange(experts)
        whole = normalised(counts(itself_T, itself_T[:, None], experts, experts))
        return [*checks, holds(experts < 2 or abs(whole - 1) < 1e-9, "an expert does not tell itself")]

    def facts(self) -> Facts:
        """Return means over layers, and information, null and chance by layer."""
        metrics, series = [], []
        for label in self.labels():
            rows = [self.found[label, index] for index in self.chosen]
            metrics += [
                Metric(f"{label}_nmi", sum(row.nmi for row in rows) / len(rows), "1", n=len(rows)),
                Metric(f"{label}_nmi_shuffled", sum(row.null for row in rows) / len(rows), "1", n=len(rows)),
            ]
            series += [
                Series(f"{label}_nmi_by_layer", tuple(row.nmi for row in rows), "1"),
                Series(f"{label}_nmi_shuffled_by_layer", tuple(row.null for row in rows), "1"),
                Series(f"{label}_nmi_p_by_layer", tuple(row.p for row in rows), "1"),
            ]
        return Facts(tuple(metrics), tuple(series), (), self.scene.executed())

    def close(self) -> None:
        """Free the backend's session."""
        self.scene.close()


def by_entropies(joint_CE: Tensor) -> float:
    """Return 2 (H(C) + H(E) - H(C, E)) / (H(C) + H(E)): the same by another way, for a check."""
    p_CE = joint_CE / joint_CE.sum().clamp(min=1)
    apart = entropy(p_CE.sum(1)) + entropy(p_CE.sum(0))
    return 2 * (apart - entropy(p_CE.flatten())) / apart if apart > 0 else 0.0
