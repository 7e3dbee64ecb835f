"""From a configuration to cases: the product (or the pairs) of the axes, each checked before any time is spent.

Imports no torch; everything here runs in the parent process.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..contracts import (
    NAMED_AXES,
    OWNERS,
    Availability,
    Case,
    Choice,
    Evidence,
    Execution,
    LayerSpec,
    MoebenchError,
    Planned,
    Refusal,
    Registry,
    Scheme,
    SparsitySpec,
    measured_on,
)
from ..moe.shapes import ModelShape
from .cold import cold_copies, copies_key, rotated, touched_share
from .device import device_refusal

ELEMENT_SIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes per element of the dtypes that a case may have."""

PLAIN_AXES: dict[str, tuple[Any, ...] | type] = {
    "tokens": int,
    "dtype": tuple(ELEMENT_SIZE),
    "pass": ("forward", "forward_backward"),
    "boundary": ("logits", "topk", "sorted"),
    "threads": int,
    "residency": ("auto", "cold", "warm"),
}
"""The axes whose values are no plug-ins: the allowed values, or the type of a positive number."""


DECODE_TOKENS = 16
"""Up to this many tokens a case counts as decode, whose weights are cold by default."""

MAX_COPIES = 1024
"""So many copies of a layer's weights are rotated at most to keep them out of the caches."""

NONE = Choice("none")
"""A named axis that is left alone."""


@dataclass(frozen=True)
class SuiteConfig:
    """What a suite needs to declare its cases, resolved from the command line by ``bench``.

    ``axes`` maps every axis to its values: Choices for the named ones. ``layers`` is ``all``, ``moe``, a list of
    decoder indices, or None for the suite's default. ``suite_params`` is the suite's own parameter object.
    """

    suite: str
    suite_version: str
    suite_params: Any
    axes: Mapping[str, Sequence[Any]]
    layers: str | Sequence[int] | None = None
    combine: str = "product"
    seed: int = 0
    calibration: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    cuda_graph: bool = False
    memory_bytes: float = float("inf")
    cache_bytes: float = 64 * 2**20


@dataclass(frozen=True)
class Kind:
    """How a suite turns a point of the product into cases: one per layer or one per model, timed or once.

    ``devices`` are those on which its trials put tensors. A suite that ``foresees`` replays a trace, so that backends
    may look at what is to come.
    """

    protocol: str
    per_layer: bool = True
    backend_free: bool = False
    workload: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu",)
    foresees: bool = False


def expand(config: SuiteConfig, registry: Registry, kind: Kind) -> Iterator[Planned]:
    """Yield every case of the configuration, refused ones included, each case once."""
    points = [dict(zip(config.axes, values, strict=True)) for values in itertools.product(*config.axes.values())]
    planner = _Planner(config, registry, kind)
    planned: list[tuple[dict[str, Any], Planned]] = []
    for point in points:
        planned.extend((point, item) for item in planner.plan(point))
    if config.combine == "pairs":
        planned = covering_pairs(planned)
    seen: set[str] = set()
    for _, item in planned:
        if item.case.case_key not in seen:
            seen.add(item.case.case_key)
            yield item


def covering_pairs(planned: Sequence[tuple[dict[str, Any], Planned]]) -> list[tuple[dict[str, Any], Planned]]:
    """Choose few cases such that every pair of axis values that can run together does so in one of them.

    Greedy: take the runnable case that covers most pairs still open. A pair that no runnable case has is kept as one
    refused case, so that it is told rather than lost.
    """

    def pairs(point: Mapping[str, Any]) -> set[tuple[str, str]]:
        values = [f"{axis}={value!r}" for axis, value in point.items()]
        return set(itertools.combinations(values, 2))

    chosen: list[tuple[dict[str, Any], Planned]] = []
    open_pairs: set[tuple[str, str]] = set().union(*(pairs(point) for point, _ in planned)) if planned else set()
    for runnable in (True, False):
        rest = [(entry, pairs(entry[0])) for entry in planned if (entry[1].refusal is None) == runnable]
        while open_pairs and rest:
            entry, covered = max(rest, key=lambda item: len(item[1] & open_pairs))
            if not covered & open_pairs:
                break
            chosen.append(entry)
            open_pairs -= covered
            rest = [item for item in rest if item[0] is not entry]
    return chosen


