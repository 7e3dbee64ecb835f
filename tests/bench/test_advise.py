"""``moebench advise``: hit rates against the real cache, times by hand, what fits, and what a terminal shows."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.backends.offload.access import Access, Layout
from moebench.backends.offload.cache import Cache
from moebench.backends.offload.policies.recency import LRU
from moebench.bench.advise.advice import advise
from moebench.bench.advise.asked import Asked
from moebench.bench.advise.caching import lru_hit_rate, static_hit_rate, touch_probabilities
from moebench.bench.advise.counts import Layer, Model, scratch_bytes
from moebench.bench.advise.forms import FORMS, weights_in
from moebench.bench.advise.hardware import DEFAULTS, Hardware, Rate, given_rates
from moebench.bench.advise.placements import LARGEST_BATCH, NoRoom, Placement, placements
from moebench.bench.advise.predict import Load, Split, predict, touched_experts
from moebench.bench.advise.readers import read_model
from moebench.bench.advise.source import Described
from moebench.bench.cli import main
from moebench.contracts import MoebenchError

FOLDER = Path(__file__).parent / "advise"
GOLDEN = Path(__file__).parent / "golden"
GIB = 2**30


def public(name):
    return read_model(json.loads((FOLDER / f"{name}.json").read_text()))


# --- hit rates --------------------------------------------------------------------------------------------------------


def accesses(layers, experts, k, steps, popularity, seed):
    """What tokens ask for that choose k distinct experts independently of each other."""
    rng = random.Random(seed)
    for step in range(steps):
        for layer in range(layers):
            chosen: set[int] = set()
            while len(chosen) < k:
                chosen.add(rng.choices(range(experts), popularity)[0])
            yield Access(step, layer, tuple(sorted(chosen)), (1,) * k, (1.0,) * k)


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.3, 0.5, 0.8])
def test_lru_by_formula_is_lru_as_it_runs(share, skew):
    layers, experts, k, steps = 12, 16, 2, 300
    layout = Layout(tuple(range(layers)), experts)
    cache = Cache(LRU(), round(share * layout.size), layout)
    popularity = [(place + 1) ** -skew for place in range(experts)]
    for access in accesses(layers, experts, k, steps, popularity, seed=7):
        cache.access(access)
    found = lru_hit_rate(touch_probabilities(experts, k, skew), layers, cache.capacity)
    assert found == pytest.approx(cache.tally.hit_rate, abs=0.04)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 64), st.integers(1, 8), st.floats(0, 3), st.integers(1, 64), st.floats(0, 1))
def test_rates_are_shares(experts, k, skew, batch, share):
    k = min(k, experts)
    touched = touch_probabilities(experts, k, skew, batch)
    assert sum(touch_probabilities(experts, k, skew)) == pytest.approx(k, rel=1e-6)
    assert all(0 <= q <= 1 for q in touched)
    static, lru = static_hit_rate(touched, share), lru_hit_rate(touched, 4, share * 4 * experts)
    assert share - 1e-9 <= static <= 1 + 1e-9
    assert 0 <= lru <= 1
    assert lru <= lru_hit_rate(touched, 4, min(1.0, share + 0.1) * 4 * experts) + 1e-9


def test_rates_that_are_known():
    assert touch_probabilities(8, 2, batch=3) == [pytest.approx(1 - 0.75**3)] * 8
    uniform = touch_probabilities(8, 2)
    assert static_hit_rate(uniform, 0.3) == pytest.approx(0.3)
    assert lru_hit_rate(uniform, 10, 80) == 1.0
    assert lru_hit_rate(uniform, 10, 19) == 0.0  # smaller than a step
    assert lru_hit_rate(uniform, 10, 20) == pytest.approx(0.25, abs=1e-3)  # exactly one step


# --- times ------------------------------------------------------------------------------------------------------------

TOY = Model(
    "toy",
    hidden=10,
    vocabulary=100,
    layers=(Layer(attention=400, expert=300, experts=4, k=1, rest=40, width=10, kv_values=8),) * 2,
    embedding=1000,
    head=1000,
    rest=20,
)
SLOW = Hardware(
    10**6, 10**6, {name: Rate(value, "given") for name, value in zip(DEFAULTS, (100, 10, 20, 5, 1e9, 1e9), strict=True)}
)


def test_a_step_by_hand():
    weights = weights_in(TOY, FORMS["bfloat16"])
    load = Load(batch=2, context=3)
    touched = 2 * 4 * (1 - 0.75**2)  # experts of both layers that two tokens use
    assert touched_experts(TOY, load) == pytest.approx(touched)
    always = 2 * (2 * 440 + 1000 + 20) + 2 * 3 * 2 * 8 * 2  # the embedding is not read; two sequences of three tokens
    made = predict(TOY, weights, SLOW, load, Split("vram", "vram", 0.25, "link"))
    assert [(term.tier, term.seconds) for term in made.terms] == [
        ("vram", pytest.approx(always / 100)),
        ("vram", pytest.approx(touched * 600 * 0.25 / 100)),
        ("link", pytest.approx(touched * 600 * 0.75 / 10)),
        ("vram", pytest.approx(touched * 600 * 0.75 / 100)),
    ]
    assert made.serial == pytest.approx(sum(term.seconds for term in made.terms))
    assert made.overlapped == pytest.approx(touched * 600 * 0.75 / 10)
    assert made.tokens_per_s == pytest.approx(2 / made.serial)


def test_flops_decide_where_bytes_do_not():
    weights, slow = weights_in(TOY, FORMS["bfloat16"]), SLOW.with_rates({"cpu": Rate(1.0, "given")})
    made = predict(TOY, weights, slow, Load(batch=2, context=3), Split("ram", "ram"))
    assert made.serial == pytest.approx(2 * 2 * (2 * 440 + 1000 + 20) + 2 * 2 * 2 * 300)
    in_place = predict(TOY, weights, slow, Load(batch=2, context=3), Split("vram", "vram", 0.0, "ram"))
    assert in_place.terms[-1].seconds == pytest.approx(2 * 2 * 2 * 300)
    assert in_place.terms[-1].tier == "ram"


def test_a_tied_head_is_read():
    tied = replace(TOY, head=0)
    weights = weights_in(tied, FORMS["bfloat16"])
    made = predict(tied, weights, SLOW, Load(context=0), Split("ram", "ram"))
    assert made.terms[0].seconds == pytest.approx(2 * (2 * 440 + 1000 + 20) / 20)


# --- what fits --------------------------------------------------------------------------------------------------------

NAMES = ["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3", "granite-1b-a400m", "jamba-v0.1"]


def asked(name, form, vram, ram, **load):
    model = public(name)
    return Asked(model, weights_in(model, FORMS[form]), Hardware(vram, ram, DEFAULTS), Load(**load))


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(NAMES),
    st.sampled_from(["bfloat16", "int4"]),
    st.integers(0, 100),
    st.integers(1, 1500),
    st.booleans(),
)
def test_what_is_placed_fits_and_more_memory_never_hurts(name, form, vram, ram, search):
    def best(own):
        times = []
        for one in placements(own, search):
            if isinstance(one, NoRoom):
                continue
            assert one.vram <= own.hardware.vram + 1
            assert one.ram <= own.hardware.ram + 1
            assert 0 <= one.hit <= 1
            assert one.prediction.overlapped <= one.prediction.serial * (1 + 1e-12)
            times.append(1 / one.prediction.tokens_per_s)
        return min(times, default=float("inf"))

    own = asked(name, form, vram * GIB, ram * GIB)
    now = best(own)
    roomy = replace(own, hardware=replace(own.hardware, ram=2 * own.hardware.ram))
    assert best(roomy) <= now * (1 + 1e-9)
    if vram:
        assert best(replace(own, hardware=replace(own.hardware, vram=2 * own.hardware.vram))) <= now * (1 + 1e-9)


def by_name(own, search=False):
    return {one.name: one for one in placements(own, search)}


def test_the_sum_of_what_does_not_fit():
    own = asked("mixtral-8x7b", "int4", 24 * GIB, 64 * GIB, context=32768)
    refusal = by_name(own)["everything in VRAM"]
    assert refusal == NoRoom(
        "everything in VRAM",
        "int4",
        "22.3 GiB of experts + 1.2 GiB of other weights + 4.0 GiB KV + 200.1 MiB scratch = 27.7 GiB > 24.0 GiB VRAM",
    )
    total = own.weights.total + 4 * GIB + scratch_bytes(own.model, 1)
    fits = replace(own, hardware=Hardware(total, 64 * GIB, DEFAULTS))
    assert isinstance(by_name(fits)["everything in VRAM"], Placement)
    less = replace(own, hardware=Hardware(total - 1, 64 * GIB, DEFAULTS))
    assert isinstance(by_name(less)["everything in VRAM"], NoRoom)


def test_layers_in_ram_are_as_few_as_possible():
    found = by_name(asked("mixtral-8x7b", "int4", 24 * GIB, 64 * GIB, context=32768))
    own = found["cpu_moe:6"]
    layer = own.ram / 6
    assert own.vram <= 24 * GIB < own.vram + layer
    assert own.hit == 26 / 32
    assert own.as_in == "llama.cpp --n-cpu-moe 6"


def test_without_a_gpu_nothing_is_said_of_one():
    found = by_name(asked("qwen3-30b-a3b", "int4", 0, 8 * GIB))
    assert set(found) == {"everything in RAM", "cache in RAM, fetched from disk"}
    cache = found["cache in RAM, fetched from disk"]
    assert cache.ram == pytest.approx(8 * GIB)
    assert cache.disk == cache_bytes(cache, "qwen3-30b-a3b")


def cache_bytes(placement, name):
    model = public(name)
    return weights_in(model, FORMS[placement.form]).parts["experts"]


def test_throughput_takes_the_batch_that_fits():
    own = asked("gpt-oss-20b", "mxfp4", 24 * GIB, 64 * GIB, context=32768)
    found = by_name(own, search=True)["everything in VRAM"]
    assert found.load.batch == 8
    doubled = replace(own, load=Load(16, 32768))
    assert isinstance(by_name(doubled)["everything in VRAM"], NoRoom)
    short = replace(own, load=Load(1, 16))
    assert by_name(short, search=True)["everything in VRAM"].load.batch == LARGEST_BATCH


def test_nothing_fits():
    found = by_name(asked("deepseek-v3", "fp8", 0, GIB))
    assert all(isinstance(one, NoRoom) for one in found.values())


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def say(tmp_path, capsys, monkeypatch):
    """Run the command on a store without probes; return status, output and errors."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(name, *arguments):
        file = FOLDER / f"{name}.json"
        status = main(["advise", str(file if file.exists() else name), "--store", str(tmp_path), *arguments])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("golden", "name", "arguments"),
    [
        ("advise.txt", "mixtral-8x7b", ("--vram", "24G", "--ram", "64G", "--context", "32k")),
        ("advise_disk.txt", "deepseek-v3", ("--vram", "0", "--ram", "128G", "--form", "int4", "--skew", "0.8")),
    ],
)
def test_what_a_terminal_shows(golden, name, arguments, say):
    status, out, _ = say(name, *arguments, "--device", "rtx-5090", "--rate", "link=50G", "--rate", "cpu=2T")
    assert status == 0
    assert out == (GOLDEN / golden).read_text()


