"""What a model does with all of its experts at hand: the oracle of every run with few of them, and its trace.

Imported by workers only. Shape letters: B sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...backends.offload.access import Access, Key, Layout
from ...backends.offload.policies.placement import popularity
from ...contracts import Case, Registry
from ...moe.experts import ExpertStore
from ...moe.routing import Routing
from .layers import Bare, subjects
from .stacks import Stack


@dataclass(frozen=True)
class Recording:
    """A run of some steps: ``accesses`` of all calls in order, the prompt's first; ``routings`` of each call by layer.

    ``final`` is what the head reads after each step, [B, H], ``logits`` [B, V] where there is a head. The first
    ``prompt_accesses`` belong to the prompt.
    """

    layout: Layout
    accesses: tuple[Access, ...]
    routings: tuple[Mapping[int, Routing], ...]
    final: tuple[Tensor, ...]
    logits: tuple[Tensor | None, ...]
    prompt_accesses: int

    @property
    def popularity(self) -> dict[Key, float]:
        """How many tokens of the prompt each expert has: what a static placement may know."""
        return popularity(self.accesses[: self.prompt_accesses])

    @property
    def steps(self) -> int:
        """Number of steps, the prompt not among them."""
        return len(self.final)


def access_of(step: int, layer: int, routing: Routing, hints: Sequence[tuple[Key, float]] = ()) -> Access:
    """Return what a Routing asks of its layer."""
    experts = sorted(set(routing.expert_N.tolist()))
    of = [routing.expert_N == expert for expert in experts]
    tokens = tuple(int(mask_N.sum()) for mask_N in of)
    weights = tuple(float(routing.weight_N[mask_N].double().sum()) for mask_N in of)
    return Access(step, layer, tuple(experts), tokens, weights, tuple(hints))


class Recorder:
    """Collects accesses and Routings from the layers of a stack; steps are counted as sessions count them."""

    def __init__(self) -> None:
        self.calls: list[dict[int, Routing]] = []
        self.accesses: list[Access] = []
        self._hints: list[tuple[Key, float]] = []

    def look(self, layer: int, routing: Routing, parts: Sequence[Routing]) -> None:
        """See what a layer is asked."""
        if not self.calls or layer in self.calls[-1]:
            self.calls.append({})
        self.calls[-1][layer] = routing
        for part in parts:
            last = self.accesses[-1] if self.accesses else None
            step = 0 if last is None else last.step + (layer <= last.layer)
            self.accesses.append(access_of(step, layer, part, self._hints))
            self._hints = []

    def hint(self, layer: int, experts: Sequence[int], priority: float) -> None:
        """See a hint that comes before the next access."""
        self._hints += [((layer, int(expert)), priority) for expert in experts]


def record(stack: Stack, session: Any, steps: int, layout: Layout) -> Recording:
    """Run the prompt and ``steps`` steps on a session with all experts at hand, and return what happened."""
    recorder, final, logits = Recorder(), [], []
    stack.layers.serve_by(session)
    stack.layers.look, stack.layers.hint = recorder.look, recorder.hint
    stack.begin()
    prompt_accesses = len(recorder.accesses)
    for step in range(steps):
        final.append(stack.step(step))
        logits.append(stack.logits(final[-1]))
    accesses = tuple(recorder.accesses)
    return Recording(layout, accesses, tuple(recorder.calls), tuple(final), tuple(logits), prompt_accesses)


def without_experts(
    case: Case, registry: Registry, keep: Callable[[int, ExpertStore], None]
) -> tuple[dict[int, Bare], Layout]:
    """Return all layers without their experts, which are handed to ``keep``, layer by layer."""
    bare: dict[int, Bare] = {}
    for index, subject in subjects(case, registry):
        keep(index, subject.layer.store)
        bare[index] = Bare.of(index, subject)
    return bare, Layout(tuple(bare), next(iter(bare.values())).spec.experts)
