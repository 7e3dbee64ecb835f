"""Made-up traces with known statistics: popularity, stickiness, domains that change. Imports no torch; numpy alone.

All are one router with random logits. At step s, in layer l, token t has a score for each expert e,

    score[s, l, t, e] = log p[s, l, e] + G,    G standard Gumbel, independent,

takes the k experts of the largest scores, and weighs them by the softmax of these k scores. So the first expert is e
with probability p[e], the next ones follow without replacement (Plackett-Luce), and weights sum to 1. What differs is
p, and which scores are drawn anew. Everything is a function of the parameters, ``seed`` among them.

Shape letters: S steps, L layers, T tokens of a step, E experts, K experts of a token, D domains, M popular experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...contracts import plain
from ..models import substream
from ..trace import Trace, trace_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Real = NDArray[np.float64]
    Whole = NDArray[np.int64]

MOST_ROWS = 20_000_000
"""Of a trace: some gigabytes while it is made."""


@dataclass(frozen=True)
class MadeUp(ABC):
    """Sizes: ``steps`` of ``tokens`` tokens each, which take ``k`` of the ``experts`` of each of ``layers`` layers."""

    steps: int = 256
    layers: int = 16
    experts: int = 64
    k: int = 8
    tokens: int = 1
    seed: int = 0

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if min(self.steps, self.layers, self.tokens) < 1 or not 0 < self.k <= self.experts:
            raise ValueError("steps, layers and tokens must be positive, and k lie between 1 and experts.")
        scores = self.layers * self.tokens * self.experts
        if scores > MOST_ROWS:
            raise ValueError(f"a step would draw {scores} scores, and {MOST_ROWS} may be drawn; choose fewer experts.")
        rows = self.steps * self.layers * self.tokens * self.k
        if rows > MOST_ROWS:
            raise ValueError(f"the trace would have {rows} rows, and {MOST_ROWS} may be made up; choose fewer steps.")

    def trace(self) -> Trace:
        """Return the trace."""
        return trace_of(self.columns())

    def columns(self) -> dict[str, Any]:
        """Return the columns of the trace; a token's experts come in the order of their weights, the largest first."""
        import numpy as np

        expert_SLTK, score_SLTK = self.chosen()
        order_SLTK = np.argsort(-score_SLTK, axis=-1, kind="stable")
        expert_SLTK = np.take_along_axis(expert_SLTK, order_SLTK, -1)
        score_SLTK = np.take_along_axis(score_SLTK, order_SLTK, -1)
        raised_SLTK = np.exp(score_SLTK - score_SLTK[..., :1])
        step, layer, token, _ = np.indices(expert_SLTK.shape, dtype=np.int64)
        return {
            "step": step.ravel(),
            "layer": layer.ravel(),
            "token": token.ravel(),
            "expert": expert_SLTK.ravel(),
            "weight": (raised_SLTK / raised_SLTK.sum(-1, keepdims=True)).ravel(),
            "tokens": np.full(expert_SLTK.size, self.tokens, dtype=np.int64),
        }

    def facts(self) -> dict[str, Any]:
        """Return what a file of the trace should say of how it was made."""
        return {"made": f"made up: {self.name}", "parameters": plain(self), "experts": self.experts}

    @abstractmethod
    def chosen(self) -> tuple[Whole, Real]:
        """Return experts and their scores, [S, L, T, K] each."""

    def _rng(self, name: str) -> np.random.Generator:
        """Return the generator of a stream of its own: what one draws changes nothing of the others."""
        import numpy as np

        return np.random.default_rng(substream(self.seed, "trace", type(self).__name__, name))

    def _shuffled(self, name: str) -> Whole:
        """Return an order of the experts for each layer, [L, E] int64."""
        import numpy as np

        order_LE = np.tile(np.arange(self.experts), (self.layers, 1))
        return self._rng(name).permuted(order_LE, axis=1)

    def _draw(self, rng: np.random.Generator, log_p_LE: Real) -> tuple[Whole, Real]:
        """Return the experts of the k largest fresh scores, in their order, and these scores, [L, T, K] each."""
        score_LTE = log_p_LE[..., None, :] + rng.gumbel(size=(self.layers, self.tokens, self.experts))
        return _best(score_LTE, self.k)


