"""What ``moebench advise`` counts: weights of public models, bytes of files, and sizes as people write them."""

from __future__ import annotations

import json
import math
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from moebench.bench.advise.counts import PARTS, scratch_bytes
from moebench.bench.advise.forms import FORMS, stored_form, weights_in
from moebench.bench.advise.readers import READERS, flat, read_model
from moebench.bench.advise.sizes import bytes_text, count_text, parse_bytes, parse_count, parse_rate, time_text
from moebench.bench.advise.source import describe
from moebench.bench.advise.stored_tensors import header_sizes, index_total, part_of, parts_of
from moebench.contracts import MoebenchError
from moebench.suites.models.hf_config import READERS as RUNNABLE
from moebench.suites.models.hf_config import shape_of

gguf = pytest.importorskip("gguf")
FOLDER = Path(__file__).parent / "advise"
CONFIGS = {file.stem: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))}
tiny = runpy.run_path(str(Path(__file__).parents[1] / "tiny_models.py"))["build"]

PUBLISHED = {
    "dbrx": 132e9,
    "deepseek-v2-lite": 15.7e9,
    "deepseek-v3": 671e9,
    "ernie-4.5-21b-a3b": 21.8e9,
    "glm-4.5-air": 106e9,
    "gpt-oss-20b": 20.9e9,
    "granite-1b-a400m": 1.33e9,
    "jamba-v0.1": 52e9,
    "kimi-k2": 1.03e12,
    "llama-4-scout": 107.8e9,
    "minimax-m2": 229e9,
    "mixtral-8x22b": 141e9,
    "mixtral-8x7b": 46.7e9,
    "olmoe-1b-7b": 6.92e9,
    "phi-3.5-moe": 41.9e9,
    "qwen1.5-moe-a2.7b": 14.3e9,
    "qwen3-235b-a22b": 235e9,
    "qwen3-30b-a3b": 30.5e9,
    "qwen3-next-80b-a3b": 80e9,
}
"""Totals as their authors give them (of Llama 4 Scout, 109e9, the vision tower is no part of the language model)."""

ACTIVE = {
    "deepseek-v3": 37e9,
    "dbrx": 36e9,
    "jamba-v0.1": 12e9,
    "kimi-k2": 32e9,
    "llama-4-scout": 17e9,
    "mixtral-8x22b": 39e9,
    "mixtral-8x7b": 12.9e9,
    "phi-3.5-moe": 6.6e9,
    "qwen3-235b-a22b": 22e9,
    "qwen3-30b-a3b": 3.3e9,
}


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_totals_are_the_published_ones(name):
    model = read_model(CONFIGS[name])
    assert model.total == pytest.approx(PUBLISHED[name], rel=0.02)
    if name in ACTIVE:
        assert model.active == pytest.approx(ACTIVE[name], rel=0.03)


def shallow(config, depth=6):
    """The configuration with fewer layers, of which all kinds are left."""
    own = {name: value for name, value in flat(config).items() if name not in ("quantization_config", "torch_dtype")}
    if "layer_types" in own:
        own["layer_types"] = own["layer_types"][:depth]
    if own["model_type"] == "ernie4_5_moe":
        own["moe_layer_end_index"] = depth - 2
    return {**own, "num_hidden_layers": depth, "n_layers": depth}


def tensors(config):
    """Name and number of weights of every tensor that transformers saves of such a model; nothing is allocated."""
    kind = {"kimi_k2": "deepseek_v3"}.get(config["model_type"], config["model_type"])
    own = {name: value for name, value in config.items() if name not in ("model_type", "n_layers")}
    cls = transformers.Llama4TextConfig if kind == "llama4_text" else transformers.CONFIG_MAPPING[kind]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(cls(**own))
    found = dict(model.named_parameters())  # a tied head is there once
    saved = model.state_dict()
    found |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {name: tensor.numel() for name, tensor in found.items()}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "dbrx"])  # transformers 5.24 cannot make that one
def test_every_part_is_what_transformers_makes(name):
    config = shallow(CONFIGS[name])
    parts = dict.fromkeys(PARTS, 0)
    for tensor, count in tensors(config).items():
        parts[part_of(tensor)] += count
    assert read_model(config).parameters() == parts


