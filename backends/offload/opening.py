"""Opening a session: the cache that parameters describe, the store that it drives, and an executor for each layer.

Imports no torch at module level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...contracts import ExecutedPath, LayerSpec, MoebenchError
from .. import plugins, rules
from ..session import Described
from .access import Access, Future, Key, Layout, slots_of
from .asking import Asking, Store
from .cache import Cache
from .costs import Curve, ExpertCosts
from .execution import LowBits
from .executor import Facts, OffloadExecutor
from .names import make_execution, make_policy, make_prefetcher, needs_costs
from .prefetch.known import Gate
from .session import OffloadSession

if TYPE_CHECKING:
    from ...moe.experts import Weight
    from .file import SlabFile
    from .host import HostExpert
    from .memory import Link

NO_COSTS = ExpertCosts(0.0, Curve.line(0, 0), Curve.line(0, 0))
"""Stands for costs where only names are checked."""


@dataclass(frozen=True)
class Opening:
    """Everything that a session is opened with beside its experts.

    ``described`` says what is known of each layer without weights. ``future`` are the accesses to come, for policies
    and prefetchers that look at them; ``on_access`` sees each access before it is served; ``costs`` are those by which
    executions decide, measured where they are needed and not given. ``popularity`` is how many tokens each expert had
    in a run beforehand, for policy ``static``. ``device`` is where slots of tier disk are.
    """

    layout: Layout
    described: Mapping[int, Described]
    specs: Mapping[int, LayerSpec]
    params: plugins.Offload
    future: Future | None = None
    on_access: Callable[[Access], None] | None = None
    costs: ExpertCosts | None = None
    device: str | Link = "cpu"
    popularity: Mapping[Key, float] | None = None

    def session(self, store: Store, cache: Cache, kernels: tuple[str, ...] = ()) -> OffloadSession:
        """Return a session on ``store``; ``kernels`` run beside those of the executors."""
        asking = Asking(self.layout, store, self.on_access)
        executors = {
            layer: OffloadExecutor(layer, self.described[layer], spec, asking) for layer, spec in self.specs.items()
        }
        quantized = any(rules.is_quantized(spec) for spec in self.specs.values())
        sparse = "mask" if any(spec.sparsity is not None for spec in self.specs.values()) else "none"
        path = ExecutedPath(
            "dequantized" if quantized else "dense",
            sparse,
            (*OffloadExecutor.kernels, *kernels),
            told(self.params, cache),
        )
        return OffloadSession(executors, path, asking, reads_hints=isinstance(cache.prefetcher, Gate))


def open_offload(
    file: SlabFile | Path | str,
    specs: Mapping[int, LayerSpec],
    params: plugins.Offload,
    future: Future | None = None,
    on_access: Callable[[Access], None] | None = None,
    described: Mapping[int, Described] | None = None,
    costs: ExpertCosts | None = None,
) -> OffloadSession:
    """Return a session on the experts in ``file``; see ``Opening`` for the other arguments.

    With ``params.tier`` disk nothing but the header is read before experts are asked for, beside those that the policy
    keeps from the start; with host all of them are.

    Raises:
        MoebenchError: the file is none or another model's, or the policy needs a future and there is none.
    """
    from .file import SlabFile

    file = file if isinstance(file, SlabFile) else SlabFile.open(file)
    check_layers(file.layout, specs)
    described = described_by(file, specs) if described is None else described
    opening = Opening(file.layout, described, specs, params, future, on_access, costs)
    if params.tier == "host":
        from .slabs import read_all

        return open_host(read_all(file), opening)
    return open_disk(file, opening)


def described_by(file: SlabFile, specs: Mapping[int, LayerSpec]) -> dict[int, Described]:
    """Return what a file and the specifications say of each layer."""
    return {
        layer: Facts(spec.kinds, file.activation, file.gated, None, rules.act_bits(spec))
        for layer, spec in specs.items()
    }


def open_disk(file: SlabFile, opening: Opening) -> OffloadSession:
    """Return a session on experts that are read from ``file`` when they are asked for."""
    from .store import SlotStore

    params = opening.params
    cache = make_cache(params, opening.layout, opening.future, popularity=opening.popularity)
    if isinstance(cache.execution, LowBits) and "low" not in file.forms:
        raise MoebenchError(f"{file.path} has no copies of few bits; write it with them (low=int4), or use fetch.")
    store = SlotStore(
        file,
        cache,
        io=params.io,
        readers=params.readers,
        staging=params.staging,
        device=opening.device,
        carry=True,
    )
    return opening.session(store, cache)


def open_host(weights: Mapping[Key, tuple[Weight, Weight]], opening: Opening) -> OffloadSession:
    """Return a session on experts that lie in RAM: ``weights`` are (gate_up, down) of each, packed or dense."""
    from .measuring import host_experts, measured

    spec, in_place = next(iter(opening.specs.values())), needs_costs(opening.params.execution)
    experts = host_experts(weights, spec, in_place)
    if in_place and opening.costs is None:
        described = next(iter(opening.described.values()))
        opening = replace(opening, costs=measured(list(experts.values()), described, spec))
    return session_on_host(experts, opening)


def session_on_host(experts: Mapping[Key, HostExpert], opening: Opening) -> OffloadSession:
    """Return a session on experts as RAM holds them; an execution that decides by costs finds them in ``opening``."""
    from .host import HostStore

    cache = make_cache(opening.params, opening.layout, opening.future, opening.costs, opening.popularity)
    kernels = dict.fromkeys(matrix.kernel for one in experts.values() for matrix in one.packed or ())
    return opening.session(HostStore(experts, cache, opening.params.readers), cache, tuple(kernels))


def check_layers(layout: Layout, specs: Mapping[int, LayerSpec]) -> None:
    """Raise MoebenchError where the specifications are of other layers or experts than there are."""
    if set(specs) != set(layout.layers):
        raise MoebenchError(f"the file has layers {list(layout.layers)}, not {sorted(specs)}; write it anew.")
    for layer, spec in specs.items():
        if spec.experts != layout.experts:
            raise MoebenchError(f"layer {layer} has {spec.experts} experts, the file {layout.experts}; write it anew.")


def make_cache(
    params: plugins.Offload,
    layout: Layout,
    future: Future | None = None,
    costs: ExpertCosts | None = None,
    popularity: Mapping[Key, float] | None = None,
) -> Cache:
    """Return the cache that ``params`` describe; its slots are a share of all experts, rounded down, at least one.

    Raises:
        MoebenchError: a name is unknown, two do not go together, or one needs a future and there is none.
    """
    if needs_costs(params.execution) and params.tier == "disk":
        raise MoebenchError(
            f"execution={params.execution} computes experts where they lie, which nobody can on a disk; use tier=host."
        )
    execution = make_execution(params.execution, costs)
    if isinstance(execution, LowBits) and params.tier == "host":
        raise MoebenchError(f"execution={params.execution} reads copies of few bits from a file; use tier=disk.")
    slots = max(1, slots_of(params.capacity, layout.size))
    policy, prefetcher = make_policy(params.policy, popularity), make_prefetcher(params.prefetch)
    for name, one in ((params.policy, policy), (params.prefetch, prefetcher)):
        if one is not None and one.needs_future and future is None:
            raise MoebenchError(f"{name} looks at accesses to come; use suite=offload, which replays a trace.")
    try:
        return Cache(policy, slots, layout, prefetcher, future, execution)
    except ValueError as error:
        raise MoebenchError(f"backend 'offload': {error}") from error


def told(params: plugins.Offload, cache: Cache) -> str:
    """Return how a session runs, in words."""
    where = (
        f"the others read from a file (io={params.io})"
        if params.tier == "disk"
        else "the others in RAM as they are stored"
    )
    how: dict[str, Any] = {name: getattr(params, name) for name in ("policy", "prefetch", "execution", "readers")}
    names = ", ".join(f"{name}={value}" for name, value in how.items())
    return f"{cache.capacity} of {cache.layout.size} experts in slots, {where}; {names}"