class _Planner:
    """Resolves points of the product; remembers what backends said of availability."""

    def __init__(self, config: SuiteConfig, registry: Registry, kind: Kind) -> None:
        self.config, self.registry, self.kind = config, registry, kind
        self._available: dict[str, Availability] = {}

    def plan(self, point: Mapping[str, Any]) -> Iterator[Planned]:
        """Yield the cases of one point: one per layer, or one for the whole selection."""
        model = self.registry.params("model", point["model"])
        try:
            shape = self._reshape(point, model.shape())
        except ValueError as error:
            yield Planned(self._case(point, model, (0,)), f"{error}.")
            return
        layers = select_layers(self.config.layers, shape, self.kind.per_layer)
        for chosen in [(layer,) for layer in layers] if self.kind.per_layer else [layers]:
            case = self._case(point, model, chosen)
            yield self._checked(case, point, model, shape)

    def _reshape(self, point: Mapping[str, Any], shape: ModelShape) -> ModelShape:
        structure = self.registry.params("structure", point["structure"])
        reshaped: ModelShape = structure.reshape(shape)
        return reshaped

    def _case(self, point: Mapping[str, Any], model: Any, layers: tuple[int, ...]) -> Case:
        config = self.config
        named = {axis: point[axis] for axis in NAMED_AXES}
        descriptor = self.registry.get("backend", point["backend"].name)
        return Case(
            suite=config.suite,
            suite_version=config.suite_version,
            protocol=self.kind.protocol,  # type: ignore[arg-type]
            layers=layers,
            tokens=point["tokens"],
            dtype=point["dtype"],
            pass_=point["pass"],
            boundary=point["boundary"],
            threads=point["threads"],
            device=config.device,
            residency=residency_of(point),
            evidence=measured_on(config.device),
            seed=config.seed,
            weights_sha256=model.weights_sha256(),
            base=model.base(),
            calibration=config.calibration,
            workload=self._workload(point),
            environment=dict(descriptor.environment),
            **named,
        )

    def _workload(self, point: Mapping[str, Any]) -> dict[str, Any]:
        workload = dict(self.kind.workload)
        cold = residency_of(point) == "cold"
        if self.kind.protocol == "timed" and self.config.device != "cpu":
            workload |= {"l2": "flushed" if cold else "kept", "cuda_graph": self.config.cuda_graph}
        elif self.kind.protocol == "timed" and cold:
            workload["cache_bytes"] = self.config.cache_bytes
        return workload

    def _checked(self, case: Case, point: Mapping[str, Any], model: Any, shape: ModelShape) -> Planned:
        refusal = model.missing() or device_refusal(case, self.config.cuda_graph, self.kind.devices)
        refusal = refusal or threads_refusal(case.threads)
        if refusal:
            return Planned(case, refusal)
        size = shape.expert_bytes(ELEMENT_SIZE[case.dtype])
        needed = 3.0 * size
        if needed > self.config.memory_bytes:
            return Planned(case, memory_refusal(shape, case.dtype, needed, self.config.memory_bytes))
        try:
            spec = layer_spec(case, shape, self.registry)
        except ValueError as error:
            return Planned(case, f"{error}.")
        coded = bool(spec.schemes) and spec.schemes[0].codec != "none"
        stored = size * min(1.0, spec.schemes[0].bits / (8.0 * ELEMENT_SIZE[case.dtype])) if coded else size
        refusal = attention_refusal(case, spec) or self._traffic_refusal(case, model, spec)
        refusal = refusal or self._scope_refusal(case, shape)
        refusal = refusal or self._cold_refusal(case, spec, stored)
        if refusal:
            return Planned(case, refusal)
        answer, evidence = self._execution(case, spec)
        if isinstance(answer, Refusal):
            return Planned(case, answer.reason)
        case = replace(case, execution=answer, evidence=evidence)
        cold, weights = rotated(case), copies_key(case, spec)
        copies = cold_copies(self.config.cache_bytes, stored, touched_share(spec)) if cold else 0
        form = self._own_form(case, spec)
        views = answer.weights == "dense" and case.pass_ == "forward" and not form
        own = 0.0 if views else stored if answer.weights == "packed" else size
        return Planned(
            case,
            method_bytes=needed,
            own_bytes=own * max(1, copies),
            own_key=f"{weights} {case.backend} {form}" if form else "",
            copies_bytes=stored * copies,
            copies_key=weights,
        )

    def _own_form(self, case: Case, spec: LayerSpec) -> str:
        """Return the name of the form into which the backend copies dense weights, or nothing where it does not."""
        if self.kind.backend_free:
            return ""
        backend = self.registry.get("backend", case.backend.name).create(case.backend.params)
        return str(backend.own_form(spec)) if hasattr(backend, "own_form") else ""

    def _traffic_refusal(self, case: Case, model: Any, spec: LayerSpec) -> str | None:
        traffic = self.registry.params("traffic", case.traffic)
        if traffic.recorded and not model.recorded:
            return f"model '{case.model}' has no recorded hidden states; use axes.traffic=gaussian."
        if not traffic.forced:
            return None
        if spec.selection is None or case.boundary == "logits":
            return f"traffic '{case.traffic}' forces top-k, which this case leaves to the router; use another traffic."
        try:
            traffic.check(spec.experts, spec.max_k)
            traffic.check_place(case.tokens, case.layers[0])
        except ValueError as error:
            return f"traffic '{case.traffic}': {error}"
        return None

    def _scope_refusal(self, case: Case, shape: ModelShape) -> str | None:
        """Ask a quantization whose budget reaches beyond a layer whether it covers what the case runs, and a sparsity
        that reaches beyond it whether the suite runs that."""
        params = self.registry.params("quantization", case.quantization)
        asked = getattr(params, "refusal", None)
        why: str | None = None if asked is None else asked(case.layers, shape.moe_layers, not self.kind.per_layer)
        if why is not None:
            return f"quantization '{case.quantization}': {why}."
        return sparsity_refusal(case, self.registry, not self.kind.per_layer)

    def _cold_refusal(self, case: Case, spec: LayerSpec, layer_bytes: float) -> str | None:
        if not rotated(case):
            return None
        copies = cold_copies(self.config.cache_bytes, layer_bytes, touched_share(spec))
        needed = copies * layer_bytes
        if copies > MAX_COPIES or 2 * needed > self.config.memory_bytes:
            return (
                f"cold weights need {copies} copies of a layer of {layer_bytes / 2**20:.2f} MiB, of which a call reads "
                f"{touched_share(spec):.0%}, to pass a last-level cache of {self.config.cache_bytes / 2**20:.0f} MiB, "
                f"more than can be held; use axes.residency=warm."
            )
        return None

    def _execution(self, case: Case, spec: LayerSpec) -> tuple[Execution | Refusal, Evidence]:
        """Ask the backend how it would run the layer; one that cannot even be asked costs its own cases alone."""
        if self.kind.backend_free:
            return Execution(), case.evidence
        try:
            return self._asked(case, spec)
        except Exception as error:
            reason = f"backend '{case.backend}' could not be asked ({type(error).__name__}: {error}); mend the plug-in."
            return Refusal(reason), case.evidence

    def _asked(self, case: Case, spec: LayerSpec) -> tuple[Execution | Refusal, Evidence]:
        backend = self.registry.get("backend", case.backend.name).create(case.backend.params)
        if case.backend.name not in self._available:
            self._available[case.backend.name] = backend.availability()
        available = self._available[case.backend.name]
        if not available.available:
            return Refusal(f"backend '{case.backend}' is not available: {available.reason}"), case.evidence
        if case.device not in available.devices:
            return Refusal(f"backend '{case.backend}' does not run on {case.device}."), case.evidence
        evidence = available.evidence_on(case.device)
        if case.protocol == "timed" and not evidence.measured:
            return Refusal(f"backend '{case.backend}' is not timed here: {available.reason}"), evidence
        backend = backend.foreseeing() if self.kind.foresees and hasattr(backend, "foreseeing") else backend
        answer = backend.supports(spec)
        if isinstance(answer, Refusal) and set(spec.kinds) - {"ffn"} <= {"zero", "copy", "constant"}:
            inner = backend.supports(spec.folded())
            answer = replace(inner, folded=True) if isinstance(inner, Execution) else inner
        return answer, evidence


