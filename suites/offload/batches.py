"""Tokens that wait to be put into steps (Read-ME): their experts in all layers are known. Imported by workers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...backends.offload.batching import distinct, expert_aware, first_come
from ...contracts import Case
from ...moe.routing import Routing
from ..models import substream


@dataclass(frozen=True)
class Waiting:
    """All tokens of a run by layer, the tokens of each step, and what each needs in the order of coming."""

    routings: Mapping[int, Routing]
    steps: Sequence[Sequence[int]]
    queue: Sequence[set[tuple[int, int]]]

    @classmethod
    def of(cls, drawn: Sequence[Mapping[int, Routing]], case: Case) -> Waiting:
        """Return the tokens of ``drawn`` steps, mixed by chance, in the steps that the case's batching makes."""
        routings = {layer: _concatenated([step[layer] for step in drawn]) for layer in drawn[0]}
        count = next(iter(routings.values())).num_tokens
        order = torch.randperm(count, generator=torch.Generator().manual_seed(substream(case.seed, "waiting"))).tolist()
        needs: list[set[tuple[int, int]]] = [set() for _ in range(count)]
        for layer, routing in routings.items():
            for token, expert in zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True):
                needs[token].add((layer, expert))
        queue = [needs[token] for token in order]
        if case.workload["batching"] == "expert_aware":
            batches = expert_aware(queue, case.tokens, int(case.workload["patience"]))
        else:
            batches = first_come(queue, case.tokens)
        return cls(routings, [[order[place] for place in batches[step]] for step in sorted(batches)], queue)

    def batch(self, step: int) -> dict[int, Routing]:
        """Return the Routings of the tokens of a step."""
        rows = self.steps[step]
        return {layer: Routing.dense(routing.to_dense()[rows]) for layer, routing in self.routings.items()}

    def first_come_experts(self) -> float:
        """Return how many distinct experts of all layers a step needs in the mean if the first that came go first."""
        batches = first_come(self.queue, len(self.steps[0]))
        return sum(distinct(self.queue, batch) for batch in batches.values()) / len(batches)


def _concatenated(parts: Sequence[Routing]) -> Routing:
    return Routing.dense(torch.cat([part.to_dense() for part in parts]))
