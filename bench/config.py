"""From the command line to a list of suite configurations: Hydra composes, moebench checks names and expands axes.

A configuration has the groups ``suite``, ``model`` and ``experiment``, the lists ``axes.<axis>``, the parameters
``params.<axis>.<name>.<parameter>``, and the settings of the engine. Every name is checked here first, so that a
mistyped one gets a suggestion in plain words.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..contracts import (
    AXES,
    KINDS,
    NAMED_AXES,
    Choice,
    Descriptor,
    MoebenchError,
    Registry,
    build_params,
    plain,
    unknown,
)
from ..suites.base import PLAIN_AXES, SuiteConfig, points_of
from .names import Names, checked


@dataclass(frozen=True)
class EngineConfig:
    """How a run measures. Times in seconds.

    ``processes`` fresh rings measure each group in succession. A case stops when the interval of its median is
    within ``precision`` of it, or after ``seconds`` of timed calls per process; it has at least ``min_calls`` calls,
    unless these would take longer than four times its seconds.
    ``memory`` is the part of the free memory that a group may use.
    """

    processes: int = 3
    precision: float = 0.02
    seconds: float = 3.0
    min_calls: int = 20
    warmup_seconds: float = 3.0
    steady_tolerance: float = 0.1
    prepare_timeout: float = 600.0
    turn_timeout: float = 60.0
    once_timeout: float = 1800.0
    memory: float = 0.6

    def __post_init__(self) -> None:
        for name in ("processes", "min_calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("seconds", "precision", "memory", "turn_timeout", "prepare_timeout", "once_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number greater than 0")
        for name in ("warmup_seconds", "steady_tolerance"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number from 0")
        if self.memory > 1:
            raise ValueError("memory must be a part of the free memory, at most 1")


@dataclass(frozen=True)
class RunConfig:
    """A resolved run: blocks of one suite each, and how to measure them."""

    blocks: tuple[SuiteConfig, ...]
    engine: EngineConfig
    experiment: str | None
    store: str | None
    shown: Mapping[str, Any] = field(default_factory=dict)


def load(overrides: Sequence[str], registry: Registry, memory_bytes: float, cache_bytes: float) -> RunConfig:
    """Compose the configuration that the command-line ``overrides`` describe.

    ``memory_bytes`` is what is free here, of which the part ``engine.memory`` may be used.
    """
    overrides = alias_experiment(list(overrides))
    with _composer(registry) as compose:
        chosen = compose([o for o in overrides if o.startswith(("suite=", "experiment="))])
        experiment = chosen.get("experiment")
        if experiment and any(o.startswith("suite=") for o in overrides):
            raise MoebenchError(
                f"experiment={experiment['name']} names its own suites; leave out suite= or experiment=."
            )
        shared = list(experiment.get("overrides", [])) if experiment else []
        blocks = _experiment_blocks(experiment) if experiment else [_suite_defaults(chosen, overrides, registry)]
        given = [o for o in overrides if not o.startswith("experiment=")]
        trees = [compose([*shared, *own, *given]) for own in blocks]
        # what blocks share may be of their suite: parameters are those of the first one's
        outer = {**compose([blocks[0][0], *shared, *given]), "experiment": experiment} if experiment else trees[0]
    engine = build_params(EngineConfig, outer["engine"], "engine")
    configs = tuple(_suite_config(tree, registry, memory_bytes * engine.memory, cache_bytes) for tree in trees)
    return RunConfig(configs, engine, experiment["name"] if experiment else None, outer.get("store"), outer)


def alias_experiment(overrides: list[str]) -> list[str]:
    """Rewrite ``suite=NAME`` to ``experiment=NAME`` where NAME is an experiment."""
    names = experiment_names()
    return [f"experiment={o[6:]}" if o.startswith("suite=") and o[6:] in names else o for o in overrides]


def _suite_defaults(chosen: Mapping[str, Any], overrides: Sequence[str], registry: Registry) -> list[str]:
    """Return what a suite asks for where the command line says nothing: its model, and how it is measured."""
    params = registry.get("suite", chosen["suite"]["name"]).params
    own = [f"engine.{name}={value}" for name, value in getattr(params, "ENGINE", {}).items()]
    models = getattr(params, "AXES", {}).get("model")
    if models and not any(override.startswith("model=") for override in overrides):
        own.append(f"model={models[0]}")
    return own


def experiment_names() -> list[str]:
    """Return the names of the saved experiments."""
    from importlib.resources import files

    folder = files("moebench.suites.conf.experiment")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _experiment_blocks(experiment: Mapping[str, Any]) -> list[list[str]]:
    return [[f"suite={block['suite']}", *block.get("overrides", [])] for block in experiment["blocks"]]


Plugins = tuple[tuple[str, str, type | None], ...]
"""Kind, name and parameters of every plug-in: all that a composed configuration has of a registry."""

KEPT = 64
"""So many composed configurations are kept."""

_registered: Plugins = ()
_composed: dict[tuple[Plugins, tuple[str, ...]], Mapping[str, Any]] = {}
"""What was composed in this process: it takes long, and every plan begins with that of its suite alone."""


def register_groups(registry: Registry) -> None:
    """Give Hydra the groups that are made from descriptors: suites, models, parameters and the engine's settings."""
    _register_members(registry)
    _register_params(registry, None)


