"""Policies, prefetchers and executions by name: ``NAME`` or ``NAME:ARGUMENT``. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar, get_args

from ...contracts import MoebenchError, unknown
from .access import Key
from .cache import Execution, Prefetcher
from .costs import ExpertCosts
from .execution import Deferral, DuplexSplit, Fiddler, InPlace, LowBits, Objective
from .policies.base import CachePolicy
from .policies.frequency import LFRU, LFU
from .policies.lookahead import Belady, Windowed
from .policies.placement import CpuMoe, Pattern, Static
from .policies.recency import LRU, LRUK, PerLayer
from .policies.scored import ActivationPriority, MixedScore
from .prefetch.known import Gate, Oracle, Pregate
from .prefetch.learned import Frequency, Nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """What some of those that are made look at, besides their argument."""

    popularity: Mapping[Key, float] | None = None
    costs: ExpertCosts | None = None


@dataclass(frozen=True)
class Named(Generic[T]):
    """A name's meaning, how its argument is read (None: it takes none; ``needed``: it must have one), and the maker."""

    summary: str
    make: Callable[..., T]
    argument: Callable[[str], object] | None = None
    needed: bool = False
    takes: str | None = None  # the field of Given that it is made from


def _weights(text: str) -> tuple[float, ...]:
    weights = tuple(float(part) for part in text.split("/"))
    if len(weights) != 4:
        raise ValueError("four weights are wanted, as in 1/1/1/1")
    return weights


def _objective(text: str) -> Objective:
    for objective in get_args(Objective):
        if text == objective:
            return objective  # type: ignore[no-any-return]
    raise ValueError("sum or max is wanted")


def _belady(window: int | None = None) -> CachePolicy:
    return Belady() if window is None else Windowed(window)


_POLICIES: dict[str, Named[CachePolicy]] = {
    "lru": Named("drops the least recently used", LRU),
    "lru_k": Named("drops the one whose K-th last use is the oldest (lru_k:2)", LRUK, int),
    "lfu": Named("drops the least frequently used; counts halve every N steps (lfu:16)", LFU, float),
    "lfru": Named("drops the least frequency x recency", LFRU),
    "per_layer": Named("one LRU a layer, slots divided evenly (mixtral-offloading)", PerLayer),
    "static": Named("keeps the most popular experts, without change", Static, takes="popularity"),
    "cpu_moe": Named("the first N decoder layers stay in the slow tier (cpu_moe:N), as with llama.cpp", CpuMoe, int),
    "pattern": Named("layers whose tensor names match stay in the slow tier (pattern:REGEX)", Pattern, str, True),
    "eam": Named("MoE-Infinity's priority; a matrix is finished every N steps (eam:16)", ActivationPriority, int),
    "hobbit": Named("HOBBIT's weights of LRU/LFU/LHU/FLD (hobbit:1/1/1/1)", MixedScore, _weights),
    "belady": Named("drops the one used the furthest away, within W accesses if given (belady:W)", _belady, int),
}

_PREFETCHERS: dict[str, Named[Prefetcher | None]] = {
    "none": Named("brings nobody ahead", lambda: None),
    "gate": Named("the next layer's gate on this layer's input (mixtral-offloading)", Gate),
    "eam": Named("the next N layers in the nearest activation matrix (eam:1; MoE-Infinity)", Nearest, int),
    "frequency": Named("the most frequent experts of the next N layers (frequency:1)", Frequency, int),
    "pregate": Named("exactly the next N layers of the step (pregate:1; Read-ME)", Pregate, int),
    "oracle": Named("exactly the next N accesses (oracle:1)", Oracle, int),
}

_EXECUTIONS: dict[str, Named[Execution | None]] = {
    "fetch": Named("every missing expert is brought", lambda: None),
    "in_place": Named("every missing expert is computed where it lies", InPlace, takes="costs"),
    "fiddler": Named(
        "computed where it lies if that is faster (fiddler:sum, fiddler:max)", Fiddler, _objective, takes="costs"
    ),
    "duplex": Named("few tokens are computed where the expert lies, many are not", DuplexSplit, takes="costs"),
    "hobbit": Named("unimportant experts come in few bits, beyond share T (hobbit:0.6)", LowBits, float),
    "defer": Named("at most N of the least weight are added one layer later (defer:2; KTransformers)", Deferral, int),
}

POLICIES: Mapping[str, str] = {name: one.summary for name, one in _POLICIES.items()}
PREFETCHERS: Mapping[str, str] = {name: one.summary for name, one in _PREFETCHERS.items()}
EXECUTIONS: Mapping[str, str] = {name: one.summary for name, one in _EXECUTIONS.items()}


def make_policy(spec: str, popularity: Mapping[Key, float] | None = None) -> CachePolicy:
    """Return a new policy; ``popularity`` is how often each expert was asked for in a run beforehand (``static``)."""
    return _make("policy", spec, _POLICIES, Given(popularity=popularity))


def make_prefetcher(spec: str) -> Prefetcher | None:
    """Return a new prefetcher; None for ``none``."""
    return _make("prefetcher", spec, _PREFETCHERS, Given())


def make_execution(spec: str, costs: ExpertCosts | None = None) -> Execution | None:
    """Return a new execution; None for ``fetch``. ``fiddler`` and ``duplex`` decide by ``costs``."""
    return _make("execution", spec, _EXECUTIONS, Given(costs=costs))


def needs_costs(spec: str) -> bool:
    """Return whether an execution decides by costs, which must then be measured."""
    return _find("execution", spec, _EXECUTIONS)[0].takes == "costs"


def _find(what: str, spec: str, known: Mapping[str, Named[T]]) -> tuple[Named[T], str | None]:
    name, colon, text = spec.partition(":")
    if name not in known:
        raise MoebenchError(unknown(what, name, known))
    return known[name], text if colon else None


def _make(what: str, spec: str, known: Mapping[str, Named[T]], given: Given) -> T:
    named, text = _find(what, spec, known)
    if text is None and named.needed:
        raise MoebenchError(f"{what} '{spec}' lacks its argument: {named.summary}.")
    if text is not None and named.argument is None:
        raise MoebenchError(f"{what} '{spec}' takes no argument; leave out ':{text}'.")
    arguments = [] if named.takes is None else [getattr(given, named.takes)]
    if named.takes == "costs" and given.costs is None:
        raise MoebenchError(f"{what} '{spec}' decides by costs of this machine; measure or give them.")
    try:
        if text is not None and named.argument is not None:
            arguments.append(named.argument(text))
        return named.make(*arguments)
    except ValueError as error:
        raise MoebenchError(f"{what} '{spec}': {str(error).rstrip('.')}; {named.summary}.") from error
