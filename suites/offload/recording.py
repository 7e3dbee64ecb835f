"""What a model does with all of its experts at hand: the oracle of every run with few of them, and its trace.

Imported by workers only. Shape letters: B sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...backends.offload.access import Access, Key, Layout
from ...contracts import Case, Registry
from ...moe.experts import ExpertStore
from ...moe.routing import Routing
from .layers import Bare, subjects
from .stacks import Stack


@dataclass(frozen=True)
class Recording:
    """A run of some steps: ``accesses`` of all calls in order, the prompt's first; ``routings`` of each call by layer.

    ``final`` is what the head reads after each step, [B, H], ``logits`` [B, V] where there is a head.
    """

    layout: Layout
    accesses: tuple[Access, ...]
    routings: tuple[Mapping[int, Routing], ...]
    final: tuple[Tensor, ...]
    logits: tuple[Tensor | None, ...]
    prompt_calls: int

    @property
    def steps(self) -> int:
        """Number of steps, the prompt not among them."""
        return len(self.final)

    @property
    def prompt_accesses(self) -> int:
        """How many accesses belong to the prompt."""
        return self.prompt_calls * len(self.layout.layers)


def access_of(step: int, layer: int, routing: Routing, hints: Sequence[tuple[Key, float]] = ()) -> Access:
    """Return what a Routing asks of its layer."""
    experts = sorted(set(routing.expert_N.tolist()))
    of = [routing.expert_N == expert for expert in experts]
    tokens = tuple(int(mask_N.sum()) for mask_N in of)
    weights = tuple(float(routing.weight_N[mask_N].double().sum()) for mask_N in of)
    return Access(step, layer, tuple(experts), tokens, weights, tuple(hints))


class Recorder:
    """Collects accesses and Routings from the layers of a stack."""

    def __init__(self) -> None:
        self.calls: list[dict[int, Routing]] = []
        self.accesses: list[Access] = []
        self._hints: list[tuple[Key, float]] = []
        self._waiting: tuple[int, Routing] | None = None

    def look(self, layer: int, routing: Routing) -> None:
        """See what a layer is asked."""
        self._finish()
        if not self.calls or layer in self.calls[-1]:
            self.calls.append({})
        self.calls[-1][layer] = routing
        self._waiting = (layer, routing)

    def hint(self, layer: int, experts: Sequence[int], priority: float) -> None:
        """See a hint that the layer at work gives."""
        self._hints += [((layer, int(expert)), priority) for expert in experts]

    def _finish(self) -> None:
        if self._waiting is not None:
            layer, routing = self._waiting
            self.accesses.append(access_of(len(self.calls) - 1, layer, routing, self._hints))
        self._waiting, self._hints = None, []

    def taken(self) -> tuple[Access, ...]:
        """Return all accesses so far."""
        self._finish()
        return tuple(self.accesses)


def record(stack: Stack, session: Any, steps: int, layout: Layout) -> Recording:
    """Run the prompt and ``steps`` steps on a session with all experts at hand, and return what happened."""
    recorder, final, logits = Recorder(), [], []
    stack.layers.serve_by(session)
    stack.layers.look, stack.layers.hint = recorder.look, recorder.hint
    stack.begin()
    prompt_calls = len(recorder.calls)
    for step in range(steps):
        final.append(stack.step(step))
        logits.append(stack.logits(final[-1]))
    return Recording(layout, recorder.taken(), tuple(recorder.calls), tuple(final), tuple(logits), prompt_calls)


def without_experts(
    case: Case, registry: Registry, keep: Callable[[int, ExpertStore], None]
) -> tuple[dict[int, Bare], Layout]:
    """Return all layers without their experts, which are handed to ``keep``, layer by layer."""
    bare: dict[int, Bare] = {}
    for index, subject in subjects(case, registry):
        keep(index, subject.layer.store)
        bare[index] = Bare.of(index, subject)
    return bare, Layout(tuple(bare), next(iter(bare.values())).spec.experts)
