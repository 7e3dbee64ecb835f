"""What the folders of moebench share: names, keys, cases, specifications and the protocols between them.

Standard library only, so that the parent process, every worker and every plug-in can import it at no cost.
Tensors never appear here; the protocols that carry them say so with ``Any`` and document shape and dtype.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import json
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

AXES = (
    "model",
    "structure",
    "routing",
    "quantization",
    "sparsity",
    "backend",
    "traffic",
    "tokens",
    "dtype",
    "pass",
    "boundary",
    "threads",
    "residency",
)
"""The axes of a run, in the order in which tables show them."""

NAMED_AXES = AXES[:7]
"""The axes whose values are plug-ins; the others take plain values."""

KINDS = (*NAMED_AXES, "suite")
"""Every kind of plug-in; entry points use the group ``moebench.<kind>``."""

EXPERT_KINDS = ("ffn", "zero", "copy", "constant", "sequence", "gather")
"""What an expert id may stand for; a backend refuses the kinds it does not know."""

OWNERS = ("ffn", "gather", "sequence")
"""The kinds whose experts own weights in a store: FFNs, FFNs so many and so narrow that their rows are gathered, and
causal attentions, for which the tokens of one call are one sequence."""


SITES = ("input", "gate", "hidden")
"""Where activations may be left out, in the order of an expert's work: what gate and up read (width H); act(gate x),
which decides for the rows of up and the columns of down (width F, gated experts only); what down reads (width F)."""


def expert_matrices(gated: bool, heads: int = 0) -> int:
    """Return how many matrices of hidden x width an expert owns: query, key, value, output; or gate, up, down."""
    return 4 if heads else 3 if gated else 2


class MoebenchError(Exception):
    """A mistake of the user or of the machine, told in one sentence that names the remedy."""


class Status(StrEnum):
    """How a case ended."""

    OK = "ok"
    WRONG = "wrong"
    FELL_BACK = "fell_back"
    SKIPPED = "skipped"
    FAILED = "failed"
    CRASHED = "crashed"
    TIMED_OUT = "timed_out"


class Flag(StrEnum):
    """A doubt about an ok row: it is shown, and left out of verdicts."""

    NOT_STEADY = "not_steady"
    CONTENDED = "contended"
    IMPLAUSIBLE = "implausible"


class Evidence(StrEnum):
    """What kind of thing a number is; kinds are never ranked or aggregated together."""

    MEASURED_CPU = "measured-cpu"
    MEASURED_GPU = "measured-gpu"
    INTERPRETED = "interpreted"
    HOST_EXECUTED = "host-executed"
    STATIC_COMPILE = "static-compile"
    SIMULATED = "simulated"
    MODEL = "model"

    @property
    def measured(self) -> bool:
        """Whether it comes from a clock beside the thing itself."""
        return self in (Evidence.MEASURED_CPU, Evidence.MEASURED_GPU)


def measured_on(device: str) -> Evidence:
    """Return the evidence of a clock on ``device``."""
    return Evidence.MEASURED_CPU if device == "cpu" else Evidence.MEASURED_GPU


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def canonical_json(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, dataclasses as objects, tuples as lists."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain(value: Any) -> Any:
    """Return ``value`` made of dicts, lists, strings, numbers, booleans and None only."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, StrEnum):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"a {type(value).__name__} has no canonical JSON form: {value!r}")


