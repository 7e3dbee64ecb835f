"""Names, parameters and the registry of plug-ins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.contracts import (
    KINDS,
    Descriptor,
    MoebenchError,
    Registry,
    build_params,
    canonical_json,
    coerce,
    load_attribute,
    make_key,
    metadata,
    unknown,
)


@dataclass(frozen=True)
class Params:
    k: int = 2
    tau: float = 0.5
    rule: Literal["a", "b"] = "a"
    group: int | None = None
    sites: tuple[str, ...] = ()
    levels: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1.")


def plugin(name="mine", kind="backend", **more):
    return Descriptor(kind, name, "a test", "moebench.backends.eager:create", **more)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        ({}, Params()),
        ({"k": 3.0}, Params(k=3)),
        ({"tau": 1}, Params(tau=1.0)),
        ({"group": None}, Params(group=None)),
        ({"group": 32}, Params(group=32)),
        ({"sites": ["x", "y"]}, Params(sites=("x", "y"))),
        ({"levels": {"L1": 1}}, Params(levels={"L1": 1})),
    ],
)
def test_values_become_what_is_declared(given_value, expected):
    made = build_params(Params, given_value, "routing 'mine'")
    assert made == expected
    assert type(made.tau) is float
    assert type(made.k) is int


@pytest.mark.parametrize(
    ("given_value", "words"),
    [
        ({"taus": 1}, "unknown parameter of routing 'mine' 'taus': did you mean 'tau'?"),
        ({"k": 2.5}, "routing 'mine': parameter 'k' must be of type int, not 2.5."),
        ({"k": True}, "must be of type int, not True"),
        ({"k": "2"}, "must be of type int, not '2'"),
        ({"tau": float("nan")}, "must be a finite number, not nan"),
        ({"tau": True}, "must be of type float"),
        ({"rule": "c"}, "must be one of a, b, not 'c'"),
        ({"group": "x"}, "must be of type int, not 'x'"),
        ({"sites": "x"}, "must be of type tuple"),
        ({"sites": [1]}, "must be of type str, not 1"),
        ({"k": 0}, "routing 'mine': k=0 must be at least 1."),
    ],
)
def test_other_values_are_told(given_value, words):
    with pytest.raises(MoebenchError) as caught:
        build_params(Params, given_value, "routing 'mine'")
    assert words in str(caught.value)


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_coercion_gives_the_type_or_a_sentence(value):
    for hint in (int, float, str, bool, int | None, tuple[int, ...], Literal["a"]):
        try:
            made = coerce(value, hint, "here")
        except MoebenchError as error:
            told = str(error)
        else:
            told = "here"
            assert made is None or type(made) in (int, float, str, bool, tuple)
        assert told.startswith("here")


def test_a_plugin_without_parameters_takes_none():
    assert plugin().choose().params == {}
    with pytest.raises(MoebenchError, match="backend 'mine' has no parameter 'k'"):
        plugin().choose({"k": 1})


def test_a_choice_has_its_defaults_filled_in():
    assert plugin(params=Params).choose({"k": 3}).params["tau"] == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def test_keys_do_not_depend_on_order_or_container():
    assert make_key({"b": (1, 2), "a": {"y", "x"}}) == make_key({"a": ["x", "y"], "b": [1, 2]})
    assert canonical_json({"b": 1.0, "a": None}) == '{"a":null,"b":1.0}'


@pytest.mark.parametrize("value", [object(), {"a": b"x"}, float("nan")])
def test_what_has_no_canonical_form_has_no_key(value):
    with pytest.raises((TypeError, ValueError)):
        make_key(value)


# ---------------------------------------------------------------------------------------------------------------------
# The registry


def test_a_name_and_its_aliases_lead_to_one_plugin():
    registry = Registry()
    registry.add(plugin(aliases=("me", "myself")))
    assert {registry.get("backend", name).name for name in ("mine", "me", "myself")} == {"mine"}
    assert registry.names("backend") == ["mine"]


@pytest.mark.parametrize("second", [plugin(), plugin("other", aliases=("mine",)), plugin("me")])
def test_a_name_is_taken_once(second):
    registry = Registry()
    registry.add(plugin(aliases=("me",)))
    with pytest.raises(MoebenchError, match=r"two plug-ins of kind backend are called '(mine|me)'; rename one"):
        registry.add(second)


def test_the_same_name_may_serve_two_kinds():
    registry = Registry()
    registry.add(plugin(), plugin(kind="routing"))
    assert registry.get("routing", "mine").kind == "routing"


def test_an_unknown_name_gets_the_nearest_ones_and_none_gets_all():
    assert unknown("backend", "grped", ["grouped", "eager"]) == "unknown backend 'grped': did you mean 'grouped'?"
    assert unknown("backend", "xyz", ["b", "a"]) == "unknown backend 'xyz': known: a, b."
    assert unknown("backend", "xyz", []) == "unknown backend 'xyz': known: none."
    with pytest.raises(MoebenchError, match="did you mean 'eager'"):
        Registry.load().get("backend", "eagre")


@pytest.mark.parametrize("wrong", ["text", None, 3, object])
def test_only_descriptors_are_plugins(wrong):
    with pytest.raises(MoebenchError, match="is no plug-in"):
        Registry().add(wrong)


def test_a_descriptor_is_checked_when_it_is_made():
    with pytest.raises(MoebenchError, match="unknown plug-in kind 'bakend': did you mean 'backend'"):
        plugin(kind="bakend")
    with pytest.raises(MoebenchError, match="must be a dataclass type"):
        plugin(params=dict)


class Point:
    """An entry point as importlib.metadata gives them."""

    def __init__(self, name: str, loaded: Any):
        self.name, self.value, self._loaded = name, f"package:{name}", loaded

    def load(self) -> Any:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


def test_entry_points_are_read_and_a_broken_one_is_named(monkeypatch):
    points = [
        Point("one", plugin("one")),
        Point("many", [plugin("two"), plugin("three")]),
        Point("broken", ImportError("no module named 'gone'")),
        Point("taken", plugin("eager")),
        Point("nothing", 3),
    ]
    installed = SimpleNamespace(select=lambda group: points if group == "moebench.backend" else [])
    monkeypatch.setattr(metadata, "entry_points", lambda: installed)
    registry = Registry.load()
    assert {"one", "two", "three", "eager"} <= set(registry.names("backend"))
    assert len(registry.problems) == 3
    assert registry.problems[0] == ("plug-in broken (package:broken) could not be loaded: no module named 'gone'")


def test_every_builtin_plugin_says_what_it_is_and_its_factory_exists():
    registry = Registry.load()
    assert registry.problems == []
    for kind in KINDS:
        assert registry.all(kind)
        for descriptor in registry.all(kind):
            assert descriptor.summary
            assert callable(load_attribute(descriptor.factory)), descriptor.factory


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nothing", "names no object"),
        ("moebench.backends.eager:creat", "did you mean 'create'"),
        ("no.py:x", "check the path"),
    ],
)
def test_a_target_that_leads_nowhere_is_told(target, words):
    with pytest.raises(MoebenchError, match=words):
        load_attribute(target)