def test_json_says_the_same(say):
    arguments = ("mixtral-8x7b", "--vram", "24G", "--ram", "64G", "--context", "32k")
    said = json.loads(say(*arguments, "--json")[1])
    text = say(*arguments)[1]
    assert said["model"]["weights"] == 46702792704
    assert said["kv_bytes"] == 4 * GIB
    assert said["rates"]["ram"] == {"value": 50e9, "source": "assumed"}
    assert {one["evidence"] for one in said["ranked"]} == {"model"}
    for one in said["does_not_fit"]:
        assert f"{one['form']}, {one['placement']}: {one['sum']}" in text
    for one in said["ranked"]:
        assert one["tpot_s"] == pytest.approx(sum(term["seconds"] for term in one["terms"]))
    assert [one["tpot_s"] for one in said["ranked"]] == sorted(one["tpot_s"] for one in said["ranked"])
    throughput = json.loads(say(*arguments, "--json", "--goal", "throughput")[1])
    rates = [one["tokens_per_s"] for one in throughput["ranked"]]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--vram", "lots"), "'lots' is not a size"),
        (("--context", "1.5"), "whole number"),
        (("--context", "4T"), "more than any model has"),
        (("--batch", "0"), "--batch takes"),
        (("--form", "int3"), "did you mean 'int8'"),
        (("--device", "rtx-5091"), "did you mean 'rtx-5090'"),
        (("--rate", "vran=1G"), "did you mean 'vram'"),
        (("--rate", "vram"), "is not a rate"),
        (("--rate", "vram=0"), "no rate above 0"),
        (("--skew", "nan"), "--skew takes"),
        (("--top", "0"), "--top takes"),
        (("--validate",), "leave out MODEL"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, told, say):
    status, out, err = say("mixtral-8x7b", *arguments)
    assert (status, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_what_is_stored_in_an_unknown_way_can_be_planned_in_another(say, tmp_path):
    config = json.loads((FOLDER / "mixtral-8x7b.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "aqlm"}}))
    assert "choose with --form" in say(str(path))[2]
    assert say(str(path), "--form", "int4", "--ram", "64G")[0] == 0


def test_names_do_not_command_a_terminal(say, tmp_path):
    folder = tmp_path / "a\x1b[31mred\nfake"
    folder.mkdir()
    config = (FOLDER / "mixtral-8x7b.json").read_text()
    (folder / "config.json").write_text(config)
    assert say(str(folder))[1].splitlines()[0].startswith("a\N{REPLACEMENT CHARACTER}[31mred fake (mixtral)")
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "model_type": "\x1b[31m"}))
    assert "\x1b" not in say(str(folder))[2]