def _register_members(registry: Registry) -> None:
    from hydra.core.config_store import ConfigStore

    global _registered
    plugins = _plugins(registry)
    if plugins == _registered:
        return
    store = ConfigStore.instance()
    for descriptor in registry.all("suite"):
        node = {"name": descriptor.name, **_defaults(descriptor)}
        store.store(group="suite", name=descriptor.name, node=node)
    for descriptor in registry.all("model"):
        node = {"name": descriptor.name, **_defaults(descriptor), "layers": None}
        store.store(group="model", name=descriptor.name, node=node)
    store.store(group="engine", name="defaults", node=plain(EngineConfig()))
    _registered = plugins


def _register_params(registry: Registry, named: Collection[tuple[str, str]] | None) -> None:
    """Give Hydra the parameters of the plug-ins in ``named``, as (axis, name), or of all where it is None."""
    from hydra.core.config_store import ConfigStore

    node = {
        axis: {name: values for name, values in members.items() if named is None or (axis, name) in named}
        for axis, members in _all_params(registry).items()
    }
    ConfigStore.instance().store(group="params", name="defaults", node=node)


def _all_params(registry: Registry) -> dict[str, dict[str, dict[str, Any]]]:
    return {axis: {d.name: _defaults(d) for d in registry.all(axis)} for axis in NAMED_AXES if axis != "model"}


def _named_params(overrides: Sequence[str]) -> set[tuple[str, str]] | None:
    """Return (axis, name) of all plug-ins whose parameters are set; None where an interpolation may read any."""
    if any("${" in override for override in overrides):
        return None
    paths = [override.lstrip("+").split(".") for override in overrides]
    return {(path[1], path[2]) for path in paths if path[0] == "params" and len(path) > 2}


def _plugins(registry: Registry) -> Plugins:
    return tuple((d.kind, d.name, d.params) for kind in KINDS for d in registry.all(kind))