@dataclass(frozen=True)
class ZipfTrace(MadeUp):
    """Some experts are popular, and every token draws alone.

    p[l, e] is proportional to r ** -alpha, r the rank of e (from 1) in an order that each layer has for itself, by
    chance. alpha = 0 is uniform.
    """

    alpha: float = 1.0

    name: ClassVar[str] = "zipf"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha(self.alpha)

    def chosen(self) -> tuple[Whole, Real]:
        """Return experts and their scores, [S, L, T, K] each."""
        import numpy as np

        rng, log_p_LE = self._rng("draws"), _zipf(self._shuffled("ranks"), self.alpha)
        drawn = [self._draw(rng, log_p_LE) for _ in range(self.steps)]
        return np.stack([experts for experts, _ in drawn]), np.stack([scores for _, scores in drawn])


@dataclass(frozen=True)
class StickyTrace(MadeUp):
    """Decoding: place t of every step is the same sequence, which keeps experts from step to step.

    A sequence keeps each of its experts, with its score, with probability ``stay``, all independently; those that it
    does not keep are replaced by as many that it did not have, drawn by fresh scores. So the number kept is binomial
    (k, stay) exactly, of which the mean is ``stay`` k. The first step draws as in ``ZipfTrace`` with ``alpha``. With
    alpha = 0 every expert is equally likely at every step; with another, replacing evens popularity out somewhat.
    """

    stay: float = 0.8
    alpha: float = 0.0

    name: ClassVar[str] = "sticky"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha(self.alpha)
        if not 0 <= self.stay <= 1:
            raise ValueError(f"stay={self.stay} must lie in [0, 1].")
        if self.stay < 1 and self.experts < 2 * self.k:
            raise ValueError(
                f"experts={self.experts} must be at least twice k={self.k}, so that all experts of a token can be "
                "replaced; choose a smaller k, or stay=1."
            )

    def chosen(self) -> tuple[Whole, Real]:
        """Return experts and their scores, [S, L, T, K] each."""
        import numpy as np

        rng, log_p_LE = self._rng("draws"), _zipf(self._shuffled("ranks"), self.alpha)
        expert_LTK, score_LTK = self._draw(rng, log_p_LE)
        steps = [(expert_LTK, score_LTK)]
        for _ in range(1, self.steps):
            new_LTK = rng.random(expert_LTK.shape) >= self.stay
            fresh_LTE = log_p_LE[:, None, :] + rng.gumbel(size=(self.layers, self.tokens, self.experts))
            np.put_along_axis(fresh_LTE, expert_LTK, -np.inf, axis=-1)
            best_LTK, best_score_LTK = _best(fresh_LTE, self.k)
            slot_LTK = np.maximum(np.cumsum(new_LTK, axis=-1) - 1, 0)  # the how manieth of those that are replaced
            expert_LTK = np.where(new_LTK, np.take_along_axis(best_LTK, slot_LTK, -1), expert_LTK)
            score_LTK = np.where(new_LTK, np.take_along_axis(best_score_LTK, slot_LTK, -1), score_LTK)
            steps.append((expert_LTK, score_LTK))
        return np.stack([experts for experts, _ in steps]), np.stack([scores for _, scores in steps])