def test_a_small_machine_is_told_what_to_change(say):
    _, out, _ = say("deepseek-v3", "--vram", "0", "--ram", "1G")
    assert "nothing fits; give more --vram or --ram" in out


def test_rates_come_from_probes_of_this_host(say, tmp_path):
    import runpy

    from moebench.bench import host

    stored = runpy.run_path(str(Path(__file__).with_name("stored.py")))
    probe = {"suite": "roofline", "group_key": "probe"}
    cases = [
        stored["case"]("a", metrics={"bandwidth_DRAM": 1e10}, case_key=stored["key"]("a"), **probe),
        stored["case"]("b", metrics={"bandwidth_DRAM": 2e10}, case_key=stored["key"]("b"), threads=2, **probe),
        stored["case"]("c", metrics={"peak_flops": 3e11}, case_key=stored["key"]("c"), dtype="bfloat16", **probe),
    ]
    stored["write_run"](tmp_path, 0, *cases, host=host.host_facts()["host_key"])
    stored["write_run"](tmp_path, 1, stored["case"]("d", metrics={"bandwidth_DRAM": 9e10}, **probe), host="other")
    rates = json.loads(say("mixtral-8x7b", "--json")[1])["rates"]
    assert rates["ram"] == {"value": 2e10, "source": "measured here"}
    assert rates["cpu"] == {"value": 3e11, "source": "measured here"}
    assert rates["disk"]["source"] == "assumed"
    assert json.loads(say("mixtral-8x7b", "--json", "--rate", "ram=1G")[1])["rates"]["ram"]["source"] == "given"


def test_given_rates():
    assert given_rates(["link=25G", "cpu=2T"]) == {"link": Rate(25e9, "given"), "cpu": Rate(2e12, "given")}
    with pytest.raises(MoebenchError):
        given_rates(["=25G"])


def test_forms_beside_the_stored_one():
    model = public("gpt-oss-20b")
    described = Described("x", model, weights_in(model, FORMS["mxfp4"]), "config.json")
    advice = advise(described, Hardware(0, 64 * GIB, DEFAULTS), Load(), "tpot")
    assert [form.form for form in advice.forms] == ["mxfp4", "int4"]  # int8 would take more


def test_advice_imports_no_torch():
    code = (
        "import sys\nfrom moebench.bench.cli import main\n"
        f"main(['advise', {str(FOLDER / 'mixtral-8x7b.json')!r}])\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().splitlines()[-1] == "set()"
