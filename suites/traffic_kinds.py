"""Traffic that is correlated in time, balanced per rank, or replayed from a trace.

Everything is a function of (parameters, sizes, step, seed), as in suites.traffic. Shape letters: T tokens, E experts,
K slots, R ranks, M experts of a rank, N assignments, S tokens of the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..contracts import Metric, canonical_json
from ..moe.routing import Routing
from .model_plugins import Balanced, Forced
from .models import substream
from .trace import Entries, TraceError
from .traffic import BalancedTraffic, DrawnTraffic, GaussianTraffic, inclusion
from .traffic_params import Domains, RankBalanced, Replay, Sticky


def _generator(params: Forced, seed: int, *names: str | int) -> torch.Generator:
    """Return the generator of a stream that depends on the parameters, the seed and ``names``."""
    return torch.Generator().manual_seed(
        substream(seed, "traffic", type(params).__name__, canonical_json(params), *names)
    )


# --- correlated in time ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StickyTraffic(DrawnTraffic):
    """Each place has the draw of its latest renewal; all are renewed at the beginning, each later with 1 - stay.

    Draws of a step depend on nothing else, so that any step can be had alone, by looking back to the renewals.
    """

    params: Sticky

    def routing(self, tokens: int, experts: int, k: int, step: int, seed: int, layer: int | None = None) -> Routing:
        """Return a top-k Routing of shape (tokens, experts) with weights 1/k."""
        self.params.check(experts, k)
        indices_TK = torch.empty(tokens, k, dtype=torch.int64)
        open_T = torch.ones(tokens, dtype=torch.bool)
        for back in range(step, -1, -1):
            if not bool(open_T.any()):
                break
            drawn_TK = super().routing(tokens, experts, k, back, seed).padded(k)[0]
            found_T, source_T = self._renewed(tokens, experts, k, back, seed, same=back == step)
            found_T &= open_T
            indices_TK[found_T] = drawn_TK[source_T[found_T]]
            open_T &= ~found_T
        return Routing.topk(indices_TK, torch.full((tokens, k), 1 / k), experts)

    def _renewed(self, tokens: int, experts: int, k: int, step: int, seed: int, *, same: bool) -> tuple[Tensor, Tensor]:
        """Return (found_T bool, source_T int64): whose latest renewal lies in ``step``, and the token that drew then.

        ``same`` says that ``step`` is the one asked for, and not one before it.
        """
        rng = _generator(self.params, seed, "renewal", step, tokens, experts, k)
        new_T = torch.rand(tokens, generator=rng) >= self.params.stay
        token_T = torch.arange(tokens)
        if self.params.along == "steps":
            return new_T | (step == 0), token_T
        if step == 0:
            new_T[:1] = True
        latest_T = torch.where(new_T, token_T, -1).cummax(0).values
        source_T = latest_T if same else latest_T[-1:].expand(tokens)
        return source_T >= 0, source_T


# --- domains that change ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DomainsTraffic(DrawnTraffic):
    """What ``rotating`` draws, by each layer for itself, with its experts in an order of its own, whatever the seed."""

    params: Domains

    def routing(self, tokens: int, experts: int, k: int, step: int, seed: int, layer: int | None = None) -> Routing:
        """Return a top-k Routing of shape (tokens, experts) with weights 1/k."""
        own = substream(seed, "domains", -1 if layer is None else layer)
        return super().routing(tokens, experts, k, step, own).relabel(self._order(experts, layer))

    def requested(self, experts: int, k: int, step: int = 0, layer: int | None = None) -> tuple[float, ...]:
        """Return the expected share of assignments of each expert; exact up to quadrature, sums to 1."""
        shares = super().requested(experts, k, step)
        found = dict(zip(self._order(experts, layer).tolist(), shares, strict=True))
        return tuple(found[expert] for expert in range(experts))

    def _order(self, experts: int, layer: int | None) -> Tensor:
        """Return the id of each expert that ``rotating`` draws."""
        rng = _generator(self.params, 0, "order", -1 if layer is None else layer)
        return torch.randperm(experts, generator=rng)


# --- balanced per rank -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankBalancedTraffic(DrawnTraffic):
    """A token has k // R experts of every rank, and one more of k % R ranks that are dealt evenly."""

    params: RankBalanced

    def routing(self, tokens: int, experts: int, k: int, step: int, seed: int, layer: int | None = None) -> Routing:
        """Return a top-k Routing of shape (tokens, experts) with weights 1/k."""
        self.params.check(experts, k)
        ranks = self.params.ranks
        count_TR = torch.full((tokens, ranks), k // ranks)
        if k % ranks:
            count_TR += BalancedTraffic(Balanced()).routing(tokens, ranks, k % ranks, step, seed).to_dense().ne(0)
        rng = _generator(self.params, seed, step, tokens, experts, k)
        log_p_E = torch.tensor(self.params.popularity(experts, step), dtype=torch.float64).log()
        clock_TE = torch.empty(tokens, experts, dtype=torch.float64).exponential_(generator=rng)
        score_TRM = (log_p_E - clock_TE.log()).reshape(tokens, ranks, experts // ranks)
        place_TRM = score_TRM.argsort(-1, descending=True).argsort(-1)
        chosen_TE = (place_TRM < count_TR[:, :, None]).flatten(1)
        indices_TK = chosen_TE.nonzero()[:, 1].reshape(tokens, k)
        return Routing.topk(indices_TK, torch.full((tokens, k), 1 / k), experts)

    def requested(self, experts: int, k: int, step: int = 0, layer: int | None = None) -> tuple[float, ...]:
        """Return the expected share of assignments of each expert; exact up to quadrature, sums to 1."""
        self.params.check(experts, k)
        ranks, width = self.params.ranks, experts // self.params.ranks
        p_M = torch.tensor(self.params.popularity(experts, step)[:width], dtype=torch.float64) * ranks
        each, more = k // ranks, k % ranks
        expected_M = torch.zeros(width, dtype=torch.float64)
        for count, weight in ((each, ranks - more), (each + 1, more)):
            if count and weight:
                expected_M += weight / ranks * inclusion(p_M, count)
        return tuple((expected_M / k).tolist()) * ranks


# --- replay ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """What a replay did to the recorded assignments, and in one sentence why; see the parameters of ``replay``."""

    status: Literal["exact", "projected", "forced"]
    reason: str = ""


def exact_share(audits: Sequence[Audit]) -> Metric:
    """Return the share of a case's inputs that are the trace's own assignments, unchanged."""
    exact = sum(audit.status == "exact" for audit in audits)
    return Metric("replay_exact_share", exact / len(audits), "1", n=len(audits))


def told(audits: Sequence[Audit]) -> str:
    """Return in a phrase what a replay did to the trace; the inputs that it did most to stand for all."""
    most = max(audits, key=lambda audit: ("exact", "projected", "forced").index(audit.status))
    return f"replay {most.status}" + f": {most.reason}".removesuffix(".") * bool(most.reason)


@dataclass(frozen=True)
class _Shares(Forced):
    """A popularity as given."""

    shares: tuple[float, ...] = ()

    def popularity(self, experts: int, step: int) -> tuple[float, ...]:
        return self.shares


@dataclass(frozen=True)
class ReplayTraffic(GaussianTraffic):
    """Assignments of a trace; hidden states are gaussian."""

    params: Replay

    forced: ClassVar[bool] = True

    def routing(self, tokens: int, experts: int, k: int, step: int, seed: int, layer: int | None = None) -> Routing:
        """Return the Routing of ``step`` in the case's ``layer``; TraceError where ``fit`` does not allow it."""
        status = self.audit(tokens, experts, k, step, layer).status
        if status == "forced":
            return self._drawn(experts, step, layer).routing(tokens, experts, k, step, seed)
        entries = self._entries(step, layer)
        if status == "projected":
            return _projected(entries, tokens, experts, k)
        token_N, expert_N, weight_N = map(torch.from_numpy, (entries.token_N, entries.expert_N, entries.weight_N))
        return Routing(token_N, expert_N, weight_N.float(), (tokens, experts))

    def audit(self, tokens: int, experts: int, k: int, step: int, layer: int | None = None) -> Audit:
        """Return what ``routing`` does at these sizes."""
        if self.params.fit == "forced":
            return Audit("forced", "tokens draw by the recorded load, with equal weights.")
        entries = self._entries(step, layer)
        pairs = [
            ("tokens", entries.tokens, tokens, entries.tokens != tokens),
            ("experts", entries.most_expert + 1, experts, entries.most_expert >= experts),
            ("experts per token", entries.most_k, k, entries.most_k > k),
        ]
        changes = [f"{recorded} {what} where the case has {own}" for what, recorded, own, differs in pairs if differs]
        if not changes:
            return Audit("exact")
        reason = f"the trace has {' and '.join(changes)}"
        if self.params.fit == "exact":
            raise TraceError(f"{reason}; choose the same, or params.traffic.replay.fit=projected.")
        return Audit("projected", f"{reason}.")

    def requested(self, experts: int, k: int, step: int = 0, layer: int | None = None) -> tuple[float, ...]:
        """Return the recorded share of each expert; for ``forced`` the expected share of draws by it."""
        if self.params.fit == "forced":
            return self._drawn(experts, step, layer).requested(experts, k, step)
        return self.params.shares(experts, step, layer)

    def _entries(self, step: int, layer: int | None) -> Entries:
        return self.params.trace().at(step, self.params.place(layer))

    def _drawn(self, experts: int, step: int, layer: int | None) -> DrawnTraffic:
        return DrawnTraffic(_Shares(self.params.shares(experts, step, layer)))


def _projected(entries: Entries, tokens: int, experts: int, k: int) -> Routing:
    """Return the assignments with tokens repeated or cut, expert ids modulo E, and the heaviest k of each token."""
    kept_N = torch.from_numpy(entries.token_N < tokens)
    source_N = torch.from_numpy(entries.token_N)[kept_N]
    expert_N = torch.from_numpy(entries.expert_N)[kept_N] % experts
    weight_N = torch.from_numpy(entries.weight_N)[kept_N].float()
    source = min(entries.tokens, tokens)
    weight_SE = torch.zeros(source, experts).index_put((source_N, expert_N), weight_N, accumulate=True)
    there_SE = torch.zeros(source, experts, dtype=torch.bool)
    there_SE[source_N, expert_N] = True
    size_SK, indices_SK = weight_SE.abs().masked_fill(~there_SE, -1.0).topk(min(k, experts), dim=-1)
    weights_SK = weight_SE.gather(1, indices_SK)
    indices_SK = indices_SK.masked_fill(size_SK < 0, experts)
    source_T = torch.arange(tokens) % max(source, 1)
    return Routing.topk(indices_SK[source_T], weights_SK[source_T], experts)


def sticky(params: Sticky) -> StickyTraffic:
    """Return the traffic that keeps experts."""
    return StickyTraffic(params)


def domains(params: Domains) -> DomainsTraffic:
    """Return the traffic whose popular experts change, in every layer others."""
    return DomainsTraffic(params)


def rank_balanced(params: RankBalanced) -> RankBalancedTraffic:
    """Return the traffic of equal load per rank."""
    return RankBalancedTraffic(params)


def replay(params: Replay) -> ReplayTraffic:
    """Return the traffic of a trace."""
    return ReplayTraffic(params)
