"""Settings: composed, checked, expanded; and whatever is typed, never a traceback."""

from __future__ import annotations

import dataclasses
import string

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moebench.bench import config
from moebench.bench.config import EngineConfig
from moebench.bench.plan import make_plan, plan_lines
from moebench.contracts import AXES, Descriptor, MoebenchError, Registry

MEMORY, CACHE = 8e9, 32e6
REGISTRY = Registry.load()


def load(*overrides):
    return config.load(overrides, REGISTRY, MEMORY, CACHE)


def told(*overrides):
    """Return the one sentence that the settings earn."""
    with pytest.raises(MoebenchError) as caught:
        make_plan(load(*overrides), REGISTRY, MEMORY)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def names(loaded, axis):
    (block,) = loaded.blocks
    return [getattr(value, "name", value) for value in block.axes[axis]]


# ---------------------------------------------------------------------------------------------------------------------
# What is meant is understood


def test_the_defaults_of_a_suite_stand():
    loaded = load("suite=selftest")
    assert names(loaded, "model") == ["tiny"]
    assert names(loaded, "backend") == ["eager", "grouped", "reference"]
    assert loaded.engine.processes == 1


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [("eager", ["eager"]), ("[eager,grouped]", ["eager", "grouped"]), ("all", REGISTRY.names("backend"))],
)
def test_an_axis_is_a_value_a_list_or_all(given_value, expected):
    assert names(load(f"axes.backend={given_value}"), "backend") == expected


def test_a_list_for_a_scalar_parameter_is_one_more_axis_for_its_owner_only():
    loaded = load("axes.routing=[topk,moepp]", "params.routing.moepp.tau=[0.25,0.75]")
    (block,) = loaded.blocks
    assert [(choice.name, choice.params.get("tau")) for choice in block.axes["routing"]] == [
        ("topk", None),
        ("moepp", 0.25),
        ("moepp", 0.75),
    ]


def test_what_was_composed_before_leaves_no_trace(monkeypatch):
    from_environment = "store=${oc.env:MOEBENCH_TEST_STORE}"
    for folder in ("one", "two"):
        monkeypatch.setenv("MOEBENCH_TEST_STORE", folder)
        assert load(from_environment).store == folder
    first = load("suite=selftest")
    first.shown["params"]["routing"].clear()
    assert load("suite=selftest").shown["params"]["routing"]
    more = Registry.load()
    more.add(Descriptor("routing", "another", "One more.", "nowhere:x", params=EngineConfig))
    assert "another" not in load("suite=selftest").shown["params"]["routing"]
    shown = config.load(["suite=selftest"], more, MEMORY, CACHE).shown["params"]["routing"]
    assert shown["another"] == dataclasses.asdict(EngineConfig())
    assert "another" not in load("suite=selftest").shown["params"]["routing"]


def test_nothing_means_none():
    assert names(load("axes.quantization=[null,int8]"), "quantization") == ["none", "int8"]


def test_one_layer_needs_no_list():
    assert load("model.layers=3").blocks[0].layers == (3,)


def test_every_axis_has_a_value_in_every_suite():
    for suite in REGISTRY.names("suite"):
        (block,) = load(f"suite={suite}").blocks
        assert set(block.axes) == set(AXES)
        assert all(block.axes.values())


def test_an_experiment_is_a_suite_too_and_the_command_line_has_the_last_word():
    by_suite, by_name = load("suite=quick", "seed=7"), load("experiment=quick", "seed=7")
    assert by_suite.blocks == by_name.blocks
    assert len(by_suite.blocks) > 1
    assert {block.seed for block in by_suite.blocks} == {7}


def test_no_experiment_hides_a_suite():
    assert not set(config.experiment_names()) & set(REGISTRY.names("suite"))


def test_the_part_of_the_memory_is_that_of_the_command_line():
    assert load("engine.memory=0.25").blocks[0].memory_bytes == 0.25 * MEMORY


# ---------------------------------------------------------------------------------------------------------------------
# What is mistyped gets a suggestion


