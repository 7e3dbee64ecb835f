"""``moebench advise --measure`` and ``--validate``: what is counted of a case, what calls cost, and what is kept."""

from __future__ import annotations

import json
import runpy
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.bench import host
from moebench.bench.advise import measure, validate
from moebench.bench.advise.cases import case_model, case_prediction, case_split, case_weights
from moebench.bench.advise.hardware import DEFAULTS, Hardware
from moebench.bench.advise.program import Program, Run, Runs, fit
from moebench.bench.advise.readers import read_model
from moebench.bench.advise.validate import COMMON, Compared, Measured
from moebench.bench.cli import main
from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry

stored = runpy.run_path(str(Path(__file__).with_name("stored.py")))
tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_models.py"))["build"]
CONFIG = Path(__file__).parent / "advise" / "mixtral-8x7b.json"
MACHINE = Hardware(0, 0, DEFAULTS)


@pytest.fixture(scope="module")
def registry():
    return Registry.load()


@cache
def timed(registry, *settings):
    """The cases of these settings that are timed, by backend."""
    plan, _ = planned([*COMMON, *settings], registry)
    return {case.backend.name: case for case in plan.cases if case.protocol == "timed"}


# --- what is counted of a case ----------------------------------------------------------------------------------------


def test_layers_alone_are_counted_by_hand(registry):
    case = timed(registry, "model=small", "axes.traffic=gaussian")["eager"]
    model = case_model(case, registry)
    assert len(model.layers) == 4
    expected = {"experts": 4 * 16 * 3 * 512 * 256, "rest": 4 * 16 * 512}
    assert {part: count for part, count in model.parameters().items() if count} == expected
    assert case_weights(case, model).total == 4 * sum(expected.values())


def test_a_language_model_is_counted_whole(registry):
    case = timed(registry, "model=tiny-olmoe", "axes.traffic=recorded")["eager"]
    model = case_model(case, registry)
    assert model.parameters() == read_model(registry.params("model", case.model).config()).parameters()
    alone = timed(registry, "model=tiny-olmoe", "axes.traffic=gaussian")["eager"]
    assert case_model(alone, registry).parameters()["attention"] == 0


def test_quantized_experts_take_their_bits(registry):
    settings = ("model=small", "axes.traffic=gaussian", "axes.dtype=bfloat16", "axes.backend=packed")
    case = timed(registry, *settings, "axes.quantization=int4")["packed"]
    weights = case_weights(case, case_model(case, registry))
    assert weights.parts["experts"] == 4 * 16 * 3 * 512 * 256 * 4.25 / 8
    assert weights.parts["rest"] == 2 * 4 * 16 * 512
    other = replace(case, quantization=replace(case.quantization, name="hqq"))
    with pytest.raises(MoebenchError, match="no time is predicted for quantization 'hqq'"):
        case_weights(other, case_model(case, registry))


def test_where_a_case_has_its_experts(registry):
    cases = timed(registry, "model=small", "axes.traffic=gaussian", "params.backend.offload.capacity=0.5")
    model = case_model(cases["eager"], registry)
    assert case_split(cases["eager"], model).hit == 1.0
    split = case_split(cases["offload"], model)
    assert split.way == "disk"
    assert 0.3 < split.hit < 0.6
    ours = replace(MACHINE, program=Program(1.0, 0.1, 0.01, 0.001))  # and the whole of the rates
    for case, missing in ((cases["eager"], 0.0), (cases["offload"], 1 - split.hit)):
        more = case_prediction(case, registry, ours).serial - case_prediction(case, registry, MACHINE).serial
        assert more == pytest.approx(4 * 1.0 + 16 * 0.1 + 16 * missing * 0.01)


# --- what calls cost --------------------------------------------------------------------------------------------------

calls, shares = st.floats(1e-6, 1e-2), st.floats(0.1, 1.0)
RAM, DISK = 5e9, 1e9


def run_of(program, layers, decoders, used, brought=0.0, ram_bytes=0.0, disk_bytes=0.0):
    """A run as long as a program says."""
    seconds = program.calls(layers, decoders, used, brought)
    seconds += ram_bytes / (RAM * program.ram) + disk_bytes / (DISK * program.disk)
    return Run(seconds, layers, decoders, used, brought, ram_bytes, disk_bytes)


@given(st.builds(Program, calls, calls, calls, calls, shares, shares))
def test_a_program_is_found_again_from_its_times(program):
    runs = Runs(
        run_of(program, 4, 0, 4),
        run_of(program, 4, 0, 24),
        run_of(program, 4, 0, 24, 9),
        run_of(program, 3, 0, 6, 0, 4e8),
        run_of(program, 3, 0, 6, 5, 4e8, 3e8),
        run_of(program, 4, 4, 8, 0, 1e6),
    )
    found = fit(runs, RAM, DISK)
    for name in ("layer", "expert", "brought", "decoder", "ram", "disk"):
        assert getattr(found, name) == pytest.approx(getattr(program, name), rel=1e-4, abs=1e-9)


def test_noise_makes_nothing_negative():
    short = Run(0.1, 3, 0, 6, 5, 4e8, 3e8)
    runs = Runs(
        Run(1.0, 4, 0, 4, 0, 0, 0), Run(0.5, 4, 0, 24, 0, 0, 0), short, short, short, Run(0.1, 4, 4, 8, 0, 0, 0)
    )
    assert fit(runs, RAM, DISK) == Program(0.25, 0.0, 0.0, 0.0, 1.0, 1.0)