class _composer:
    """Hydra, started once with our groups registered, as a context manager that yields ``compose(overrides)``."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._names = Names(registry, experiment_names(), EngineConfig, self._members)

    def __enter__(self) -> Any:
        from hydra import initialize_config_module
        from hydra.core.global_hydra import GlobalHydra

        GlobalHydra.instance().clear()
        _register_members(self.registry)
        self._context = initialize_config_module("moebench.suites.conf", version_base="1.3")
        self._context.__enter__()
        return self.compose

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)

    def compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        """Return the composed configuration as plain values."""
        self._names.check(overrides)
        named, key = _named_params(overrides), (_plugins(self.registry), tuple(overrides))
        if named is None:  # an interpolation may name the environment, which may change
            return checked(self._fresh(overrides, named))
        if key not in _composed:
            composed = self._fresh(overrides, named)
            if len(_composed) >= KEPT:
                _composed.clear()
            _composed[key] = composed
        return checked(copy.deepcopy(_composed[key]))

    def _fresh(self, overrides: Sequence[str], named: Collection[tuple[str, str]] | None) -> dict[str, Any]:
        """Let Hydra compose with the parameters in ``named`` alone, for it copies each many times; add the others."""
        from hydra import compose
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        _register_params(self.registry, named)
        try:
            tree = compose("config", list(overrides))
            result: dict[str, Any] = OmegaConf.to_container(tree, resolve=True)  # type: ignore[assignment]
        except (HydraException, OmegaConfBaseException) as error:
            raise MoebenchError(f"the settings cannot be read: {_first_line(error)}") from error
        params = {axis: {**others, **result["params"][axis]} for axis, others in _all_params(self.registry).items()}
        return {**result, "params": params}

    def _members(self, group: str, overrides: Sequence[str]) -> list[str]:
        """Return the parameters of the suite or model that the overrides choose."""
        tree = self.compose([o for o in overrides if o.startswith((f"{group}=", "experiment="))])
        return [name for name in tree[group] if name != "name"]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _defaults(descriptor: Descriptor) -> dict[str, Any]:
    fields = dataclasses.fields(descriptor.params) if descriptor.params else ()
    return {f.name: plain(_default(f)) for f in fields if f.init}


def _default(parameter: dataclasses.Field[Any]) -> Any:
    if parameter.default is not dataclasses.MISSING:
        return parameter.default
    factory = parameter.default_factory
    return None if factory is dataclasses.MISSING else factory()


def _suite_config(tree: Mapping[str, Any], registry: Registry, memory_bytes: float, cache_bytes: float) -> SuiteConfig:
    descriptor = registry.get("suite", tree["suite"]["name"])
    suite_params = descriptor.params_from({k: v for k, v in tree["suite"].items() if k != "name"})
    model = dict(tree["model"])
    defaults = getattr(descriptor.params, "AXES", {})
    axes = {axis: _axis_values(axis, tree, model, defaults, registry) for axis in AXES}
    return SuiteConfig(
        suite=descriptor.name,
        suite_version=descriptor.version,
        suite_params=suite_params,
        axes=axes,
        layers=model["layers"],
        combine=tree["combine"],
        seed=tree["seed"],
        calibration=tree["calibration"],
        device=tree["device"],
        cuda_graph=tree["cuda_graph"],
        memory_bytes=memory_bytes,
        cache_bytes=cache_bytes,
    )


def _axis_values(
    axis: str, tree: Mapping[str, Any], model: Mapping[str, Any], defaults: Mapping[str, Any], registry: Registry
) -> list[Any]:
    given = tree["axes"][axis]
    if given is None:
        given = _model_default(axis, tree, registry) or defaults.get(axis)
    values = given if isinstance(given, list) else list(given) if isinstance(given, tuple) else [given]
    if axis in PLAIN_AXES:
        return [_plain_value(axis, value) for value in _all_plain(axis, values)]
    names = registry.names(axis) if values == ["all"] else [str(v) if v is not None else "none" for v in values]
    return points_of(list(_named(axis, names, tree, model, registry)), registry, axis)


def _model_default(axis: str, tree: Mapping[str, Any], registry: Registry) -> Any:
    """Return the value of an axis that depends on the model where none is given; models must agree on it."""
    if axis == "model":
        return [tree["model"]["name"]]
    given = tree["axes"]["model"] or tree["model"]["name"]
    names = registry.names("model") if given in ("all", ["all"]) else given if isinstance(given, list) else [given]
    wanted = [getattr(registry.get("model", str(name)).params, "AXES", {}).get(axis) for name in names]
    return wanted[0] if all(value == wanted[0] for value in wanted) else None


def _named(
    axis: str, names: Sequence[str], tree: Mapping[str, Any], model: Mapping[str, Any], registry: Registry
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in names:
        if axis == "model":
            own = {k: v for k, v in model.items() if k not in ("name", "layers")}
            yield name, own if name == model["name"] else {}
        else:
            yield name, tree["params"][axis].get(registry.get(axis, name).name, {})


def _all_plain(axis: str, values: Sequence[Any]) -> Sequence[Any]:
    allowed = PLAIN_AXES[axis]
    if list(values) != ["all"]:
        return values
    if isinstance(allowed, type):
        raise MoebenchError(f"axes.{axis}=all has no meaning: give numbers, for example axes.{axis}=[1,16].")
    return allowed


def _plain_value(axis: str, value: Any) -> Any:
    allowed = PLAIN_AXES[axis]
    if isinstance(allowed, type):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise MoebenchError(f"axes.{axis} takes whole numbers from 1, not {value!r}.")
        return value
    if value not in allowed:
        raise MoebenchError(unknown(f"value of axes.{axis}", str(value), [str(a) for a in allowed]))
    return value


def choice_label(choice: Choice, descriptor: Descriptor) -> str:
    """Return the name, with the parameters that differ from their defaults in braces."""
    defaults = _defaults(descriptor)
    changed = [f"{name}={value}" for name, value in choice.params.items() if defaults.get(name) != value]
    return f"{choice.name}{{{', '.join(changed)}}}" if changed else choice.name