@pytest.mark.parametrize(
    ("override", "wrong", "meant"),
    [
        ("suite=selftset", "unknown suite 'selftset'", "selftest"),
        ("suite=quikc", "unknown suite 'quikc'", "quick"),
        ("model=smol", "unknown model 'smol'", "small"),
        ("experiment=quik", "unknown experiment 'quik'", "quick"),
        ("axes.bakend=eager", "unknown setting of axes 'bakend'", "backend"),
        ("axis.backend=eager", "unknown setting 'axis'", "axes"),
        ("engine.second=1", "unknown setting of engine 'second'", "seconds"),
        ("calibration.token=1", "unknown setting of calibration 'token'", "tokens"),
        ("params.routin.topk.k=1", "unknown setting of params 'routin'", "routing"),
        ("params.routing.topkk.k=1", "unknown routing 'topkk'", "topk"),
        ("params.routing.moepp.taus=1", "unknown parameter of routing 'moepp' 'taus'", "tau"),
        ("model.hiden=3", "unknown parameter of model 'hiden'", "hidden"),
        ("seeds=3", "unknown setting 'seeds'", "seed"),
        ("+sed=3", "unknown setting 'sed'", "seed"),
        ("axes.model=tinny", "unknown model 'tinny'", "tiny"),
        ("axes.structure=splitt", "unknown structure 'splitt'", "split"),
        ("axes.routing=topkk", "unknown routing 'topkk'", "topk"),
        ("axes.quantization=int5", "unknown quantization 'int5'", "int4"),
        ("axes.sparsity=teel", "unknown sparsity 'teel'", "teal"),
        ("axes.backend=[eager,groupd]", "unknown backend 'groupd'", "grouped"),
        ("axes.traffic=zipff", "unknown traffic 'zipff'", "zipf"),
        ("axes.dtype=float31", "unknown value of axes.dtype 'float31'", "float32"),
        ("axes.pass=foward", "unknown value of axes.pass 'foward'", "forward"),
        ("axes.boundary=topj", "unknown value of axes.boundary 'topj'", "topk"),
        ("axes.residency=col", "unknown value of axes.residency 'col'", "cold"),
    ],
)
def test_a_mistyped_name_gets_a_suggestion(override, wrong, meant):
    sentence = told(override)
    assert sentence.startswith(wrong)
    assert f"did you mean '{meant}'" in sentence or f"or '{meant}'" in sentence


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("selftest", "'selftest' is no setting: write NAME=VALUE"),
        ("--plam", "'--plam' is no setting"),
        ("~seed=0", "would take a setting away"),
        ("axes.tokens=0", "axes.tokens takes whole numbers from 1, not 0"),
        ("axes.tokens=1.5", "axes.tokens takes whole numbers from 1, not 1.5"),
        ("axes.threads=all", "axes.threads=all has no meaning"),
        ("axes.tokens=[]", "the plan has no cases"),
        ("model.layers=[]", "the plan has no cases"),
        ("model.layers=[9]", "layer 9 holds no experts; choose from [0, 1, 2, 3]"),
        ("model.layers=some", "give all, moe or a list"),
        ("model.k=17", "k=17 must lie between 1 and experts=16"),
        ("model.std=nan", "must be a finite number"),
        ("engine.processes=0", "processes must be at least 1"),
        ("engine.seconds=0", "seconds must be a number greater than 0"),
        ("engine.seconds=inf", "must be a finite number"),
        ("seed=abc", "seed must be of type int, not 'abc'"),
        ("combine=triples", "combine must be one of product, pairs"),
        ("store=[a]", "store must be a folder"),
        ("calibration.tokens=0", "calibration.tokens must be at least 1"),
        ("params.routing.topk=5", "write params.<axis>.<name>.<parameter>=VALUE"),
        ("axes=null", "write axes.<axis>=VALUE"),
        ("axes.backend=[eager", "the settings cannot be read"),
        ("seed=${nothing}", "the settings cannot be read"),
    ],
)
def test_a_wrong_value_is_told(override, words):
    assert words in told(override)


def test_the_engine_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="precision must be a number greater than 0"):
        EngineConfig(precision=float("nan"))


# ---------------------------------------------------------------------------------------------------------------------
# Whatever is typed

KEYS = [
    *(f"axes.{axis}" for axis in AXES),
    *("suite", "model", "experiment", "seed", "device", "combine", "store", "axes", "params", "engine", "calibration"),
    *("model.layers", "model.k", "suite.size", "engine.seconds", "engine.processes", "calibration.tokens"),
    *("params.routing", "params.routing.moepp.tau", "params.quantization.int4.group", "params.traffic.zipf.alpha"),
]
VALUES = [
    "",
    "null",
    "all",
    "[]",
    "{}",
    "[[]]",
    "{a:1}",
    "[null]",
    "true",
    "-1",
    "0",
    "1e400",
    "nan",
    "inf",
    "''",
    "eager",
]
VALUES += [
    "[1,2]",
    "1,2",
    "${seed}",
    "${oc.env:HOME}",
    "${",
    "[",
    "\\",
    "float32",
    "topk",
    "tiny",
    "selftest",
    "roofline",
]
text = st.text(alphabet=string.printable, max_size=12)
key = st.one_of(st.sampled_from(KEYS), text, st.builds("{}.{}".format, st.sampled_from(KEYS), text))
setting = st.one_of(
    st.builds("{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), key, st.one_of(st.sampled_from(VALUES), text)),
    text,
)


@given(st.lists(setting, min_size=1, max_size=3))
@example(["axes.backend=\x00"])
@example(["params.quantization.int4.group=null", "axes.quantization=int4"])
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_malformed_settings_are_told_in_one_sentence(overrides):
    try:
        plan = make_plan(load(*overrides), REGISTRY, MEMORY)
    except MoebenchError as error:
        sentence = str(error)
    else:
        sentence = "\n".join(plan_lines(plan, REGISTRY))
    assert sentence.strip()
    assert "Traceback" not in sentence