@dataclass(frozen=True)
class DomainTrace(MadeUp):
    """Text that changes its domain, or a model that changes its task (M3ViT): each has popular experts of its own.

    The domain z[s] is uniform at first. At steps ``period``, 2 ``period``, ... it changes with probability ``switch``
    to one of the others, each as likely; in between it stays. In layer l domain d has ``popular`` popular experts
    B[l, d] (0: experts // domains). Where ``disjoint``, no two domains share one: an order of the experts by chance is
    dealt in blocks; else each B[l, d] is a subset by chance for itself. Then

        p[s, l, e] = share / M for e in B[l, z[s]], and (1 - share) / (E - M) for all others.

    With share = 1 no other expert is ever asked for. The file's facts say the domain of each step (``tasks``).
    """

    domains: int = 4
    period: int = 32
    switch: float = 1.0
    popular: int = 0
    share: float = 0.9
    disjoint: bool = True

    name: ClassVar[str] = "domains"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.domains * self.layers * self.experts > MOST_ROWS:
            raise ValueError(f"domains={self.domains} are too many for so many experts; choose fewer.")
        if self.domains < 1 or self.period < 1:
            raise ValueError(f"domains={self.domains} and period={self.period} must be at least 1.")
        if not 0 <= self.switch <= 1 or not 0 < self.share <= 1:
            raise ValueError(f"switch={self.switch} must lie in [0, 1], and share={self.share} in (0, 1].")
        if not 0 <= self.popular <= self.experts or not self.size:
            raise ValueError(f"popular={self.popular} must lie between 1 and experts={self.experts}.")
        if self.disjoint and self.size * self.domains > self.experts:
            raise ValueError(
                f"{self.domains} domains of {self.size} experts each need {self.domains * self.size} of "
                f"{self.experts}; choose a smaller popular, or disjoint=false."
            )
        if self.share == 1 and self.size < self.k:
            raise ValueError(
                f"with share=1 a token takes k={self.k} of the {self.size} popular experts; choose a larger popular."
            )

    @property
    def size(self) -> int:
        """How many popular experts a domain has in a layer."""
        return self.popular or self.experts // self.domains

    def tasks(self) -> tuple[int, ...]:
        """Return the domain of each step."""
        rng = self._rng("domains")
        now = int(rng.integers(self.domains))
        found = []
        for step in range(self.steps):
            if step and step % self.period == 0 and rng.random() < self.switch and self.domains > 1:
                now = (now + 1 + int(rng.integers(self.domains - 1))) % self.domains
            found.append(now)
        return tuple(found)

    def popular_DLM(self) -> Whole:
        """Return the popular experts of each domain in each layer."""
        import numpy as np

        if self.disjoint:
            order_LE = self._shuffled("popular")
            blocks = [order_LE[:, self.size * d : self.size * (d + 1)] for d in range(self.domains)]
        else:
            blocks = [self._shuffled(f"popular {d}")[:, : self.size] for d in range(self.domains)]
        return np.stack(blocks)

    def facts(self) -> dict[str, Any]:
        """Return what a file of the trace should say of how it was made."""
        return {**super().facts(), "tasks": self.tasks()}

    def chosen(self) -> tuple[Whole, Real]:
        """Return experts and their scores, [S, L, T, K] each."""
        import numpy as np

        rest = (1 - self.share) / max(self.experts - self.size, 1)
        log_p_DLE = np.full((self.domains, self.layers, self.experts), np.log(rest) if rest else -np.inf)
        np.put_along_axis(log_p_DLE, self.popular_DLM(), np.log(self.share / self.size), axis=-1)
        rng = self._rng("draws")
        drawn = [self._draw(rng, log_p_DLE[task]) for task in self.tasks()]
        return np.stack([experts for experts, _ in drawn]), np.stack([scores for _, scores in drawn])


KINDS: Mapping[str, type[MadeUp]] = {kind.name: kind for kind in (ZipfTrace, StickyTrace, DomainTrace)}
"""Made-up traces by name."""


def _best(score_LTE: Real, k: int) -> tuple[Whole, Real]:
    """Return the experts of the k largest scores, in their order, and these scores."""
    import numpy as np

    expert_LTK = np.argsort(-score_LTE, axis=-1, kind="stable")[..., :k].astype(np.int64)
    return expert_LTK, np.take_along_axis(score_LTE, expert_LTK, -1)


def _zipf(order_LE: Whole, alpha: float) -> Real:
    """Return log p, [L, E] float64, up to a constant: the expert in place r - 1 of a layer's order has rank r."""
    import numpy as np

    log_p_LE = np.empty(order_LE.shape)
    ranked_LE = np.broadcast_to(-alpha * np.log(np.arange(1, order_LE.shape[1] + 1)), order_LE.shape)
    np.put_along_axis(log_p_LE, order_LE, ranked_LE, axis=-1)
    return log_p_LE


def _check_alpha(alpha: float) -> None:
    if alpha < 0:
        raise ValueError(f"alpha={alpha} must not be negative; 0 is uniform.")
