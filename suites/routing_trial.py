"""What the trials of suite ``routing`` share: questions in fixed buffers, and the parts of a router.

Inputs rotate with the step, and each step has two variants of its inputs in the same buffer, as in a layer's trial. The
router that is timed is a copy; references come from the layer's own. Imported by workers only.
"""

from __future__ import annotations

import copy
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..contracts import Case, Check, Cost, Facts, MoebenchError, Registry
from ..moe.oracle import bound
from ..moe.router import Linear
from ..moe.routing import Context, Routing
from ..moe.routing_metrics.cost import counted_flops
from .digest import sha256_of
from .layer import STEPS, VARIANTS
from .routing_inputs import Question, make_question
from .subject import Subject, prepare_subject

Result = TypeVar("Result")


class PhaseTrial(Generic[Result]):
    """A phase of a router on rotating inputs; a subclass says what runs and what must come out."""

    state: Literal["none"] = "none"
    steps = STEPS

    def __init__(self, case: Case, registry: Registry) -> None:
        self.case, self.registry = case, registry
        self.subject: Subject = prepare_subject(case, registry)
        self.router = copy.deepcopy(self.subject.layer.router)
        numbers = range(STEPS * VARIANTS)
        self.questions = [make_question(case, registry, self.subject, number) for number in numbers]
        self.input_sha256 = sha256_of(*(question.x_TH for question in self.questions))
        self.x = [question.x_TH.clone() for question in self.questions[:STEPS]]
        self.contexts: list[Context] = [question.context() for question in self.questions[:STEPS]]
        self._variant = 0
        with torch.no_grad():
            self.routings = [self._untimed(question) for question in self.questions]
            self.expected = [self.reference(number) for number in numbers]

    def _untimed(self, question: Question) -> Routing:
        """Return the layer's own routing of a question, apart from the copy that is timed."""
        routing: Routing = self.subject.layer.router(question.x_TH, question.context())
        return routing

    def number(self, step: int) -> int:
        """Return which question ``step`` asks now."""
        return self._variant * STEPS + step % STEPS

    @property
    def bound(self) -> float:
        """The largest relative error: that of the dtype in which the router scores."""
        logits_TE = self.routings[0].logits_TE
        return bound(torch.float32 if logits_TE is None else logits_TE.dtype)

    def begin_turn(self) -> None:
        """Exchange the inputs for the other variant, in place, with generators in their first state."""
        self._variant = 1 - self._variant
        for step, x_TH in enumerate(self.x):
            question = self.questions[self.number(step)]
            x_TH.copy_(question.x_TH)
            self.contexts[step] = question.context()
            self.exchange(step)

    def run(self, step: int) -> Result:
        """Run the phase on the input of ``step``."""
        with torch.no_grad():
            return self.phase(step % STEPS)

    def verify(self, step: int, output: Result) -> Check:
        """Compare with what the input of ``step`` must give."""
        return self.judge(output, self.expected[self.number(step)])

    def cost(self, step: int) -> Cost:
        """Return the matrix products as torch counts them, and the least that must be moved."""
        flops = float(counted_flops(lambda: self.run(step)))
        moved = self.moved(step % STEPS, flops)
        return Cost(flops, moved, assignments=len(self.routings[step % STEPS].token_N), footprint=moved)

    def facts(self) -> Facts:
        """Return nothing: the figures come with phase ``route``."""
        return Facts()

    def close(self) -> None:
        """Nothing to free."""

    def exchange(self, step: int) -> None:
        """Exchange what the phase takes besides hidden states."""

    def reference(self, number: int) -> Any:
        """Return what the phase must give for question ``number``."""
        raise NotImplementedError

    def phase(self, step: int) -> Result:
        """Do what is timed."""
        raise NotImplementedError

    def judge(self, output: Result, expected: Any) -> Check:
        """Compare one result."""
        raise NotImplementedError

    def moved(self, step: int, flops: float) -> float:
        """Return the bytes that a call must read and write."""
        raise NotImplementedError


def weights_read(module: nn.Module, flops: float, tokens: int) -> float:
    """Return the bytes of the parameters that a call must read.

    A weight that takes part in a product of matrices makes two flops per token at least, so no more of them than the
    flops allow are counted: of an embedding only a few rows are read.
    """
    parameters = list(module.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    size = sum(parameter.nbytes for parameter in parameters)
    return size * min(1.0, flops / (2 * tokens * count)) if count else 0.0


def pipeline_in(router: nn.Module, case: Case) -> nn.Module:
    """Return the part of a router that has a scorer: the router itself, or what its wrappers hold as ``router``.

    A sentence where there is none although the parameters promise one.
    """
    part: Any = router
    while not isinstance(getattr(part, "scorer", None), nn.Module):
        part = getattr(part, "router", None)
        if part is None:
            raise MoebenchError(f"routing '{case.routing}' has no scorer; set pipeline = False in its parameters.")
    found: nn.Module = part
    return found


def scorer_of(router: nn.Module, case: Case) -> nn.Module:
    """Return the scorer of a Pipeline."""
    return pipeline_in(router, case).get_submodule("scorer")


def exact_logits(router: nn.Module, x_TH: Tensor) -> Tensor | None:
    """Return logits_TE of a Linear scorer in float64, None for any other."""
    scorer = getattr(router, "scorer", None)
    if type(scorer) is not Linear:
        return None
    logits_TE = x_TH.double() @ scorer.weight_EH.detach().double().T
    return logits_TE if scorer.bias_E is None else logits_TE + scorer.bias_E.detach().double()
