"""Seconds of a decoding step by a roofline of tiers: a model, never a measurement. Imports no torch.

A step gives one token to each of B sequences. It reads once: all weights but the routed experts (of the embedding only
the head), keys and values of the context, and the experts that the B tokens use. Where weights are read and multiplied
in place, that takes max(bytes / rate of the memory, flop / peak of its processor); where an expert is brought first,
bytes / rate of the way come on top. ``serial`` is the sum of all, ``overlapped`` the longest of the tiers: what perfect
prefetching and computing on both sides at once could come to. Where it was measured what this harness makes of the
machine (``Program``), its own placements are predicted with that. Left out: flop of attention over the context, and
activations between tiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .caching import touch_probabilities
from .counts import Model
from .forms import Weights
from .hardware import Hardware

Memory = Literal["vram", "ram"]
Way = Literal["link", "disk", "ram"]

PROCESSOR = {"vram": "gpu", "ram": "cpu"}


@dataclass(frozen=True)
class Load:
    """What is asked of a model: ``batch`` sequences of ``context`` tokens, with experts of Zipf exponent ``skew``."""

    batch: int = 1
    context: int = 4096
    skew: float = 0.0


@dataclass(frozen=True)
class Split:
    """Where things lie: all but the routed experts in ``fixed``; experts that are there when asked for in ``hot``.

    The others come over ``way`` (``ram``: they are not brought, and the cores compute where they lie). ``ours``: it is
    this harness that runs it.
    """

    fixed: Memory
    hot: Memory
    hit: float = 1.0
    way: Way | None = None
    ours: bool = False


@dataclass(frozen=True)
class Term:
    """A piece of a step: what is done, on which tier, in how many seconds."""

    what: str
    tier: str
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """The pieces of a step that gives ``batch`` tokens."""

    terms: Sequence[Term]
    batch: int

    @property
    def serial(self) -> float:
        """Seconds of a step where nothing overlaps."""
        return sum(term.seconds for term in self.terms)

    @property
    def overlapped(self) -> float:
        """Seconds of a step where all tiers work at once."""
        tiers = {term.tier for term in self.terms}
        return max(sum(term.seconds for term in self.terms if term.tier == tier) for tier in tiers)

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all sequences together, nothing overlapping."""
        return self.batch / self.serial


def touched_experts(model: Model, load: Load) -> float:
    """Return how many experts of all layers a step uses."""
    return sum(sum(touch_probabilities(layer.experts, layer.k, load.skew, load.batch)) for layer in model.moe_layers)


def fixed_bytes(model: Model, weights: Weights, load: Load) -> float:
    """Return the bytes that a step reads besides routed experts: of an embedding that is not the head, nothing."""
    embedding = model.embedding + model.head
    unread = weights.parts["embedding"] * model.embedding / embedding if model.head else 0.0
    return weights.fixed - unread + load.batch * model.kv_bytes(load.context)


def predict(model: Model, weights: Weights, hardware: Hardware, load: Load, split: Split) -> Prediction:
    """Return the pieces of a step."""
    program = hardware.program if split.ours else None
    if program is not None:
        hardware = hardware.scaled({"ram": program.ram, "disk": program.disk})
    always = model.total - model.parameters()["experts"] - (model.embedding if model.head else 0)
    read = fixed_bytes(model, weights, load)
    terms = [_computed("all but the experts", split.fixed, read, 2.0 * load.batch * always, hardware)]

    touched = touched_experts(model, load) * weights.expert(model)
    flops = 2.0 * load.batch * sum(layer.k * layer.expert for layer in model.layers)
    missing = 1 - split.hit
    if split.hit > 0:
        terms.append(_computed("experts that are there", split.hot, touched * split.hit, flops * split.hit, hardware))
    if missing > 0 and split.way is not None:
        if split.way != "ram":
            terms.append(Term("experts brought", split.way, touched * missing / hardware.rate(split.way)))
        memory: Memory = "ram" if split.way == "ram" else split.hot
        terms.append(_computed("experts that are not there", memory, touched * missing, flops * missing, hardware))
    if program is not None:
        used = touched_experts(model, load)
        brought = used * missing if split.way in ("disk", "link") else 0.0
        terms.append(Term("calls", "cpu", program.seconds(model, used, brought)))
    return Prediction(terms, load.batch)


def _computed(what: str, memory: Memory, read: float, flops: float, hardware: Hardware) -> Term:
    seconds = max(read / hardware.rate(memory), flops / hardware.rate(PROCESSOR[memory]))
    return Term(what, memory, seconds)
