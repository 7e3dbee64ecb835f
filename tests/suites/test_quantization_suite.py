"""Suite quantization: really quantized, figures that mean what they say, and the quality that suite accuracy has."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moebench.bench.run import planned
from moebench.contracts import Registry
from moebench.moe.oracle import reference
from moebench.suites.quality.layer_figures import _relative
from moebench.suites.quality.on_disk import held_bytes, written
from moebench.suites.quality.quantized import QuantizationTrial
from moebench.suites.subject import make_batch, prepare_subject

RTN = ("axes.quantization=rtn", "params.quantization.rtn.group=16", "params.quantization.rtn.bits=3")
HIDDEN_ONLY = ("smoothing=none", "router=null", "balance=0", "act_bits=null", "group=null")


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def plan_of(*given_settings):
    return planned(list(given_settings), Registry.load())[0]


def run(case):
    """Run a case in this process, every step checked; return its figures by name, its series and the trial."""
    trial = QuantizationTrial(case, Registry.load())
    for step in range(trial.steps):
        check = trial.verify(step, trial.run(step))
        assert check.ok, check.reason
    facts = trial.facts()
    trial.close()
    return {metric.name: metric for metric in facts.metrics}, facts, trial


def judged(*given_settings):
    (case,) = plan_of("suite=quantization", *given_settings).cases
    return run(case)


# --- planning --------------------------------------------------------------------------------------------------------


def test_a_method_is_planned_once_and_meets_speed_and_accuracy_on_method_key():
    chosen = ("model=smollm2", "axes.quantization=[none,rtn,int8]", "params.quantization.rtn.group=64")
    plan = plan_of("suite=quantization", *chosen, "axes.backend=[eager,grouped]", "axes.tokens=[1,2]")
    keys = {case.method_key for case in plan.cases}
    assert (len(plan.cases), len(keys)) == (3, 3)
    assert {case.protocol for case in plan.cases} == {"once"}
    for suite in ("accuracy", "throughput", "lm_eval"):
        assert {case.method_key for case in plan_of(f"suite={suite}", *chosen, "axes.backend=eager").cases} == keys


def test_a_plan_knows_that_codecs_take_time_and_that_the_model_is_loaded_once():
    groups = ("params.quantization.rtn.group=32", "params.quantization.awq.group=32")
    plan = plan_of("suite=quantization", "model=tiny", "axes.quantization=[none,rtn,awq]", *groups)
    seconds = {case.quantization.name: plan.seconds[case.case_key] for case in plan.cases}
    assert seconds["none"] > 20 > seconds["awq"] > seconds["rtn"] > 0


@pytest.mark.parametrize("model", ["tiny", "gguf"])
def test_weights_as_they_are_stored_are_planned(model, tmp_path):
    if model == "gguf":
        gguf = pytest.importorskip("gguf")
        path = tmp_path / "one.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        sizes = {"embedding_length": 32, "feed_forward_length": 64, "block_count": 1, "context_length": 8}
        for name, value in {**sizes, "attention.head_count": 1, "expert_count": 2, "expert_used_count": 1}.items():
            writer.add_uint32(f"llama.{name}", value)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        rows = {"ffn_gate_exps": (2, 64, 32), "ffn_up_exps": (2, 64, 32), "ffn_down_exps": (2, 32, 64)}
        for name, shape in {**rows, "ffn_gate_inp": (2, 32)}.items():
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).numpy()
            writer.add_tensor(f"blk.0.{name}.weight", weight.astype("float16" if name in rows else "float32"))
        writer.add_tensor("token_embd.weight", torch.zeros(4, 32).numpy())
        for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
            getattr(writer, step)()
    own = [f"model.path={tmp_path / 'one.gguf'}"] if model == "gguf" else []
    plan = plan_of("suite=quantization", f"model={model}", *own, "axes.quantization=[file,none]", "suite.tokens=256")
    if model == "tiny":
        assert [case.quantization.name for case in plan.cases] == ["none"]
        assert "keeps no packed weights in a file; use model=gguf" in plan.refused[0].refusal
        return
    assert [case.quantization.name for case in plan.cases] == ["file", "none"]
    found, _, _ = run(plan.cases[0])
    assert (found["bits_per_weight"].value, found["weight_error"].value) == (16, 0)


def test_several_layers_make_one_case():
    (case,) = plan_of("suite=quantization", "model=small", "model.layers=all", *RTN).cases
    assert case.layers == tuple(range(len(case.layers)))
    assert len(case.layers) > 1


# --- a model without text --------------------------------------------------------------------------------------------

TINY = ("model=tiny", "model.layers=all", "suite.tokens=512", *RTN)
EXPERTS, HIDDEN, WIDTH, LAYERS = 8, 64, 32, 4


def matrix_bytes(rows, columns):
    return rows * (3 * columns // 8 + columns // 16 * 2 * 2)


def test_bytes_and_bits_are_those_of_the_format_in_memory_and_on_disk():
    found, facts, trial = judged(*TINY)
    store = trial.done[0].subject.layer.store
    assert (len(trial.done), store.num_experts, store.hidden, store.width) == (LAYERS, EXPERTS, HIDDEN, WIDTH)
    expert = matrix_bytes(2 * WIDTH, HIDDEN) + matrix_bytes(HIDDEN, WIDTH)
    assert found["expert_bytes"].value == LAYERS * EXPERTS * expert
    assert found["file_bytes"].value - found["file_header_bytes"].value == LAYERS * EXPERTS * expert
    assert found["bits_per_weight"].value == 3 + 2 * 16 / 16
    series = Counter(one.name for one in facts.series)
    assert series["bits_per_weight_by_expert"] == series["weight_error_by_expert"] == LAYERS
    for one in facts.series:
        assert len(one.values) == (EXPERTS if one.name.endswith("_by_expert") else LAYERS)
        if one.name.startswith("bits_per_weight"):
            assert set(one.values) == {found["bits_per_weight"].value}
    assert found["quantize_elapsed"].value > 0


def test_errors_are_those_of_the_definition():
    (case,) = plan_of("suite=quantization", *(s for s in TINY if "layers" not in s), "model.layers=[1]").cases
    found, _, _ = run(case)
    registry = Registry.load()
    layer = prepare_subject(case, registry).layer
    (plain,) = plan_of("suite=quantization", "model=tiny", "model.layers=[1]", "axes.quantization=none").cases
    dense = prepare_subject(plain, registry).layer
    off = whole = 0.0
    for mine, original in zip(layer.store.dense(), dense.store.dense(), strict=True):
        off += float((mine.double() - original.double()).square().sum())
        whole += float(original.double().square().sum())
    assert found["weight_error"].value == pytest.approx((off / whole) ** 0.5, rel=1e-9)
    batch = make_batch(case, registry, prepare_subject(case, registry), 0)
    y, wanted = (reference(one.store, batch.routing, batch.x_TH, one.shared).y_TH for one in (layer, dense))
    errors_T = (y - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert found["held_out_error"].value == pytest.approx(float(errors_T.mean()), rel=1e-9)
    assert found["held_out_error"].n == 512


def test_smoothing_of_hidden_channels_alone_has_no_error_of_weights():
    """The input's scale stays, and the folded weights are others than the model's all the same."""
    own = ("axes.structure=outliers", "params.structure.outliers.factor=4", "axes.quantization=eaquant")
    eaquant = [f"params.quantization.eaquant.{name}" for name in HIDDEN_ONLY]
    found, _, trial = judged("model=tiny", "model.layers=[1]", "suite.tokens=256", *own, *eaquant)
    scale_H = trial.done[1].subject.layer.input_scale_H
    assert set(scale_H.tolist()) == {1.0, 4.0}, "that of the outliers, and no other"
    assert found["weight_error"].value is None
    assert found["held_out_error"].value > 0


def test_an_error_in_weights_of_zero_is_no_number():
    zero_12, off_12, lost_12 = (torch.tensor([pair]) for pair in ([0.0, 0.0], [1.0, 4.0], [1.0, 0.0]))
    assert (_relative([zero_12]), _relative([off_12]), _relative([lost_12])) == (0, 0.5, None)


def test_whatever_holds_bytes_is_counted():
    class Slotted:
        __slots__ = ("codes", "rest")

    slotted = Slotted()
    slotted.codes = np.zeros((4, 8), dtype=np.int16)
    other = SimpleNamespace(
        a=slotted, b=[b"12345", bytearray(3)], c={"d": torch.zeros(2, dtype=torch.int64)}, e=slotted
    )
    assert held_bytes(other) == 64 + 5 + 3 + 16


def test_what_no_text_can_say_is_unknown_with_the_reason():
    found, facts, _ = judged(*TINY)
    unknown = {name for name, metric in found.items() if metric.value is None}
    assert {"perplexity", "bits_per_byte", "kl_to_dense", "router_jaccard", "ece"} <= unknown
    assert unknown.isdisjoint({"expert_bytes", "weight_error", "held_out_error", "file_bytes"})
    assert facts.notes["reason"] == "model 'tiny' has no text to be judged on; use model=smollm2."
    assert not facts.items


def test_dense_layers_lose_nothing_and_take_no_time():
    found, _, _ = judged("model=tiny", "suite.tokens=256", "axes.quantization=none")
    assert (found["weight_error"].value, found["held_out_error"].value, found["bits_per_weight"].value) == (0, 0, 32)
    assert found["quantize_elapsed"].value is None
    assert found["file_bytes"].value - found["file_header_bytes"].value == found["expert_bytes"].value


def test_layers_are_quantized_anew_whatever_the_cache_keeps(monkeypatch):
    from moebench.moe.codecs import rtn

    (case,) = plan_of("suite=quantization", *TINY).cases
    prepare_subject(replace(case, layers=(0,)), Registry.load())  # which keeps an artefact
    calls, honest = [], rtn.round_to_nearest
    monkeypatch.setattr(rtn, "round_to_nearest", lambda *args: calls.append(1) or honest(*args))
    for times in (1, 2):
        run(case)
        assert len(calls) == times * LAYERS * EXPERTS * 2


def test_mixtures_tell_the_bits_of_each_expert():
    own = ("axes.quantization=mixed", "params.quantization.mixed.group=32", "params.quantization.mixed.budget=3.5")
    found, facts, _ = judged("model=tiny", "model.layers=[0]", "suite.tokens=256", *own)
    (bits,) = (one.values for one in facts.series if one.name == "bits_per_weight_by_expert")
    assert set(bits) <= {1.5, 3.0, 4.0}
    assert len(set(bits)) > 1
    assert sum(bits) / EXPERTS == pytest.approx(found["bits_per_weight"].value)
    assert found["bits_per_weight"].value <= 3.5


def test_a_layer_that_is_off_does_not_pass():
    (case,) = plan_of("suite=quantization", *TINY).cases
    trial = QuantizationTrial(case, Registry.load())
    done = trial.run(0)
    assert trial.verify(0, done).ok
    done.y_TH[3] *= 1.01
    assert "rows are off" in trial.verify(0, done).reason


def test_folded_experts_and_sparsity_pass_their_oracle():
    found, _, trial = judged(*TINY, "axes.routing=moepp", "axes.sparsity=teal", "axes.dtype=bfloat16")
    assert found["bits_per_weight"].value == 5
    assert trial.done[0].subject.layer.store.sparsity is not None
    alone, _, _ = judged(*TINY, "axes.routing=moepp", "axes.dtype=bfloat16")
    assert found["held_out_error"].value > alone["held_out_error"].value, "what is left out counts, too"


def test_a_file_gives_the_store_back():
    layer = prepare_subject(plan_of("suite=quantization", *TINY).cases[0], Registry.load()).layer
    disk = written(layer.store)
    for mine, read in zip(layer.store.dense(), disk.store.dense(), strict=True):
        assert torch.equal(mine, read)


# --- a model with text -----------------------------------------------------------------------------------------------


TEXT = ("model.layers=all", "suite.tokens=256", "suite.window=64", *RTN)


def test_quality_is_what_suite_accuracy_says(smoke):
    from moebench.suites.quality.trial import AccuracyTrial

    found, facts, trial = judged(*smoke, *TEXT)
    (case,) = plan_of("suite=accuracy", *smoke, *TEXT).cases
    accuracy = AccuracyTrial(case, Registry.load())
    for step in range(accuracy.steps):
        accuracy.run(step)
    same = accuracy.facts()
    assert trial.steps == 2 + accuracy.steps
    assert {metric.name for metric in same.metrics} <= set(found)
    assert [found[metric.name] for metric in same.metrics] == list(same.metrics)
    assert facts.items == same.items
    assert found["kl_to_dense"].value > 0
    assert found["router_jaccard"].value <= 1
    assert not [name for name, metric in found.items() if metric.value is None]
    assert facts.notes["reason"] == ""


def test_held_out_tokens_are_those_of_the_evaluation_text(smoke):
    (case,) = plan_of("suite=quantization", *smoke, *TEXT).cases
    source = Registry.load().get("model", "tinymoe").create(case.model.params)
    evaluation, calibration = (
        {tuple(row) for row in source.hidden_states(1, split, source.recorded_tokens()[split], 0).tolist()}
        for split in ("evaluation", "calibration")
    )
    rows = {tuple(row) for row in QuantizationTrial(case, Registry.load()).run(1).batch.x_TH.tolist()}
    assert rows <= evaluation
    assert len(rows & calibration) <= 0.02 * len(rows), "only windows that begin with the same token"


def test_a_routing_that_looks_ahead_has_bytes_and_errors_but_no_text(smoke):
    found, facts, trial = judged(*smoke, *TEXT, "axes.routing=expert_choice")
    assert trial.steps == 2
    assert found["held_out_error"].value > 0
    assert found["kl_to_dense"].value is None
    assert "looks at later tokens" in facts.notes["reason"]
