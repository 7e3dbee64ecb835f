"""Model 'hf': tiny random models saved by transformers, read layer by layer, equal transformers' own MoE blocks."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from moebench.contracts import MoebenchError
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import PreparedLayer, moe_forward
from moebench.moe.plugins import TopK
from moebench.moe.routers.topk import build as build_router
from moebench.suites.model_plugins import HuggingFace
from moebench.suites.models.hf import HuggingFaceModel, build

transformers = pytest.importorskip("transformers")

COMMON = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}

MODELS = {
    "olmoe": ("OlmoeConfig", {"num_experts": 6}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "decoder_sparse_step": 2},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {"n_routed_experts": 8, "moe_intermediate_size": 8, "first_k_dense_replace": 1, **LATENT},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 8,
            "first_k_dense_replace": 2,
            "n_group": 4,
            "topk_group": 2,
            **LATENT,
        },
    ),
}
MOE_LAYERS = {"qwen3_moe": (0, 2), "qwen2_moe": (1,), "deepseek_v2": (1, 2), "deepseek_v3": (2,)}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """(name, transformers' model, folder)."""
    class_name, sizes = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**(COMMON | sizes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.2, 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="8KB")
    return request.param, model, folder


def test_the_layer_is_transformers_own_moe_block(saved):
    name, model, folder = saved
    source = build(HuggingFace(str(folder)))
    assert source.shape.moe_layers == MOE_LAYERS.get(name, (0, 1, 2))
    for index in source.shape.moe_layers:
        decoder_layer = model.model.layers[index]
        block = decoder_layer.mlp if hasattr(decoder_layer, "mlp") else decoder_layer.block_sparse_moe
        weights = source.layer(index)
        bundle = build_router(TopK())(weights, source.shape, 0)
        layer = PreparedLayer(ExpertStore(weights.gate_up, weights.down, bundle.kinds), bundle.router, weights.shared)
        x_TH = torch.randn(40, 16, generator=torch.Generator().manual_seed(index))
        with torch.inference_mode():
            expected = block(x_TH[None])
            expected = expected[0] if isinstance(expected, tuple) else expected
            torch.testing.assert_close(moe_forward(layer, x_TH), expected[0], rtol=1e-4, atol=1e-6)


def test_only_the_files_of_the_layer_are_opened(saved, tmp_path):
    _, _, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    source = build(HuggingFace(str(folder)))
    wanted = source.shape.moe_layers[-1]
    needed = {file for name, file in index.items() if f"layers.{wanted}." in name}
    assert needed < set(index.values())
    part = tmp_path / "part"
    part.mkdir()
    for file in ("config.json", "model.safetensors.index.json", *needed):
        shutil.copy(folder / file, part / file)
    assert torch.equal(build(HuggingFace(str(part))).layer(wanted).down, source.layer(wanted).down)


def test_layers_without_experts_are_refused(saved):
    _, _, folder = saved
    source = build(HuggingFace(str(folder)))
    for index in {0, 1, 2, 3} - set(source.shape.moe_layers):
        with pytest.raises(MoebenchError, match=f"layer {index} holds no experts"):
            source.layer(index)


def test_the_hash_follows_the_content(saved, tmp_path):
    _, _, folder = saved
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = HuggingFace(str(folder)).weights_sha256()
    assert HuggingFace(str(copy)).weights_sha256() == before
    file = max(copy.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert HuggingFace(str(copy)).weights_sha256() != before


def test_fused_expert_tensors_are_mapped(tmp_path):
    from safetensors.torch import save_file

    config = COMMON | {"model_type": "olmoe", "num_experts": 4, "norm_topk_prob": False, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {
        "experts.gate_up_proj": torch.randn(4, 48, 16, dtype=torch.bfloat16),
        "experts.down_proj": torch.randn(4, 16, 24, dtype=torch.bfloat16),
        "gate.weight": torch.randn(4, 16, dtype=torch.bfloat16),
    }
    save_file({f"model.layers.2.mlp.{name}": t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    layer = HuggingFaceModel(HuggingFace(str(tmp_path))).layer(2)
    assert torch.equal(layer.gate_up, tensors["experts.gate_up_proj"])
    assert torch.equal(layer.down, tensors["experts.down_proj"])
    assert torch.equal(layer.router_EH, tensors["gate.weight"])
    with pytest.raises(MoebenchError, match="expert weights in an unknown way"):
        HuggingFaceModel(HuggingFace(str(tmp_path))).layer(1)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "lacks config.json"),
        ("{", "is no valid JSON"),
        ("[]", "unknown MoE architecture"),
        ('{"model_type": "mixtrl"}', "did you mean 'mixtral'"),
        ('{"model_type": "mixtral"}', "does not say 'num_experts_per_tok'"),
        ('{"model_type": "mixtral", "quantization_config": {"bits": 8}}', "are quantized already"),
        ('{"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"}', "topk_method=greedy"),
    ],
)
def test_bad_folders_get_one_sentence(tmp_path, config, sentence):
    (tmp_path / "model.safetensors").write_bytes(b"")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    params = HuggingFace(str(tmp_path))
    message = params.missing()
    assert sentence in message
    assert "\n" not in message
    with pytest.raises(MoebenchError):
        params.shape()


def test_a_hub_id_is_told_to_be_downloaded():
    told = HuggingFace("moebench/no-such-model").missing()
    assert "`moebench models fetch hf model.path=moebench/no-such-model`" in told
    assert "model.path=FOLDER" in HuggingFace().missing()


def test_a_truncated_file_is_named(tmp_path):
    config = COMMON | {"model_type": "mixtral", "num_local_experts": 4, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(MoebenchError, match=r"model\.safetensors cannot be read"):
        HuggingFaceModel(HuggingFace(str(tmp_path))).layer(0)


def test_without_a_tokenizer_no_states_are_recorded(saved):
    _, _, folder = saved
    source = HuggingFaceModel(HuggingFace(str(folder)))
    assert not source.params.recorded
    with pytest.raises(MoebenchError, match="traffic=gaussian"):
        source.hidden_states(source.shape.moe_layers[0], "evaluation", 4, 0)


def test_pickles_are_read_where_the_user_says_so(saved, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    _, _, folder = saved
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "cache"))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folder / "config.json", pickled)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    torch.save(tensors, pickled / "pytorch_model.bin")
    assert "model.pickle=true" in HuggingFace(str(pickled)).missing()
    allowed = HuggingFace(str(pickled), pickle=True)
    assert allowed.missing() is None
    index = allowed.shape().moe_layers[-1]
    safe, read = build(HuggingFace(str(folder))).layer(index), build(allowed).layer(index)
    assert torch.equal(safe.gate_up, read.gate_up)
    assert torch.equal(safe.down, read.down)


def test_a_pickle_that_builds_other_things_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "cache"))
    config = COMMON | {"model_type": "mixtral", "num_local_experts": 4, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"weight": shutil.rmtree}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MoebenchError, match="is no file of plain weights"):
        build(HuggingFace(str(tmp_path), pickle=True)).layer(0)
