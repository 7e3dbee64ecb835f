"""The trials of suite ``routing``, one for each phase of a router. Imported by workers only."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..contracts import Case, Check, Facts, Registry, Trial
from ..moe.routing import Context, Routing
from .layer import STEPS
from .routing_facts import routing_facts
from .routing_oracle import (
    Expected,
    PermuteOutput,
    compare_logits,
    compare_routing,
    compare_sorted,
    expected_of,
    selected,
    sorted_by_hand,
)
from .routing_trial import PhaseTrial, exact_logits, pipeline_in, scorer_of, weights_read
from .subject import selection_bias

ENTRY_BYTES = 20
"""Token, expert and weight of one assignment."""


class DecisionTrial(PhaseTrial[Routing]):
    """A phase that ends in a Routing."""

    def reference(self, number: int) -> Expected:
        """Return the Selection of exact logits where the case has one, else the router's own untimed result."""
        selection, routing = self.subject.spec.selection, self.routings[number]
        if selection is None or routing.logits_TE is None:
            return expected_of(routing)
        exact_TE = exact_logits(self.subject.layer.router, self.questions[number].x_TH)
        logits_TE = routing.logits_TE if exact_TE is None else exact_TE
        return selected(logits_TE, selection, selection_bias(self.subject))

    def judge(self, output: Routing, expected: Expected) -> Check:
        """Compare experts and weights."""
        return compare_routing(output, expected, self.subject.spec.max_k, self.bound)

    def entry_bytes(self, step: int) -> int:
        """Return the size of the assignments."""
        return ENTRY_BYTES * len(self.routings[step].token_N)


class RouteTrial(DecisionTrial):
    """The whole router: hidden states to a Routing."""

    def phase(self, step: int) -> Routing:
        """Route."""
        routing: Routing = self.router(self.x[step], self.contexts[step])
        return routing

    def moved(self, step: int, flops: float) -> float:
        """Return the weights that take part in products, hidden states and assignments."""
        return weights_read(self.router, flops, self.case.tokens) + self.x[step].nbytes + self.entry_bytes(step)

    @cached_property
    def _facts(self) -> Facts:
        return routing_facts(self.case, self.registry, self.subject, self.questions[0], self.routings[0])

    def facts(self) -> Facts:
        """Return every figure of the first question's Routing."""
        return self._facts


class GateTrial(PhaseTrial[Tensor]):
    """The scorer of a Pipeline: hidden states to logits_TE."""

    def __init__(self, case: Case, registry: Registry) -> None:
        super().__init__(case, registry)
        self.scorer = scorer_of(self.router, case)

    def phase(self, step: int) -> Tensor:
        """Score."""
        logits_TE: Tensor = self.scorer(self.x[step], self.contexts[step])
        return logits_TE

    def reference(self, number: int) -> Tensor:
        """Return exact logits of a Linear scorer, else the layer's own untimed ones, in float64."""
        router, question = self.subject.layer.router, self.questions[number]
        exact_TE = exact_logits(router, question.x_TH)
        if exact_TE is not None:
            return exact_TE
        logits_TE: Tensor = scorer_of(router, self.case)(question.x_TH, question.context())
        return logits_TE.double()

    def judge(self, output: Tensor, expected: Tensor) -> Check:
        """Compare row by row."""
        return compare_logits(output, expected, self.bound)

    def moved(self, step: int, flops: float) -> float:
        """Return the weights that take part in products, hidden states and logits."""
        logits: int = 4 * self.expected[step].numel()
        return weights_read(self.scorer, flops, self.case.tokens) + self.x[step].nbytes + logits


class Given(nn.Module):
    """A scorer that has scored already."""

    def __init__(self, logits_TE: Tensor) -> None:
        super().__init__()
        self.logits_TE = logits_TE

    def forward(self, x_TH: Tensor, ctx: Context) -> Tensor:
        """Return the logits that were given."""
        return self.logits_TE


class SelectTrial(DecisionTrial):
    """All of a Pipeline that follows its scorer: logits_TE to a Routing."""

    def __init__(self, case: Case, registry: Registry) -> None:
        super().__init__(case, registry)
        scorer = scorer_of(self.subject.layer.router, case)
        with torch.no_grad():
            self.logits = [scorer(question.x_TH, question.context()).clone() for question in self.questions]
        self.given = [Given(logits_TE.clone()) for logits_TE in self.logits[:STEPS]]
        self.routers = [copy.deepcopy(self.router) for _ in range(STEPS)]
        for router, given in zip(self.routers, self.given, strict=True):
            pipeline_in(router, case).scorer = given

    def exchange(self, step: int) -> None:
        """Give the logits of the other variant."""
        self.given[step].logits_TE.copy_(self.logits[self.number(step)])

    def phase(self, step: int) -> Routing:
        """Choose experts and weigh them."""
        routing: Routing = self.routers[step](self.x[step], self.contexts[step])
        return routing

    def moved(self, step: int, flops: float) -> float:
        """Return the logits and the assignments."""
        return float(self.logits[step].nbytes + self.entry_bytes(step))


class PermuteTrial(PhaseTrial[PermuteOutput]):
    """A Routing to the form that kernels take: assignments sorted by expert. Hidden states do not move."""

    def __init__(self, case: Case, registry: Registry) -> None:
        super().__init__(case, registry)
        self.given = [replace(routing) for routing in self.routings[:STEPS]]

    def exchange(self, step: int) -> None:
        """Give the other variant's Routing as a new object: the old one has its counts cached."""
        self.given[step] = replace(self.routings[self.number(step)])

    def reference(self, number: int) -> PermuteOutput:
        """Return the assignments as Python sorts them."""
        return sorted_by_hand(self.routings[number])

    def phase(self, step: int) -> PermuteOutput:
        """Sort."""
        return self.given[step].sorted()

    def judge(self, output: PermuteOutput, expected: PermuteOutput) -> Check:
        """Compare bit for bit."""
        return compare_sorted(output, expected)

    def moved(self, step: int, flops: float) -> float:
        """Return every entry, read and written once."""
        return 2.0 * ENTRY_BYTES * len(self.routings[step].token_N)


TRIALS: dict[str, type[PhaseTrial[Any]]] = {
    "route": RouteTrial,
    "gate": GateTrial,
    "select": SelectTrial,
    "permute": PermuteTrial,
}


def make_trial(case: Case, registry: Registry) -> Trial:
    """Return the trial of the case's phase."""
    return TRIALS[case.workload["phase"]](case, registry)