def make_key(value: Any) -> str:
    """Return the sha256 (64 hex digits) of the canonical JSON of ``value``: the only way keys are made."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Plug-ins


@dataclass(frozen=True)
class Descriptor:
    """A plug-in as the parent sees it: names and parameters, and where the code is, without importing it.

    ``factory`` is ``"package.module:attribute"`` or ``"path/file.py:attribute"``; it is called with one argument, an
    instance of ``params``. ``requires`` names distributions that must be installed. ``environment`` holds environment
    variables that a worker needs before it starts; cases with different ones live in different workers of a ring.
    """

    kind: str
    name: str
    summary: str
    factory: str
    params: type | None = None
    requires: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    version: str = "1"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MoebenchError(unknown("plug-in kind", self.kind, KINDS))
        if self.params is not None and not dataclasses.is_dataclass(self.params):
            raise MoebenchError(f"params of {self.kind} '{self.name}' must be a dataclass type; make it one.")

    def choose(self, overrides: Mapping[str, Any] | None = None) -> Choice:
        """Return this plug-in with its parameters checked and its defaults filled in."""
        return Choice(self.name, plain(self.params_from(overrides)) or {}, self.version)

    def params_from(self, overrides: Mapping[str, Any] | None = None) -> Any:
        """Return an instance of ``params`` made from ``overrides`` (None where the plug-in has no parameters)."""
        if self.params is None:
            if overrides:
                name = next(iter(overrides))
                raise MoebenchError(f"{self.kind} '{self.name}' has no parameter '{name}': it has none; remove it.")
            return None
        return build_params(self.params, overrides or {}, f"{self.kind} '{self.name}'")

    def create(self, overrides: Mapping[str, Any] | None = None) -> Any:
        """Import the factory and call it with the checked parameters."""
        return load_attribute(self.factory)(self.params_from(overrides))


@dataclass(frozen=True)
class Choice:
    """One named value of an axis with all its parameters resolved, and the version of its plug-in."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    version: str = "1"

    def __str__(self) -> str:
        return self.name


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return the one sentence for a name that does not exist, with the nearest ones that do."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(repr(c) for c in close)}?" if close else f"known: {', '.join(options) or 'none'}."
    )
    return f"unknown {what} '{name}': {hint}"