def attention_refusal(case: Case, spec: LayerSpec) -> str | None:
    """Return why a structure's attentions cannot be run as the experts that the routing takes them for, or None."""
    if not spec.heads or set(spec.kinds) == {"sequence"}:
        return None
    return (
        f"structure '{case.structure}' makes attentions and routing '{case.routing}' wants FFN experts; use "
        f"axes.routing=bam, or another structure."
    )


def sparsity_refusal(case: Case, registry: Registry, whole_model: bool) -> str | None:
    """Return why a suite that runs the ``whole_model``, or layers alone, cannot run a case's sparsity, or None."""
    asked = getattr(registry.params("sparsity", case.sparsity), "refusal", None)
    why: str | None = None if asked is None else asked(whole_model)
    return None if why is None else f"sparsity '{case.sparsity}': {why}."


def threads_refusal(threads: int) -> str | None:
    """Return why so many threads cannot each have a core of their own here, or None."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{threads} threads do not fit on the {cores} cores here; lower axes.threads." if threads > cores else None


def residency_of(point: Mapping[str, Any]) -> Literal["cold", "warm"]:
    """Return the residency of a point: ``auto`` is cold for decode and warm otherwise."""
    residency: Literal["cold", "warm", "auto"] = point["residency"]
    if residency != "auto":
        return residency
    return "cold" if point["tokens"] <= DECODE_TOKENS and point["pass"] == "forward" else "warm"


def memory_refusal(shape: ModelShape, dtype: str, needed: float, limit: float) -> str:
    """Return the sentence with the arithmetic of a layer that does not fit."""
    return (
        f"does not fit: {shape.experts} experts x {shape.matrices} x {shape.hidden} x {shape.width} x "
        f"{ELEMENT_SIZE[dtype]} bytes x 3 (weights, the backend's form, working space) = {needed / 2**30:.1f} GiB, "
        f"and {limit / 2**30:.1f} GiB may be used; choose a smaller model or dtype."
    )


def select_layers(wanted: str | Sequence[int] | None, shape: ModelShape, per_layer: bool) -> tuple[int, ...]:
    """Return decoder indices; the default is the middle MoE layer for layer cases, all of them for model cases."""
    if wanted is None:
        return (shape.moe_layers[len(shape.moe_layers) // 2],) if per_layer else shape.moe_layers
    if wanted in ("all", "moe"):
        return shape.moe_layers
    if isinstance(wanted, str):
        raise MoebenchError(f"model.layers={wanted} is not understood: give all, moe or a list such as [3,7].")
    absent = [layer for layer in wanted if layer not in shape.moe_layers]
    if absent:
        raise MoebenchError(f"model.layers: layer {absent[0]} holds no experts; choose from {list(shape.moe_layers)}.")
    return tuple(wanted)


def layer_spec(case: Case, shape: ModelShape, registry: Registry) -> LayerSpec:
    """Return what a backend must know of the case's layer; ValueError where the combination is impossible.

    ``shape`` is the model's shape after its structure.
    """
    routing = registry.params("routing", case.routing)
    scheme = scheme_of(case, shape, registry)
    sparsity: SparsitySpec | None = registry.params("sparsity", case.sparsity).spec()
    kinds = routing.kinds(shape)
    selection = routing.selection(shape)
    if case.boundary == "logits" and selection is None:
        raise ValueError(f"routing '{case.routing}' cannot be handed over as logits; use axes.boundary=topk")
    for channels in (shape.hidden, shape.width):
        if scheme.group and channels % scheme.group:
            raise ValueError(f"groups of {scheme.group} do not divide the {channels} channels of the experts")
    _check_rescaled(case, kinds, registry)
    if "sequence" in kinds and sparsity is not None:
        raise ValueError("attentions have no activations to leave out; use axes.sparsity=none")
    if case.pass_ == "forward_backward":
        _check_training(case, kinds, scheme, sparsity)
    return LayerSpec(
        hidden=shape.hidden,
        width=shape.width,
        kinds=kinds,
        dtype=case.dtype,
        activation=shape.activation,
        gated=shape.gated,
        schemes=(scheme,) * sum(kind in OWNERS for kind in kinds),
        sparsity=sparsity,
        boundary=case.boundary,
        selection=selection,
        backward=case.pass_ == "forward_backward",
        max_k=routing.max_k(shape),
        tokens=case.tokens,
        heads=shape.heads,
    )


def _check_rescaled(case: Case, kinds: Sequence[str], registry: Registry) -> None:
    """Raise ValueError where inputs are to be rescaled for experts that would hand the factor on."""
    for axis in ("structure", "quantization"):
        choice: Choice = getattr(case, axis)
        if getattr(registry.params(axis, choice), "rescales", False) and set(kinds) != {"ffn"}:
            raise ValueError(
                f"{axis} '{choice}' rescales what experts read, and routing '{case.routing}' has others than FFNs, "
                f"which would not undo it; use axes.routing=topk"
            )


def scheme_of(case: Case, shape: ModelShape, registry: Registry) -> Scheme:
    """Return how the experts are stored: as the quantization says, or, ``as_stored``, as the model's file does.

    Raises ValueError where the model has no such file, or the structure would cut its blocks.
    """
    params = registry.params("quantization", case.quantization)
    if not getattr(params, "as_stored", False):
        scheme: Scheme = params.scheme()
        return scheme
    model = registry.params("model", case.model)
    if not hasattr(model, "stored_scheme"):
        raise ValueError(f"model '{case.model}' keeps no packed weights in a file; use model=gguf")
    if not getattr(registry.params("structure", case.structure), "keeps_blocks", False):
        raise ValueError(
            f"structure '{case.structure}' would cut the blocks of the file; use none or a contiguous split without a "
            f"shared slice"
        )
    stored: Scheme = model.stored_scheme(case.layers, shape.width)
    return stored


def _check_training(case: Case, kinds: Sequence[str], scheme: Scheme, sparsity: SparsitySpec | None) -> None:
    """Raise ValueError where a training step cannot be checked, or is not what the case says."""
    if scheme.codec != "none":
        raise ValueError("quantized weights have no gradient; use pass=forward or quantization=none")
    if sparsity is not None:
        raise ValueError("gradients are not checked through sparsity; use axes.pass=forward or axes.sparsity=none")
    for kind in ("constant", "sequence"):
        if kind in kinds:
            raise ValueError(
                f"gradients are not checked through {kind} experts; use axes.pass=forward or a routing without them"
            )
    if case.residency == "cold":
        raise ValueError("a training step has one copy of its weights; use axes.residency=warm")


def plain_case(config: SuiteConfig, **fields: Any) -> Case:
    """Return a case that is about no layer of a model: every axis is ``none`` or plain, but for ``fields``."""
    nothing: dict[str, Any] = dict.fromkeys(NAMED_AXES, NONE)
    values = {
        "suite": config.suite,
        "suite_version": config.suite_version,
        "protocol": "timed",
        "layers": (),
        "tokens": 1,
        "dtype": "float32",
        "pass_": "forward",
        "boundary": "topk",
        "threads": config.axes["threads"][0],
        "device": config.device,
        "residency": "warm",
        "evidence": Evidence.MEASURED_CPU,
        "seed": config.seed,
        "weights_sha256": "",
    }
    return Case(**{**nothing, **values, **fields})


def points_of(values: Iterable[tuple[str, Mapping[str, Any]]], registry: Registry, axis: str) -> list[Choice]:
    """Return the Choices of a named axis; a list given to a parameter that is no list makes several of one name."""
    result = []
    for name, overrides in values:
        descriptor = registry.get(axis, name)
        for point in sweep(descriptor.params, overrides):
            result.append(descriptor.choose(point))
    return result


def sweep(params: type | None, overrides: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield override sets with one value each where a scalar parameter was given a list."""
    hints = getattr(params, "__annotations__", {}) if params else {}
    for base in getattr(params, "__mro__", ()):
        hints = {**getattr(base, "__annotations__", {}), **hints}
    axes: dict[str, Sequence[Any]] = {}
    for name, value in overrides.items():
        declared = str(hints.get(name, ""))
        takes_list = any(word in declared for word in ("tuple", "list", "Sequence"))
        axes[name] = value if isinstance(value, (list, tuple)) and not takes_list else [value]
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