@pytest.mark.parametrize("change", ["attention_bias", "tie_word_embeddings", "use_qk_norm", "head_dim"])
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "glm-4.5-air", "deepseek-v2-lite", "deepseek-v3"])
def test_switches_of_a_configuration_count(name, change):
    config = shallow(CONFIGS[name], 4)
    changed = {**config, change: not config.get(change) if change != "head_dim" else 64}
    if change in config or (name, change) == ("mixtral-8x7b", "head_dim"):
        assert read_model(changed).total == sum(tensors(changed).values())


def test_mixtral_by_hand():
    model = read_model(CONFIGS["mixtral-8x7b"])
    experts = 32 * 8 * 3 * 4096 * 14336
    attention = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    rest = 32 * (8 * 4096 + 2 * 4096) + 4096
    embedding = 2 * 32000 * 4096
    assert model.parameters() == {
        "experts": experts,
        "shared": 0,
        "attention": attention,
        "dense": 0,
        "embedding": embedding,
        "rest": rest,
    }
    assert model.kv_bytes(32768) == 32 * 2 * 8 * 128 * 32768 * 2 == 4 * 2**30
    assert scratch_bytes(model, 4) == 4 * (512 * (4 * 4096 + 3 * 2 * 14336) + 4 * 32000)
    assert weights_in(model, FORMS["bfloat16"]).total == 2 * model.total
    int4 = weights_in(model, FORMS["int4"])
    groups = experts // 128
    assert int4.parts["experts"] == experts // 2 + 4 * groups  # four bits a weight, 16-bit scale and zero a group
    assert int4.parts["embedding"] == 2 * embedding
    assert weights_in(model, FORMS["mxfp4"]).parts["experts"] == experts // 2 + experts // 32
    assert weights_in(model, FORMS["fp8"]).parts["experts"] == experts + 4 * (experts // 128**2)


def test_what_is_kept_of_a_token():
    assert read_model(CONFIGS["deepseek-v3"]).kv_bytes(1000) == 61 * (512 + 64) * 1000 * 2
    gpt = read_model(CONFIGS["gpt-oss-20b"])
    assert gpt.kv_bytes(1000) == 2 * 2 * 8 * 64 * (12 * 128 + 12 * 1000)
    assert gpt.kv_bytes(100) == 2 * 2 * 8 * 64 * 24 * 100
    scout = read_model(CONFIGS["llama-4-scout"])
    assert scout.kv_bytes(10000) == 2 * 2 * 8 * 128 * (36 * 8192 + 12 * 10000)
    jamba = read_model(CONFIGS["jamba-v0.1"])
    assert jamba.kv_bytes(1000) == 4 * 2 * 8 * 128 * 1000 * 2 + 28 * 8192 * (4 + 16) * 4
    following = read_model(CONFIGS["qwen3-next-80b-a3b"])
    assert following.kv_bytes(1000) - following.kv_bytes(0) == 12 * 2 * 2 * 256 * 1000 * 2


@pytest.mark.parametrize("name", [name for name in CONFIGS if flat(CONFIGS[name])["model_type"] in RUNNABLE])
def test_counts_agree_with_the_shapes_that_are_run(name):
    given_ = CONFIGS[name]
    defaults = {
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "hidden_act": "silu",
        "n_group": 1,
        "topk_group": 1,
    }
    shape, model = shape_of({**defaults, **given_}), read_model(given_)
    assert tuple(place for place, layer in enumerate(model.layers) if layer.experts) == shape.moe_layers
    layer = model.moe_layers[0]
    assert (layer.experts, layer.k) == (shape.experts, shape.top_k)
    assert layer.experts * layer.expert * 2 == shape.expert_bytes(2)
    gate = shape.hidden if given_["model_type"] == "qwen2_moe" else 0
    assert layer.shared == 3 * shape.hidden * shape.shared_width + gate


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "mixtrall"}, "did you mean 'mixtral'"),
        ({"model_type": "bert"}, "MoE architecture"),
        ({"model_type": None}, "MoE architecture"),
        ({"num_local_experts": None}, "lacks 'num_local_experts'"),
        ({"num_local_experts": 1}, "2 of 1 experts"),
        ({"hidden_size": "wide"}, "makes no sense"),
        ({"hidden_size": None}, "makes no sense"),
        ({"num_hidden_layers": 0}, "it has 0 layers"),
        ({"num_attention_heads": 0}, "makes no sense"),
    ],
)
def test_configurations_that_cannot_be_read(change, told):
    with pytest.raises(MoebenchError, match=told) as caught:
        read_model({**CONFIGS["mixtral-8x7b"], **change})
    assert str(caught.value).endswith((".", "?"))
    assert "\n" not in str(caught.value)