def build_params(cls: type, overrides: Mapping[str, Any], owner: str) -> Any:
    """Make the dataclass ``cls`` from ``overrides``, coercing numbers and sequences to the declared types."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    values: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in names:
            raise MoebenchError(unknown(f"parameter of {owner}", name, names))
        values[name] = coerce(value, hints[name], f"{owner}: parameter '{name}'")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise MoebenchError(f"{owner}: {error}") from error


def coerce(value: Any, hint: Any, where: str) -> Any:
    """Return ``value`` as the type that ``hint`` declares, or raise a sentence that says what is expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value in args:
            return value
        raise MoebenchError(f"{where} must be one of {', '.join(map(str, args))}, not {value!r}.")
    if origin in (types.UnionType, typing.Union):
        return _coerce_union(value, args, where)
    if origin in (tuple, list, Sequence) and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(coerce(item, args[0] if args else Any, where) for item in value)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return dict(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise MoebenchError(f"{where} must be a finite number, not {value!r}.")
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise MoebenchError(f"{where} must be of type {wanted}, not {value!r}.")


def _coerce_union(value: Any, options: Sequence[Any], where: str) -> Any:
    if value is None and type(None) in options:
        return None
    failure: MoebenchError | None = None
    for option in options:
        if option is type(None):
            continue
        try:
            return coerce(value, option, where)
        except MoebenchError as error:
            failure = error
    raise failure or MoebenchError(f"{where} may not be {value!r}.")


def load_attribute(target: str) -> Any:
    """Return the object at ``"package.module:attribute"`` or ``"path/file.py:attribute"``."""
    place, _, attribute = target.rpartition(":")
    if not place:
        raise MoebenchError(f"'{target}' names no object; write it as module:attribute or file.py:attribute.")
    module = load_file(place) if place.endswith(".py") else importlib.import_module(place)
    try:
        return getattr(module, attribute)
    except AttributeError:
        names = [name for name in vars(module) if not name.startswith("_")]
        raise MoebenchError(unknown(f"attribute of {place}", attribute, names)) from None


def load_file(path: str | Path) -> types.ModuleType:
    """Import the Python file at ``path`` once under a name made from its absolute path."""
    file = Path(path).resolve()
    if not file.is_file():
        raise MoebenchError(f"plug-in file '{path}' does not exist; check the path.")
    name = f"moebench_plugin_{make_key(str(file))[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise MoebenchError(f"plug-in file '{path}' is no Python source; give a .py file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        reason = f"{type(error).__name__}: {error}"
        raise MoebenchError(f"plug-in file '{path}' could not be loaded ({reason}); mend it.") from error
    return module


BUILTIN_PLUGINS = (
    "moebench.moe.plugins",
    "moebench.moe.quantization_plugins",
    "moebench.moe.router_params",
    "moebench.moe.sparsifiers.params",
    "moebench.moe.sparsifiers.baselines",
    "moebench.moe.transforms.params",
    "moebench.moe.transforms.compression_params",
    "moebench.backends.plugins",
    "moebench.suites.plugins",
    "moebench.suites.hub_plugins",
    "moebench.suites.gguf_plugins",
    "moebench.suites.tiny_plugins",
    "moebench.suites.quantization_plugins",
    "moebench.suites.sparsity_plugins",
    "moebench.suites.distillation_plugins",
    "moebench.suites.routing_plugins",
    "moebench.suites.claims_plugins",
    "moebench.suites.probe_plugins",
    "moebench.suites.workload_plugins",
    "moebench.suites.finetuning_plugins",
    "moebench.suites.robustness_plugins",
    "moebench.suites.static_plugins",
    "moebench.suites.offload_plugins",
    "moebench.suites.traffic_params",
)
"""Our own plug-ins go through the same door as everybody else's."""


class Registry:
    """All plug-ins by kind and name, from our modules, entry points and files given on the command line."""

    def __init__(self) -> None:
        self._by_kind: dict[str, dict[str, Descriptor]] = {kind: {} for kind in KINDS}
        self._aliases: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
        self.problems: list[str] = []

    @classmethod
    def load(cls, files: Iterable[str] = ()) -> Registry:
        """Return a registry of everything installed, plus the plug-in files named in ``files``."""
        registry = cls()
        for module in BUILTIN_PLUGINS:
            registry.add(*importlib.import_module(module).DESCRIPTORS)
        registry._add_entry_points()
        for file in files:
            plugin = load_file(file)
            if not hasattr(plugin, "DESCRIPTORS"):
                raise MoebenchError(f"plug-in file '{file}' has no DESCRIPTORS; add a list of Descriptor objects.")
            registry.add(*plugin.DESCRIPTORS)
        return registry

    def _add_entry_points(self) -> None:
        found = metadata.entry_points()  # one look through all that is installed, not one for each kind
        for kind in KINDS:
            for point in found.select(group=f"moebench.{kind}"):
                try:
                    loaded = point.load()
                    self.add(*(loaded if isinstance(loaded, (list, tuple)) else [loaded]))
                except Exception as error:  # a broken package of somebody else must not take the whole tool down
                    self.problems.append(f"plug-in {point.name} ({point.value}) could not be loaded: {error}")

    def add(self, *descriptors: Descriptor) -> None:
        """Register plug-ins; a name may be taken only once."""
        for new in descriptors:
            if not isinstance(new, Descriptor):
                raise MoebenchError(f"{new!r} is no plug-in; DESCRIPTORS and entry points hold Descriptor objects.")
            names, aliases = self._by_kind[new.kind], self._aliases[new.kind]
            for name in (new.name, *new.aliases):
                if name in names or name in aliases:
                    raise MoebenchError(f"two plug-ins of kind {new.kind} are called '{name}'; rename one of them.")
            names[new.name] = new
            aliases.update(dict.fromkeys(new.aliases, new.name))

    def get(self, kind: str, name: str) -> Descriptor:
        """Return the plug-in of this kind and name (or alias), or raise a sentence with suggestions."""
        found = self._by_kind[kind].get(self._aliases[kind].get(name, name))
        if found is None:
            raise MoebenchError(unknown(kind, name, [*self._by_kind[kind], *self._aliases[kind]]))
        return found

    def names(self, kind: str) -> list[str]:
        """Return the names of this kind in the order of registration."""
        return list(self._by_kind[kind])

    def all(self, kind: str) -> list[Descriptor]:
        """Return the plug-ins of this kind in the order of registration."""
        return list(self._by_kind[kind].values())

    def params(self, kind: str, choice: Choice) -> Any:
        """Return the parameter object of a resolved choice."""
        return self.get(kind, choice.name).params_from(choice.params)


# ---------------------------------------------------------------------------------------------------------------------
# What is to be executed, and how


MIXED = "mixed"
"""The codec of a layer whose experts are given schemes of their own only once its weights are known."""


@dataclass(frozen=True)
class Scheme:
    """How one expert's weights are stored. ``group`` is in input channels; None means one scale per output row.

    Codec ``mixed`` stands in a plan for experts that may differ, with their average ``bits``: which scheme each has is
    known when a backend loads them. With ``act_bits`` what a product reads is rounded too, each token by its own scale.
    """

    codec: str = "none"
    bits: float = 16.0
    group: int | None = None
    symmetric: bool = True
    act_bits: int | None = None


@dataclass(frozen=True)
class SparsitySpec:
    """What may be left out: activations at each of ``sites`` (of ``SITES``), and with ``masked_weights`` weights too.

    ``rule`` decides by the score ``|a_j| * weight_j``: those above a threshold are used (``threshold``), or those of
    the k largest of each token (``topk``); ``fixed`` channels do not look at activations. ``weight`` names the weights
    (``one``: there are none), which with ``per_expert`` differ from expert to expert. With ``basis`` the input is
    decided about in a rotated basis; with ``residual`` a low-rank matrix per expert reads what is left out at input and
    hidden. ``dense_prefix`` is the share of a sequence's first tokens, rounded up, that leave no activations out:
    whoever calls an executor and knows the sequence sees to that.
    """

    sites: tuple[str, ...]
    weight: str = "one"
    rule: Literal["threshold", "topk", "fixed"] = "threshold"
    level: float = 0.5
    per_expert: bool = False
    basis: bool = False
    residual: bool = False
    masked_weights: bool = False
    dense_prefix: float = 0.0

    @property
    def features(self) -> tuple[str, ...]:
        """What this asks of a backend beyond one threshold, with shared weights or none, at input and hidden."""
        asked = {
            "topk": self.rule == "topk",
            "fixed": self.rule == "fixed",
            "gate": "gate" in self.sites,
            "per_expert": self.per_expert,
            "basis": self.basis,
            "residual": self.residual,
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)


@dataclass(frozen=True)
class Selection:
    """How boundary ``logits`` becomes top-k: the part of a router that a fused kernel may take over.

    Score ``one`` selects by logits and gives every selected expert weight ``scale`` (slices of one dense FFN).
    ``groups`` is (number of groups, groups kept) as in DeepSeek-V3.
    """

    score: Literal["softmax", "sigmoid", "one"]
    k: int
    renormalize: bool
    scale: float = 1.0
    bias: bool = False
    groups: tuple[int, int] | None = None


@dataclass(frozen=True)
class LayerSpec:
    """Everything a backend must know of a layer before it sees a tensor.

    ``kinds`` has one entry per expert id; ``schemes`` one per expert that owns weights, in the order of their ids.
    ``tokens`` is how many a call will have at most, None where that is not known. ``heads`` is that of experts that are
    attentions, whose queries are ``width`` wide; 0 for any other layer.
    """

    hidden: int
    width: int
    kinds: tuple[str, ...]
    dtype: str = "float32"
    activation: str = "silu"
    gated: bool = True
    schemes: tuple[Scheme, ...] = ()
    sparsity: SparsitySpec | None = None
    boundary: str = "topk"
    selection: Selection | None = None
    backward: bool = False
    max_k: int = 1
    tokens: int | None = None
    heads: int = 0

    @property
    def experts(self) -> int:
        """Number of expert ids, of any kind."""
        return len(self.kinds)

    @property
    def matrices(self) -> int:
        """How many matrices of hidden x width an expert owns."""
        return expert_matrices(self.gated, self.heads)

    @property
    def ffn_experts(self) -> int:
        """Number of experts that own weights."""
        return sum(kind in OWNERS for kind in self.kinds)

    @property
    def scheme(self) -> Scheme | None:
        """The one scheme of all experts, or None where they differ."""
        distinct = set(self.schemes) or {Scheme()}
        return next(iter(distinct)) if len(distinct) == 1 else None

    def folded(self) -> LayerSpec:
        """Return the layer as a backend sees it once the kinds other than ffn are taken out."""
        return dataclasses.replace(self, kinds=tuple(kind for kind in self.kinds if kind == "ffn"))


@dataclass(frozen=True)
class Execution:
    """How a backend will run a layer. ``excludes`` names torch operators that must not be seen when it does."""

    weights: Literal["dense", "packed", "dequantized"] = "dense"
    sparse: Literal["none", "skip", "mask"] = "none"
    boundary: str = "topk"
    folded: bool = False
    excludes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExecutedPath:
    """What really ran, told by the backend; it must agree with the Execution of the plan."""

    weights: str
    sparse: str = "none"
    kernels: tuple[str, ...] = ()
    notes: str = ""


@dataclass(frozen=True)
class Refusal:
    """Why a backend cannot run a layer: one sentence."""

    reason: str


@dataclass(frozen=True)
class Availability:
    """Whether a backend can work here, on which devices and with which evidence; ``reason`` says why not.

    Of a backend that works with no evidence that is measured, ``reason`` says why nothing is timed.
    """

    available: bool
    reason: str = ""
    devices: tuple[str, ...] = ("cpu",)
    evidence: tuple[Evidence, ...] = (Evidence.MEASURED_CPU,)

    @property
    def timed(self) -> bool:
        """Whether its calls may be timed."""
        return self.available and any(one.measured for one in self.evidence)

    def evidence_on(self, device: str) -> Evidence:
        """Return what its numbers are on ``device``: measured there if it says so, else what is measured nowhere."""
        own = measured_on(device)
        if own in self.evidence:
            return own
        return next((one for one in self.evidence if not one.measured), self.evidence[0])


# ---------------------------------------------------------------------------------------------------------------------
# What comes back from a trial


@dataclass(frozen=True)
class Check:
    """The outcome of an oracle. ``error`` and ``bound`` are relative to the norm of the reference row."""

    ok: bool
    error: float | None = None
    bound: float | None = None
    reason: str = ""
    flips: int = 0


@dataclass(frozen=True)
class Cost:
    """What one step must do at least: floating point operations, bytes moved, and the experts it really touches."""

    flops: float
    bytes: float
    distinct_experts: int | None = None
    assignments: int | None = None
    footprint: float | None = None


@dataclass(frozen=True)
class Metric:
    """One number with its unit, its interval where one is known, and the number of observations behind it."""

    name: str
    value: float | None
    unit: str = ""
    lo: float | None = None
    hi: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Series:
    """Numbers along one index, such as tokens per expert; ``layer`` and ``step`` place it in the model."""

    name: str
    values: tuple[float, ...]
    unit: str = ""
    layer: int | None = None
    step: int | None = None


@dataclass(frozen=True)
class Item:
    """One judged item of an evaluation, kept so that two methods can be compared item by item."""

    task: str
    item: str
    metric: str
    value: float | None


@dataclass(frozen=True)
class Facts:
    """What a trial knows besides its times; ``notes["reason"]`` is kept as the row's reason though all is well."""

    metrics: tuple[Metric, ...] = ()
    series: tuple[Series, ...] = ()
    items: tuple[Item, ...] = ()
    executed: ExecutedPath | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Case:
    """One thing to measure, resolved to the last default. See ``method_key`` and ``case_key`` for its identity."""

    suite: str
    suite_version: str
    protocol: Literal["timed", "once"]
    model: Choice
    layers: tuple[int, ...]
    structure: Choice
    routing: Choice
    quantization: Choice
    sparsity: Choice
    backend: Choice
    traffic: Choice
    tokens: int
    dtype: str
    pass_: Literal["forward", "forward_backward"]
    boundary: Literal["logits", "topk", "sorted"]
    threads: int
    device: str
    residency: Literal["cold", "warm"]
    evidence: Evidence
    seed: int
    weights_sha256: str
    base: str = ""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    workload: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    execution: Execution = Execution()

    @cached_property
    def method_key(self) -> str:
        """Identity of what is computed: model, weights, layers and every transformation of them."""
        return make_key(
            {
                "model": self.model,
                "weights_sha256": self.weights_sha256,
                "layers": self.layers,
                "structure": self.structure,
                "routing": self.routing,
                "quantization": self.quantization,
                "sparsity": self.sparsity,
                "calibration": self.calibration,
                "seed": self.seed,
            }
        )

    @cached_property
    def group_key(self) -> str:
        """Identity of the group: cases that may be compared share it."""
        return make_key(
            {
                "suite": self.suite,
                "suite_version": self.suite_version,
                "protocol": self.protocol,
                "model": self.model,
                "weights_sha256": self.weights_sha256,
                "layers": self.layers,
                "workload": self.workload,
                "traffic": self.traffic,
                "tokens": self.tokens,
                "boundary": self.boundary,
                "pass": self.pass_,
                "dtype": self.dtype,
                "evidence": self.evidence,
                "threads": self.threads,
                "device": self.device,
                "residency": self.residency,
                "seed": self.seed,
            }
        )

    @cached_property
    def case_key(self) -> str:
        """Identity of the case: its method, its group, and how it is executed."""
        return make_key(
            {
                "method": self.method_key,
                "group": self.group_key,
                "backend": self.backend,
                "execution": self.execution,
                "environment": self.environment,
            }
        )

    def axis(self, name: str) -> str | int:
        """Return the plain value of an axis, as tables show it."""
        value = getattr(self, "pass_" if name == "pass" else name)
        return value.name if isinstance(value, Choice) else value

    def to_json(self) -> dict[str, Any]:
        """Return the case as plain JSON values; ``from_json`` reads it back."""
        result: dict[str, Any] = plain(self)
        return result

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        """Return the case written by ``to_json``."""
        values = dict(data)
        for name in NAMED_AXES:
            values[name] = Choice(**values[name])
        values["layers"] = tuple(values["layers"])
        values["evidence"] = Evidence(values["evidence"])
        execution = dict(values["execution"])
        execution["excludes"] = tuple(execution["excludes"])
        values["execution"] = Execution(**execution)
        return cls(**values)


@dataclass(frozen=True)
class Planned:
    """A case of a plan; with ``refusal`` it will not run, and the row says why.

    ``method_bytes`` is what the layer of its method takes, shared by all cases of that method and dtype in a worker;
    ``copies_bytes`` what copies of its weights take, of which cases with equal ``copies_key`` share as many as both
    need; ``own_bytes`` what the case takes besides, shared in the same way by cases with equal ``own_key`` if it has
    one; ``seconds`` roughly how long a case of protocol ``once`` takes.
    """

    case: Case
    refusal: str | None = None
    method_bytes: float = 0.0
    own_bytes: float = 0.0
    seconds: float = 20.0
    copies_bytes: float = 0.0
    copies_key: str = ""
    own_key: str = ""

    @property
    def bytes_alone(self) -> float:
        """What the case takes where it shares nothing."""
        return self.method_bytes + self.copies_bytes + self.own_bytes


# ---------------------------------------------------------------------------------------------------------------------
# Protocols. T tokens, H hidden, E experts, F expert width, K slots, N assignments.


class Executor(Protocol):
    """Routed experts of one layer: boundary inputs in, ``y_TH`` out.

    ``topk``: ``indices_TK`` int64 padded with E, ``weights_TK`` float32 padded with 0. ``sorted``: ``token_N`` int64,
    ``offsets_E1`` int32, ``weight_N`` float32. ``logits``: ``logits_TE`` float32. With ``out_TH`` the result is written
    there and nowhere else; with None a new tensor is returned that autograd may follow.
    """

    def __call__(self, x_TH: Any, *inputs: Any, out_TH: Any = None) -> Any: ...


class Session(Protocol):
    """Layers loaded into a backend."""

    def layer(self, index: int) -> Executor: ...
    def hint(self, layer: int, experts: Any, priority: float) -> None: ...
    def executed(self) -> ExecutedPath: ...
    def events(self) -> Sequence[Mapping[str, Any]]: ...
    def resident_bytes(self) -> int: ...
    def close(self) -> None: ...


class Backend(Protocol):
    """A way to execute experts. ``availability`` and ``supports`` run in the parent and must not import torch.

    One whose ``load`` copies dense weights says so in a further method ``own_form(spec)``, which names the form: plans
    count its bytes, once for layers that share their weights and their form.
    """

    def availability(self) -> Availability: ...
    def supports(self, spec: LayerSpec) -> Execution | Refusal: ...
    def load(self, layers: Mapping[int, Any], specs: Mapping[int, LayerSpec]) -> Session: ...


class Trial(Protocol):
    """A case made ready in a worker.

    The engine calls ``begin_turn`` off the clock, before a turn and before each further round through the steps in it,
    then ``run``. With state ``stream`` a turn is all steps in order, from the state that ``begin_turn`` makes, and no
    call is made besides. A trial whose device has a clock of its own may have ``device_ns()``: the time of the last
    call on it, asked for off the clock.
    """

    @property
    def steps(self) -> int: ...
    @property
    def state(self) -> Literal["none", "reset_per_turn", "stream"]: ...
    def begin_turn(self) -> None: ...
    def run(self, step: int) -> Any: ...
    def verify(self, step: int, output: Any) -> Check: ...
    def cost(self, step: int) -> Cost: ...
    def facts(self) -> Facts: ...
    def close(self) -> None: ...


class Suite(Protocol):
    """Declares cases and prepares trials; it never times anything. ``cases`` runs in the parent without torch."""

    def cases(self, config: Any, registry: Registry) -> Iterator[Planned]: ...
    def prepare(self, case: Case, registry: Registry) -> Trial: ...
