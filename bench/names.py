"""Names and plain values of settings, checked before anything is planned, so that a mistake is told in plain words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from ..contracts import AXES, NAMED_AXES, MoebenchError, Registry, coerce, unknown

PLAIN = {"seed": int, "device": str, "cuda_graph": bool, "combine": Literal["product", "pairs"]}
GROUPS = {
    "axes": "axes.<axis>",
    "engine": "engine.<name>",
    "calibration": "calibration.<name>",
    "params": "params.<axis>.<name>.<parameter>",
}
"""Groups of settings, and how one of them is written."""

CHOSEN = ("suite", "model")
"""Groups of which one member is chosen; its parameters are then settings of the group."""


class Names:
    """Knows every name that a setting may have.

    ``experiments`` and ``engine`` are the names of the saved experiments and of the engine's settings;
    ``members(group, overrides)`` gives the parameters of the member of a group that the overrides choose.
    """

    def __init__(
        self,
        registry: Registry,
        experiments: Sequence[str],
        engine: type,
        members: Callable[[str, Sequence[str]], Sequence[str]],
    ) -> None:
        self.registry, self.experiments, self.members = registry, experiments, members
        self._known: dict[str, Sequence[str]] = {
            "axes": AXES,
            "engine": [f.name for f in dataclasses.fields(engine)],
            "calibration": ["tokens"],
            "params": [axis for axis in NAMED_AXES if axis != "model"],
        }

    def check(self, overrides: Sequence[str]) -> None:
        """Raise a sentence for the first override that is no setting or names what does not exist."""
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise MoebenchError(f"'{override}' is no setting: write NAME=VALUE, for example suite=throughput.")
            if key.startswith("~"):
                raise MoebenchError(f"'{override}' would take a setting away, which none can be; leave it out.")
            key = key.lstrip("+")
            if key in CHOSEN:
                known = self.registry.names(key) + (list(self.experiments) if key == "suite" else [])
                _known(key, value, known)
            elif key == "experiment":
                _known(key, value, self.experiments)
            else:
                self._check_path(key.split("."), overrides)

    def _check_path(self, parts: Sequence[str], overrides: Sequence[str]) -> None:
        group, *rest = parts
        _known("setting", group, [*CHOSEN, "experiment", "store", *GROUPS, *PLAIN])
        if group in GROUPS:
            if len(parts) != len(GROUPS[group].split(".")):
                raise MoebenchError(f"'{'.'.join(parts)}' is no single setting: write {GROUPS[group]}=VALUE.")
            _known(f"setting of {group}", rest[0], self._known[group])
        if group in CHOSEN:
            _known(f"parameter of {group}", rest[0], self.members(group, overrides))
        if group == "params":
            axis, name, parameter = rest
            params = self.registry.get(axis, name).params
            known = [f.name for f in dataclasses.fields(params) if f.init] if params else []
            _known(f"parameter of {axis} '{name}'", parameter, known)


def _known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise MoebenchError(unknown(what, name, known))


def checked(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the composed settings with their plain values as the types that they must have."""
    values = {name: coerce(tree[name], hint, name) for name, hint in PLAIN.items()}
    if not -(2**63) <= values["seed"] < 2**63:
        raise MoebenchError(f"seed must be a whole number of at most 64 bits, not {values['seed']}.")
    store = tree["store"]
    if isinstance(store, (dict, list, bool)):
        raise MoebenchError(f"store must be a folder, not {store!r}.")
    tokens = coerce(tree["calibration"]["tokens"], int, "calibration.tokens")
    if tokens < 1:
        raise MoebenchError(f"calibration.tokens must be at least 1, not {tokens}.")
    given = tree["model"]["layers"]
    layers = coerce([given] if isinstance(given, int) else given, str | tuple[int, ...] | None, "model.layers")
    return {
        **tree,
        **values,
        "store": None if store is None else str(store),
        "calibration": {"tokens": tokens},
        "model": {**tree["model"], "layers": layers},
    }