def pretend(monkeypatch, store, truth, off):
    """Let suite ``offload`` have taken what ``truth`` predicts, and the validated model ``off`` times as long."""
    days = iter(range(100))

    def run(settings, registry, folder, quiet):
        names = {"eager": "eager", "offload": "offload"}
        plan = timed(registry, *[one for one in settings if one not in COMMON])
        made, rows = [], []
        for case in (plan[name] for name in names):
            model = case_model(case, registry)
            split = case_split(case, model)
            misses = (1 - split.hit) * sum(layer.k for layer in model.layers)
            seconds = case_prediction(case, registry, replace(MACHINE, program=truth)).serial
            seconds *= off if case.model.name == "small" else 1.0
            made.append((case, seconds, {"misses_per_step": misses}))
            rows.append(stored["case"](case.backend.name, seconds * 1e6, case_key=case.case_key, suite="offload"))
        run_id = stored["write_run"](store, next(days), *rows, host=host.host_facts()["host_key"])
        return [Measured(case, run_id, seconds, metrics) for case, seconds, metrics in made]

    monkeypatch.setattr(validate, "run_suite", run)
    monkeypatch.setattr(validate, "VALIDATION", {"small": validate.VALIDATION["small"]})
    probe = {"suite": "roofline", "group_key": "probe"}
    rates = {"bandwidth_DRAM": DEFAULTS["ram"].value, "bandwidth_disk": DEFAULTS["disk"].value}
    rates["peak_flops"] = DEFAULTS["cpu"].value
    probes = [
        stored["case"](name, metrics={name: rate}, case_key=stored["key"](name), **probe)
        for name, rate in rates.items()
    ]
    stored["write_run"](store, 100, *probes, host=host.host_facts()["host_key"])


def test_validation_finds_what_is_off_and_keeps_it(tmp_path, monkeypatch, capsys):
    truth = Program(2e-4, 3e-5, 4e-4, 1e-4, 0.5, 0.25)
    pretend(monkeypatch, tmp_path, truth, off=1.25)
    assert "was not measured on this host yet" in said(capsys, tmp_path, CONFIG, "--ram", "64G")
    text = said(capsys, tmp_path, "--validate")
    program, errors = validate.stored(tmp_path, host.host_facts()["host_key"])
    assert astuple(program) == pytest.approx(astuple(truth), rel=0.1)  # bytes of the small models do count a little
    assert errors == [pytest.approx(-0.2, abs=0.02)] * 2
    assert [line.split()[-1] for line in text.splitlines()[1:3]] == [f"{error:+.1%}" for error in errors]
    assert f"largest error {-min(errors):.1%} (goal: at most 20 %)" in text
    assert validate.stored(tmp_path, "another host") == (None, [])
    advice = json.loads(said(capsys, tmp_path, CONFIG, "--ram", "64G", "--json"))
    assert advice["measured_errors"] == errors
    ours = [one for one in advice["ranked"] if one["as_in"].startswith("moebench")]
    assert ours
    assert all(any(term["what"] == "calls" for term in one["terms"]) for one in ours)
    assert "% over 2 measured cases" in said(capsys, tmp_path, CONFIG, "--ram", "64G")


def said(capsys, store, *arguments):
    status = main(["advise", *map(str, arguments), "--store", str(store)])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_placement_is_run_beside_its_prediction(tmp_path, monkeypatch, capsys):
    """A tiny model under a budget that its experts do not fit into: from disk, in real processes."""
    tiny("Mixtral", num_hidden_layers=3, intermediate_size=512).save_pretrained(tmp_path / "model")
    quick = (*COMMON, "engine.seconds=0.1", "engine.min_calls=1")
    monkeypatch.setattr(measure, "COMMON", quick)
    store = tmp_path / "store"
    arguments = (
        tmp_path / "model",
        "--vram",
        "0",
        "--ram",
        "8M",
        "--context",
        "64",
        "--form",
        "float32",
        "--measure",
        "1",
    )
    found = json.loads(said(capsys, store, *arguments, "--json"))
    (best,), (one,) = found["ranked"], found["measured"]
    assert best["placement"] == "cache in RAM, fetched from disk"
    assert one["backend"] == "offload"
    assert one["measured_s"] > 0
    assert one["error"] == pytest.approx(one["predicted_s"] / one["measured_s"] - 1)
    sql = f"SELECT name, value FROM metrics_raw WHERE case_key = '{one['case_key']}' AND name LIKE 'advise%'"
    main(["sql", sql, "--store", str(store), "--format", "json"])
    kept = {row["name"]: row["value"] for row in json.loads(capsys.readouterr().out)}
    assert kept == {
        "advise_predicted_s": pytest.approx(one["predicted_s"]),
        "advise_error": pytest.approx(one["error"]),
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((str(CONFIG), "--ram", "64G", "--measure", "1"), "--measure needs the weights"),
        (("--measure", "1"), "name a MODEL"),
        ((str(CONFIG), "--ram", "64G", "--measure", "-1"), "--measure takes how many"),
    ],
)
def test_what_cannot_be_measured_is_told(arguments, told, tmp_path, capsys):
    assert main(["advise", *arguments, "--store", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err


def test_an_error_is_relative_to_what_was_measured():
    assert Compared("x", Measured(None, "r", 2.0, {}), 3.0).error == 0.5
