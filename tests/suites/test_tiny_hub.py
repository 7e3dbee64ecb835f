"""Tiny random models of hub architectures: transformers' own layers, judged on text in bytes like any real model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moebench.bench.cli import main
from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.suites.hub_plugins import MODELS, TinyDeepSeek, TinyOlmoe
from moebench.suites.model_plugins import HuggingFace
from moebench.suites.models.hf import HuggingFaceModel
from moebench.suites.models.hub import cached_folder, is_hub_id
from moebench.suites.models.smollm2_jobs import ffn_inputs, ffn_of, token_ids
from moebench.suites.models.tiny_hub import build, byte_tokenizer
from moebench.suites.quality.passage import take_passage, token_bytes
from moebench.suites.text import evaluation_text

transformers = pytest.importorskip("transformers")

SHORT = ("suite.tokens=128", "suite.window=64")
every = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def judged(*given):
    from moebench.suites.quality.trial import AccuracyTrial

    registry = Registry.load()
    (case,) = planned(["suite=accuracy", *SHORT, "model.layers=moe", *given], registry)[0].cases
    trial = AccuracyTrial(case, registry)
    for step in range(trial.steps):
        check = trial.verify(step, trial.run(step))
        assert check.ok, check.reason
    facts = trial.facts()
    trial.close()
    return {metric.name: metric for metric in facts.metrics}


@every
def test_the_model_as_it_is_lies_at_distance_zero_from_itself(model):
    found = judged(f"model={model.name}")
    assert 0 <= found["kl_to_dense"].value <= 1e-6
    assert found["top1_agreement"].value == 1
    assert found["router_top1_agreement"].value == 1
    assert found["output_error"].value < 1e-5
    assert 0 < found["bits_per_byte"].value < 12


def test_fewer_bits_are_farther():
    eight, four = (
        judged("model=tiny-olmoe", f"axes.quantization={name}", "params.quantization.int4.group=32")
        for name in ("int8", "int4")
    )
    assert 1e-8 < 10 * eight["kl_to_dense"].value < four["kl_to_dense"].value
    assert eight["output_error"].value < four["output_error"].value
    assert eight["router_jaccard"].value >= four["router_jaccard"].value


@every
def test_a_layer_is_the_one_that_transformers_runs(model):
    params = model(depth=3)
    source = build(params)
    language_model, _ = source.language_model()
    assert source.shape == params.shape()
    for index in source.shape.moe_layers:
        block = ffn_of(language_model.model.layers[index])
        weights = source.layer(index)
        assert torch.equal(weights.gate_up, block.experts.gate_up_proj)
        assert torch.equal(weights.down, block.experts.down_proj)
        assert torch.equal(weights.router_EH, block.gate.weight)
    kinds = {type(ffn_of(layer)).__name__ for layer in language_model.model.layers}
    assert len(kinds) == 1 + (len(source.shape.moe_layers) < 3)


def test_selection_biases_are_not_zero_and_are_read():
    weights = build(TinyDeepSeek()).layer(1)
    assert weights.router_bias_E.abs().min() > 0


def test_weights_follow_the_seed_alone():
    first, other = build(TinyOlmoe(depth=1, seed=3)), build(TinyOlmoe(depth=1, seed=4))
    folder = first.folder
    assert build(TinyOlmoe(depth=1, seed=3)).folder == folder
    assert first.params.weights_sha256() != other.params.weights_sha256()
    assert not torch.equal(first.layer(0).down, other.layer(0).down)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    from moebench.suites.models.tiny_hub import write

    write(TinyOlmoe(depth=1, seed=3), folder.parent / "again")
    assert (folder.parent / "again" / "model.safetensors").read_bytes() == content


def test_recorded_states_are_what_the_ffn_reads():
    source = build(TinyOlmoe(depth=2))
    states_TH = source.hidden_states(1, "evaluation", 2048, seed=0)
    language_model, tokenizer = source.language_model()
    expected = ffn_inputs(language_model, token_ids(tokenizer, evaluation_text(), 512))
    torch.testing.assert_close(states_TH[:512], expected[1], rtol=1e-5, atol=1e-5)


def test_bytes_are_the_tokens():
    tokenizer = byte_tokenizer()
    text = "Größe: 5 µm\n  x"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert token_bytes(tokenizer, torch.tensor(ids)).tolist() == [1.0] * len(ids)
    passage = take_passage(tokenizer, evaluation_text(), 64, 0)
    assert int(passage.bytes_T.sum()) == 64


def test_pieces_of_sentencepiece_are_counted_in_bytes():
    class Pieces:
        all_special_tokens = ("<s>",)

        def convert_ids_to_tokens(self, ids):
            return [["<s>", "▁Größe", "<0x0A>", "x"][i] for i in ids]

    assert token_bytes(Pieces(), torch.tensor([0, 1, 2, 3])).tolist() == [0, len(" Größe".encode()), 1, 1]


def test_a_folder_with_a_tokenizer_is_judged_like_a_model_with_a_name():
    folder = build(TinyOlmoe()).folder
    found, expected = judged("model=hf", f"model.path={folder}"), judged("model=tiny-olmoe")
    assert found["perplexity"] == expected["perplexity"]
    assert HuggingFace(str(folder)).recorded


@pytest.mark.parametrize(
    ("path", "expected"), [("owner/name", True), ("a/b/c", False), ("/abs/olute", False), ("name", False), ("", False)]
)
def test_names_of_the_hub(path, expected):
    assert is_hub_id(path) == expected


def test_a_name_that_was_not_fetched_is_told_how_to_be(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MoebenchError, match=r"models fetch hf model\.path=moebench/no-such-model"):
        cached_folder("moebench/no-such-model")
    assert main(["models", "fetch", "hf", "model.path=moebench/no-such-model"]) == 2
    assert "could not be downloaded" in capsys.readouterr().err
    assert main(["models", "fetch", "hf", "path"]) == 2
    assert "write it as model.path=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "wrong", "sentence"),
    [
        (TinyOlmoe, {"hidden": 20}, "multiple of 8"),
        (TinyOlmoe, {"k": 9}, "between 1 and experts"),
        (TinyDeepSeek, {"experts": 10}, "in 4 groups"),
        (TinyDeepSeek, {"depth": 1}, "depth of 2"),
    ],
)
def test_impossible_sizes_are_refused(model, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        model(**wrong)
    assert dataclasses.fields(model)


def test_the_whole_model_is_loaded_in_float32(tmp_path):
    source = build(TinyOlmoe(depth=1))
    model, tokenizer = source.language_model()
    half = tmp_path / "half"
    model.to(torch.bfloat16).save_pretrained(half)
    tokenizer.save_pretrained(half)
    loaded, _ = HuggingFaceModel(HuggingFace(str(half))).language_model()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
