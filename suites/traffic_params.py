"""Descriptors and parameters of traffic that changes with time, fits ranks, or was recorded. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..contracts import Descriptor
from .model_plugins import Forced, Hotspot, Zipf
from .trace import Trace, TraceError, load_trace


@dataclass(frozen=True)
class Sticky(Zipf):
    """Correlated in time: a token keeps the experts of the one before with probability ``stay``, else draws anew.

    The one before is the same place of the step before (``along`` steps: decode, where a place is a sequence) or the
    token before in the same long sequence (``along`` tokens: prefill; the first of a step follows the last of the step
    before). Draws are those of Zipf with ``alpha``, 0 being uniform; so ``stay`` changes no step's expected load.
    """

    alpha: float = 0.0
    stay: float = 0.9
    along: Literal["steps", "tokens"] = "steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.stay < 1:
            raise ValueError(f"stay={self.stay} must lie in [0, 1).")


@dataclass(frozen=True)
class Rotating(Hotspot):
    """A hotspot that moves on to the next ``experts`` ids after every ``period`` steps, round and round."""

    period: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period < 1:
            raise ValueError(f"period={self.period} must be at least 1.")

    def popularity(self, experts: int, step: int) -> tuple[float, ...]:
        """Return the hotspot's popularity, moved to where it is at ``step``."""
        still = super().popularity(experts, step)
        moved = (step // self.period * self.experts) % experts
        return still[experts - moved :] + still[: experts - moved]


@dataclass(frozen=True)
class Domains(Rotating):
    """Text that changes its domain, or a model that changes its task: every ``period`` steps others are popular.

    As ``rotating``, but each layer has experts of its own: their ids are exchanged by an order by chance, and every
    layer draws for itself.
    """


@dataclass(frozen=True)
class RankBalanced(Zipf):
    """Every one of ``ranks`` equal blocks of expert ids gets the same number of assignments, to within one.

    Within its block a token draws distinct experts by the Zipf law with ``alpha``, the first id of each block being the
    most popular. So devices are balanced where experts are not.
    """

    ranks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks < 1:
            raise ValueError(f"ranks={self.ranks} must be at least 1.")

    def popularity(self, experts: int, step: int) -> tuple[float, ...]:
        """Return the probability of each expert to be a token's first: the Zipf law within each block, over ranks."""
        if experts % self.ranks:
            raise ValueError(f"{experts} experts cannot be cut into ranks={self.ranks} equal blocks; choose a divisor.")
        return tuple(share / self.ranks for share in super().popularity(experts // self.ranks, step)) * self.ranks


@dataclass(frozen=True)
class Replay(Forced):
    """Routing from a trace file (see suites.trace for its format) whose content has the given ``sha256``.

    ``fit`` is the most that may be done to it. ``exact``: nothing; the case must have the trace's tokens, and at least
    its experts and k. ``projected``: tokens are repeated or cut, expert ids taken modulo the layer's, equal ones added
    up, and the heaviest k of each token kept. ``forced``: only the load per expert counts; tokens draw by it, with
    weights 1/k. What was done is the ``audit`` of the traffic. ``layer`` is the trace's layer; None is the case's own,
    or the only one there is. After its last step a trace begins anew.
    """

    path: str = ""
    sha256: str = ""
    fit: Literal["exact", "projected", "forced"] = "exact"
    layer: int | None = None

    def trace(self) -> Trace:
        """Return the trace, from memory where it was read before; ValueError with one sentence where it is bad."""
        return load_trace(self.path, self.sha256)

    def place(self, layer: int | None) -> int:
        """Return the trace's layer for the case's ``layer`` (None where that is not known)."""
        layers = self.trace().layers
        wanted = layer if self.layer is None else self.layer
        if wanted is not None and wanted in layers:
            return wanted
        if self.layer is None and len(layers) == 1:
            return layers[0]
        raise TraceError(
            f"the trace has the layers {', '.join(map(str, layers))}; choose one of them with "
            "params.traffic.replay.layer."
        )

    def popularity(self, experts: int, step: int) -> tuple[float, ...]:
        """Return the recorded load at ``step``, expert ids taken modulo ``experts``."""
        return self.shares(experts, step, None)

    def shares(self, experts: int, step: int, layer: int | None) -> tuple[float, ...]:
        """Return the recorded share of each expert at ``step`` in the case's ``layer``; they sum to 1."""
        counts = [0] * experts
        recorded = self.trace().at(step, self.place(layer)).expert_N
        for expert in (recorded % experts).tolist():
            counts[expert] += 1
        return tuple(count / len(recorded) for count in counts)

    def check_place(self, tokens: int, layer: int) -> None:
        """Raise ValueError where the trace lacks the layer at a step, or ``fit`` is exact and it has other tokens."""
        trace, place = self.trace(), self.place(layer)
        recorded = {trace.at(step, place).tokens for step in range(trace.steps)}
        if self.fit == "exact" and recorded != {tokens}:
            found = ", ".join(map(str, sorted(recorded)))
            raise TraceError(
                f"the trace has steps of {found} tokens where the case has {tokens}; choose the same axes.tokens, or "
                "params.traffic.replay.fit=projected."
            )

    def check(self, experts: int, k: int) -> None:
        """Raise ValueError where the trace is bad, or cannot be replayed as ``fit`` says in a layer of this size."""
        of_layer = self.trace().of_layer(self.place(self.layer) if self.layer is not None else None)
        if not 0 < k <= experts:
            raise ValueError(f"k={k} must lie between 1 and the {experts} experts of the layer.")
        if self.fit == "forced":
            alive = min(len(set((entries.expert_N % experts).tolist())) for entries in of_layer)
            if k > alive:
                raise ValueError(f"k={k} must lie between 1 and the {alive} experts that the trace uses at some step.")
        if self.fit != "exact":
            return
        most_expert = max(entries.most_expert for entries in of_layer)
        most_k = max(entries.most_k for entries in of_layer)
        if most_expert >= experts or most_k > k:
            raise ValueError(
                f"the trace has {most_expert + 1} experts, {most_k} per token, where the layer has {experts}, {k} per "
                "token; choose another layer, or params.traffic.replay.fit=projected."
            )


_TRAFFIC = "moebench.suites.traffic_kinds:"

DESCRIPTORS = [
    Descriptor("traffic", "sticky", "correlated in time: experts are kept", _TRAFFIC + "sticky", Sticky),
    Descriptor("traffic", "rotating", "a hotspot that moves on", "moebench.suites.traffic:drawn", Rotating),
    Descriptor("traffic", "domains", "popular experts of every layer change", _TRAFFIC + "domains", Domains),
    Descriptor("traffic", "rank_balanced", "equal load per rank", _TRAFFIC + "rank_balanced", RankBalanced),
    Descriptor("traffic", "replay", "a recorded trace, by its sha256", _TRAFFIC + "replay", Replay, ("pyarrow",)),
]