def test_how_weights_are_stored():
    assert stored_form(CONFIGS["deepseek-v3"]).name == "fp8"
    assert stored_form(CONFIGS["gpt-oss-20b"]).name == "mxfp4"
    assert stored_form({"quantization_config": {"quant_method": "awq", "bits": 4}}).name == "int4"
    assert stored_form({"dtype": "float32"}).name == "float32"
    assert stored_form({}).name == "bfloat16"
    with pytest.raises(MoebenchError, match=r"'aqlm'.*--form"):
        stored_form({"quantization_config": {"quant_method": "aqlm"}})
    with pytest.raises(MoebenchError, match="'float31'"):
        stored_form({"dtype": "float31"})


def test_every_reader_has_a_public_model_or_a_sibling():
    covered = {flat(config)["model_type"] for config in CONFIGS.values()}
    assert set(READERS) - covered == {"dots1", "flex_olmo", "granitemoeshared"}


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("flex_olmo", {"num_experts": 7, "num_experts_per_tok": 5, "intermediate_size": 24}),
        ("granitemoeshared", {"num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 12}),
    ],
)
def test_siblings_without_a_public_model_here(kind, own):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"model_type": kind, "vocab_size": 97, "intermediate_size": 24, "pad_token_id": None, **sizes, **own}
    assert read_model(config).total == sum(tensors(config).values())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of tiny models, in several files with an index."""
    folder = tmp_path_factory.mktemp("saved")
    for family in ("Mixtral", "Qwen3Moe", "DeepseekV3"):
        tiny(family).save_pretrained(folder / family, max_shard_size="40KB")
    return folder


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "DeepseekV3"])
def test_a_folder_is_counted_to_the_byte(saved, family):
    folder = saved / family
    described = describe(str(folder))
    assert described.origin == "safetensors headers"
    assert described.stored.form == "float32"
    assert described.stored.parts == weights_in(described.model, FORMS["float32"]).parts
    held = sum(
        file.stat().st_size - 8 - struct.unpack("<Q", file.read_bytes()[:8])[0] for file in folder.glob("*.safetensors")
    )
    assert described.stored.total == held
    assert "agrees with the configuration's arithmetic to the byte" in described.notes[-1]


def test_an_index_without_its_files(saved, tmp_path):
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text((saved / "Mixtral" / name).read_text())
    described = describe(str(tmp_path / "model.safetensors.index.json"))
    assert described.notes == ("what the index tells agrees with the configuration's arithmetic to the byte",)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] += described.stored.total // 50
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "(+2.00%)" in describe(str(tmp_path)).notes[0]


def test_layers_that_only_predict_further_are_left_out(saved, tmp_path):
    from safetensors.torch import save_file

    config = json.loads((saved / "DeepseekV3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    state = dict(tiny("DeepseekV3").state_dict())
    extra = {"model.layers.3.mlp.experts.0.up_proj.weight": torch.zeros(24, 32)}
    save_file({**state, **extra}, tmp_path / "model.safetensors")
    described = describe(str(tmp_path))
    assert described.stored.parts == describe(str(saved / "DeepseekV3")).stored.parts
    assert "beside the language model left out" in described.notes[-1]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no safetensors file"),
        (struct.pack("<Q", 2**40) + b"{}", "header is too long"),
        (struct.pack("<Q", 10) + b"{", "no safetensors file"),
        (struct.pack("<Q", 10) + b'{"a": {}} ', "a tensor has no place"),
        (struct.pack("<Q", 2) + b"[]", "no safetensors file"),
    ],
)
def test_damaged_safetensors(saved, tmp_path, content, told):
    (tmp_path / "config.json").write_text((saved / "Mixtral" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(MoebenchError, match=told):
        describe(str(tmp_path))


def write_gguf(path, experts=4, layers=2, split=0):
    """Write a model whose experts are Q4_K and Q6_K; return the bytes of each part."""
    kinds, hidden, width, kv = gguf.GGMLQuantizationType, 256, 512, 128
    writer = gguf.GGUFWriter(path, "qwen2moe")
    sizes = {"block_count": layers, "embedding_length": hidden, "expert_used_count": 2}
    for name, value in {**sizes, "expert_count": experts}.items():
        writer.add_uint32(f"qwen2moe.{name}", value)
    if split:
        writer.add_uint16("split.count", split)
    parts = dict.fromkeys(PARTS, 0)

    def add(part, name, kind, *shape):
        block, size = gguf.GGML_QUANT_SIZES[kinds[kind]]
        *rows, last = shape
        plain = kind == "F32"
        data = np.zeros(shape, np.float32) if plain else np.zeros((*rows, last // block * size), np.uint8)
        writer.add_tensor(name, data, raw_dtype=kinds[kind])
        parts[part] += math.prod(shape) // block * size

    add("embedding", "token_embd.weight", "Q8_0", 96, hidden)
    add("rest", "output_norm.weight", "F32", hidden)
    for layer in range(layers):
        for part, name, kind, *shape in (
            ("attention", "attn_q.weight", "Q4_K", hidden, hidden),
            ("attention", "attn_k.weight", "Q4_K", kv, hidden),
            ("attention", "attn_v.weight", "Q6_K", kv, hidden),
            ("attention", "attn_q_norm.weight", "F32", 64),
            ("attention", "attn_output.weight", "Q4_K", hidden, hidden),
            ("rest", "attn_norm.weight", "F32", hidden),
            ("rest", "ffn_norm.weight", "F32", hidden),
            ("rest", "ffn_gate_inp.weight", "F32", experts or 1, hidden),
            ("shared", "ffn_up_shexp.weight", "Q8_0", width, hidden),
            ("shared", "ffn_gate_inp_shexp.weight", "F32", hidden),
        ):
            add(part, f"blk.{layer}.{name}", kind, *shape)
        if experts:
            for name, kind, rows, columns in (("gate", "Q4_K", width, hidden), ("up", "Q4_K", width, hidden)):
                add("experts", f"blk.{layer}.ffn_{name}_exps.weight", kind, experts, rows, columns)
            add("experts", f"blk.{layer}.ffn_down_exps.weight", "Q6_K", experts, hidden, width)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return parts


def test_the_header_of_a_gguf_file_is_enough(tmp_path):
    path = tmp_path / "model.gguf"
    parts = write_gguf(path)
    whole = describe(str(path))
    header = path.stat().st_size - sum(parts.values()) - 2**11
    path.write_bytes(path.read_bytes()[: header + 2**11])
    described = describe(str(path))
    assert described == whole
    assert described.stored.parts == parts
    assert described.stored.form == "Q4_K Q6_K"
    layer = described.model.layers[0]
    assert (layer.expert, layer.experts, layer.k, layer.kv_values) == (3 * 256 * 512, 4, 2, 256)
    assert layer.width == 2 * 512
    assert describe(str(tmp_path)).stored == described.stored  # the only file of a folder


def test_gguf_files_that_cannot_be_planned(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, experts=0)
    with pytest.raises(MoebenchError, match="has no experts"):
        describe(str(path))
    write_gguf(path, split=3)
    with pytest.raises(MoebenchError, match="one of 3 parts"):
        describe(str(path))
    path.write_bytes(b"GGUF")
    with pytest.raises(MoebenchError, match="damaged"):
        describe(str(path))


def test_models_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, told in (
        ("nowhere", "no model here"),
        ("nobody/nothing-at-all", "could not be had from the hub"),
        (str(tmp_path), "no config.json"),
        (str(tmp_path / "a.gguf"), "cannot be read"),
    ):
        with pytest.raises(MoebenchError, match=told):
            describe(name)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(MoebenchError, match="holds no object"):
        describe(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MoebenchError, match="no valid JSON"):
        describe(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 4096.0),
        ("hidden_size", float("nan")),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", -4096),
        ("intermediate_size", -1),
        ("num_local_experts", 10**9),
        ("num_local_experts", float("inf")),
        ("sliding_window", "abc"),
        ("sliding_window", -1),
        ("max_position_embeddings", "abc"),
    ],
)
def test_a_configuration_without_sense_is_told_in_a_sentence(field, value):
    config = json.loads((FOLDER / "mixtral-8x7b.json").read_text())
    with pytest.raises(MoebenchError, match="makes no sense"):
        read_model({**config, field: value})


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama4"},
        {"model_type": "llama4", "text_config": [1]},
        {"model_type": "dbrx", "attn_config": [1]},
    ],
)
def test_parts_of_a_configuration_that_are_none_are_told(config):
    with pytest.raises(MoebenchError, match="fetch"):
        read_model(config)


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-at-all/x", "a/--b", "a/b..c"])
def test_names_that_can_be_nothing_are_told(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MoebenchError):
        describe(name)


def test_what_lies_beside_the_language_model_is_left_out():
    own = {"model.layers.0.mlp.experts.0.up_proj.weight": 8}
    beside = {"mtp.layers.0.mlp.experts.0.up_proj.weight": 1, "model.mtp_block.0.mlp.gate.weight": 2}
    beside |= {"vision_model.model.layers.0.self_attn.q_proj.weight": 4, "model.layers.1.eh_proj.weight": 16}
    parts, beyond = parts_of({**own, **beside}, 1)
    assert (sum(parts.values()), parts["experts"], beyond) == (8, 8, sum(beside.values()))


@pytest.mark.parametrize(
    "index", [{"metadata": [1]}, {"metadata": {"total_size": "x"}}, {"metadata": {"total_size": -1}}, {}]
)
def test_an_index_without_a_total_has_none(index):
    assert index_total(index) is None


@pytest.mark.parametrize("place", [3, [1], ["a", "b"], [5, 2], [True, 2]])
def test_a_tensor_without_a_place_is_told(place, tmp_path):
    header = json.dumps({"a": {"data_offsets": place}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(MoebenchError, match="a tensor has no place"):
        header_sizes([tmp_path / "a.safetensors"])


# --- sizes ------------------------------------------------------------------------------------------------------------

UNITS = {"": 1, "B": 1, "k": 1024, "K": 1024, "KiB": 1024, "KB": 1000, "kb": 1000, "M": 2**20, "MB": 10**6}
UNITS |= {"G": 2**30, "Gi": 2**30, "GiB": 2**30, "gib": 2**30, "GB": 10**9, "T": 2**40, "TiB": 2**40, "TB": 10**12}


@given(st.integers(0, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_sizes_are_read(number, unit, space):
    assert parse_bytes(f"{number}{space}{unit}") == number * UNITS[unit]
    if number:
        base = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(unit, UNITS[unit])
        assert parse_rate(f"{number}{unit}/s") == pytest.approx(number * base)


@given(st.integers(1, 2**60))
def test_sizes_survive_being_shown(size):
    assert parse_bytes(bytes_text(size).replace("PiB", "TiB")) * (1024 if "PiB" in bytes_text(size) else 1) == (
        pytest.approx(size, rel=0.06)
    )


@given(st.text("0123456789.kKmMgGtTiIbB /-e∞", max_size=8))
def test_what_is_no_size_is_told_in_a_sentence(text):
    for parse in (parse_bytes, parse_rate, parse_count):
        told = ""
        try:
            assert parse(text) >= 0
        except MoebenchError as error:
            told = str(error)
        assert not told or told.endswith(".")


def test_tokens_are_read():
    assert [parse_count(text) for text in ("1", "4096", "32k", "0.5k", "1M")] == [1, 4096, 32768, 512, 2**20]
    for wrong in ("0", "1.5", "32kb", "-1", "k", "", "32 tokens", "1e3", "nan"):
        with pytest.raises(MoebenchError):
            parse_count(wrong)
    for wrong in ("24 gigs", "24iB", "-24G", "G", "1e400", "9" * 40 + "T"):
        with pytest.raises(MoebenchError):
            parse_bytes(wrong)


def test_numbers_are_shown():
    assert [bytes_text(size) for size in (0, 1, 1023, 1024, 24 * 2**30)] == [
        "0 B",
        "1 B",
        "1023 B",
        "1.0 KiB",
        "24.0 GiB",
    ]
    assert [count_text(count) for count in (999, 46.7e9, 671.0e9, 1.03e12)] == ["999", "46.7B", "671.0B", "1.0T"]
    assert [time_text(seconds) for seconds in (1.5, 0.0123, 4e-6)] == ["1.5 s", "12.3 ms", "4 us"]
