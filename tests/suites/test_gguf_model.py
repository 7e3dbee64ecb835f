"""A GGUF file of the user as a model: its bytes kept, every architecture as transformers has it, and refusals."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.moe.blocks.gguf import read_dense
from moebench.moe.blocks.gguf_file import read_header
from moebench.moe.blocks.gguf_types import decodable, open_file
from moebench.moe.stored import split
from moebench.suites.gguf_plugins import GgufModel
from moebench.suites.models.gguf_config import check_whole
from moebench.suites.models.gguf_llama import as_transformers, transformers_config
from moebench.suites.models.gguf_model import build
from moebench.suites.models.smollm2_jobs import check_complete, load
from moebench.suites.subject import prepare_subject

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes decode to infinities, until replaced

HIDDEN, WIDTH, EXPERTS = 256, 512, 4
PLAIN = ("F32", "F16", "BF16")


def random_blocks(kind, *rows, width, rng):
    """Rows of a type: plain numbers, or random bytes where these decode to numbers of a sane size, and zeros."""
    number, (block, size) = gguf.GGMLQuantizationType[kind], decodable()[kind]
    if kind in PLAIN:
        return gguf.quants.quantize(rng.standard_normal((*rows, width)).astype(np.float32), number)
    blocks = rng.integers(0, 256, (*rows, width // block, size), dtype=np.uint8)
    decoded = np.abs(gguf.quants.dequantize(blocks.reshape(*rows, -1), number)).reshape(*rows, width // block, block)
    blocks[~(decoded < 1e3).all(-1)] = 0
    return blocks.reshape(*rows, -1)


def close(writer):
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def metadata(writer, arch, experts=0, layers=1, **sizes):
    given = {"embedding_length": HIDDEN, "feed_forward_length": WIDTH, "block_count": layers, "context_length": 128}
    given |= {"attention.head_count": 4, "attention.head_count_kv": 2, **sizes}
    if experts:
        given |= {"expert_count": experts, "expert_used_count": 2}
    for name, value in given.items():
        writer.add_uint32(f"{arch}.{name}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{arch}.rope.freq_base", 10000.0)


@pytest.fixture
def write(tmp_path):
    """Write one layer whose FFN matrices are of given types; return path and what was stored."""

    def one(up="Q4_K", down="Q6_K", gate=None, arch="llama", experts=EXPERTS, leave=()):
        path, rng = tmp_path / "model.gguf", np.random.default_rng(0)
        writer = gguf.GGUFWriter(path, arch)
        metadata(writer, arch, experts)
        kind, stack = ("_exps", (experts,)) if experts else ("", ())
        stored = {}
        for part, name in (("gate", gate or up), ("up", up), ("down", down)):
            rows, width = (HIDDEN, WIDTH) if part == "down" else (WIDTH, HIDDEN)
            stored[part] = random_blocks(name, *stack, rows, width=width, rng=rng)
            if part not in leave:
                number = gguf.GGMLQuantizationType[name]
                writer.add_tensor(f"blk.0.ffn_{part}{kind}.weight", stored[part], raw_dtype=number)
        writer.add_tensor("token_embd.weight", np.zeros((96, HIDDEN), dtype=np.float32))
        if experts:
            rows = rng.standard_normal((experts, HIDDEN)).astype(np.float32)
            writer.add_tensor("blk.0.ffn_gate_inp.weight", rows)
        close(writer)
        return path, stored

    return one


def as_bytes(data):
    return torch.from_numpy(np.ascontiguousarray(data)).view(torch.uint8).flatten(2)


def plan_of(path, *settings):
    own = ["suite=throughput", "model=gguf", f"model.path={path}", "axes.tokens=32", "axes.quantization=file"]
    return planned([*own, *settings], Registry.load())[0]


# --- the bytes of a file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(decodable()))
def test_every_type_loads_with_its_bytes_and_decodes_as_the_library_does(kind, write):
    path, stored = write(kind, kind)
    layer = build(GgufModel(str(path))).layer(0)
    number = gguf.GGMLQuantizationType[kind]
    exact = {part: torch.from_numpy(gguf.quants.dequantize(data, number)) for part, data in stored.items()}
    dense = torch.cat([exact["gate"], exact["up"]], dim=1)
    both = torch.cat([as_bytes(stored["gate"]), as_bytes(stored["up"])], dim=1)
    for slot in range(EXPERTS):
        gate_up, down = layer.stored.gate_up[slot], layer.stored.down[slot]
        assert torch.equal(gate_up.blocks.view(torch.uint8).flatten(1), both[slot])
        assert torch.equal(down.blocks.view(torch.uint8).flatten(1), as_bytes(stored["down"])[slot])
        assert torch.equal(gate_up.dequantize(), dense[slot])
        assert torch.equal(down.dequantize(), exact["down"][slot])
    assert bool(dense.any())
    assert torch.equal(layer.gate_up, dense)
    assert torch.equal(layer.down, exact["down"])
    block, size = decodable()[kind]
    assert 8 * layer.stored.gate_up[0].nbytes / (2 * WIDTH * HIDDEN) == 8 * size / block


def test_a_row_runs_from_the_bytes_of_the_file(write):
    path, stored = write("Q4_K", "Q6_K")
    plan = plan_of(path, "axes.backend=[eager,packed]", "axes.dtype=bfloat16")
    (case,) = plan.cases
    assert (case.backend.name, case.execution.weights, case.base) == ("eager", "dequantized", "Q4_K+Q6_K")
    registry = Registry.load()
    subject = prepare_subject(case, registry)
    store = subject.layer.store
    bits = 8 * store.nbytes / (3 * EXPERTS * HIDDEN * WIDTH)
    assert store.nbytes == sum(data.nbytes for data in stored.values())
    assert store.stored is None
    assert subject.spec.schemes[0].codec == "gguf_mixed"
    assert subject.spec.schemes[0].bits == pytest.approx(bits)
    trial = registry.get("suite", "throughput").create().prepare(case, registry)
    trial.begin_turn()
    check = trial.verify(0, trial.run(0))
    assert check.ok, check.reason
    told = {metric.name: metric.value for metric in trial.facts().metrics}
    assert told["expert_bytes"] == store.nbytes
    assert told["bits_per_weight"] == pytest.approx(bits)


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "F16"])
def test_a_contiguous_split_cuts_blocks_and_nothing_else(kind, write):
    path, _ = write(kind, kind, arch="qwen2", experts=0)
    layer = build(GgufModel(str(path))).layer(0)
    parts = split(layer.stored, 2)
    gate_FH, up_FH = layer.gate_up.chunk(2)
    for slot, rows in enumerate((slice(0, WIDTH // 2), slice(WIDTH // 2, WIDTH))):
        assert torch.equal(parts.gate_up[slot].dequantize(), torch.cat([gate_FH[rows], up_FH[rows]]))
        assert torch.equal(parts.down[slot].dequantize(), layer.down[:, rows])
    assert sum(q.nbytes for half in parts for q in half) == sum(q.nbytes for half in layer.stored for q in half)
    own = ["axes.backend=eager", "axes.structure=split", "params.structure.split.experts=2"]
    store = prepare_subject(plan_of(path, *own).cases[0], Registry.load()).layer.store
    assert torch.equal(store.dense()[1], layer.down.view(HIDDEN, 2, WIDTH // 2).transpose(0, 1))
    shared = ["params.structure.split.shared=1", "params.structure.split.k=1"]
    for extra in (shared, ["params.structure.split.assignment=coactivation"]):
        assert "would cut the blocks of the file" in plan_of(path, *own, *extra).refused[0].refusal
    if kind == "Q4_K":
        narrow = plan_of(path, *own, "params.structure.split.experts=4")
        assert "blocks of 256 (Q4_K) do not divide experts of 128 channels" in narrow.refused[0].refusal


def test_what_cannot_be_kept_is_told(write):
    path, _ = write("Q4_K", "Q6_K", gate="Q5_K")
    refused = plan_of(path, "axes.backend=eager").refused
    assert "layer 0 stores gate as Q5_K and up as Q4_K" in refused[0].refusal
    assert build(GgufModel(str(path))).layer(0).stored is None
    assert len(plan_of(path, "axes.backend=eager", "axes.quantization=none").cases) == 1
    tiny = planned(["suite=throughput", "model=tiny", "axes.quantization=file", "axes.tokens=8"], Registry.load())[0]
    assert "keeps no packed weights in a file; use model=gguf" in tiny.refused[0].refusal


# --- whole models -----------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3}
SIZES |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "rms_norm_eps": 1e-5}
SIZES |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": ("llama", {}),
    "mixtral": ("llama", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen2_moe": ("qwen2moe", {**MOE, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("qwen3moe", {**MOE, "head_dim": 16, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
}


def paired(weight, heads):
    """Rows (head, side, pair) as (head, pair, side): how llama.cpp's converter writes q and k of llama."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def unfused(name, data):
    """Tensors under the names that the library knows; transformers 5 holds gate and up of all experts in one."""
    if name.endswith("experts.gate_up_proj"):
        base = name.removesuffix("gate_up_proj")
        return zip((f"{base}gate_proj.weight", f"{base}up_proj.weight"), np.split(data, 2, axis=1), strict=True)
    return [(f"{name}.weight" if name.endswith("experts.down_proj") else name, data)]


def gguf_of(model, arch, path):
    """Write a transformers model under the names that the library has for transformers' own."""
    config, writer = model.config, gguf.GGUFWriter(path, arch)
    sizes = {"embedding_length": 32, "feed_forward_length": 64, "context_length": 64}
    if getattr(config, "head_dim", None):
        sizes["attention.key_length"] = config.head_dim
    if arch in ("qwen2moe", "qwen3moe"):
        sizes |= {"expert_feed_forward_length": 24, "expert_shared_feed_forward_length": 40}
    metadata(writer, arch, 4 if hasattr(config, "num_experts_per_tok") else 0, 2, **sizes)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), 2)
    for fused, tensor in model.state_dict().items():
        if fused == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for name, data in unfused(fused, tensor.numpy()):
            if arch == "llama" and ("q_proj" in name or "k_proj" in name):
                data = paired(data, 4 if "q_proj" in name else 2)
            base, _, kind = name.rpartition(".")
            writer.add_tensor(f"{names.get_name(base)}.{kind}", np.ascontiguousarray(data))
    close(writer)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_comes_back_from_its_file(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    arch, own = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **own})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    path = gguf_of(model, arch, tmp_path / "model.gguf")
    read = transformers_config(path, {})
    assert read.model_type == family
    again, state = transformers.AutoModelForCausalLM.from_config(read).eval(), as_transformers(path)
    check_complete(path, state, read)
    for odd in ({**state, "model.more": state["model.norm.weight"]}, dict(list(state.items())[1:])):
        with pytest.raises(MoebenchError, match=r"(unexpected tensor 'model\.more'|has no tensor '.*') for " + family):
            check_complete(path, odd, read)
    again.load_state_dict(state, strict=not config.tie_word_embeddings)
    again.tie_weights()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    shape = GgufModel(str(path)).shape()
    assert (shape.experts > 0) == ("num_experts_per_tok" in own)
    layer, ffn = build(GgufModel(str(path))).layer(1), model.model.layers[1].mlp
    down = ffn.experts.down_proj if shape.experts else ffn.down_proj.weight
    assert torch.equal(layer.down, down.detach())
    assert (layer.shared is not None) == (family == "qwen2_moe")


# --- files that are not what they should be ---------------------------------------------------------------------------


def test_the_header_is_what_the_library_reads(write):
    path, _ = write()
    ours, theirs = open_file(path), gguf.GGUFReader(path)
    assert {t.name: (tuple(t.shape.tolist()), int(t.tensor_type), int(t.data_offset)) for t in theirs.tensors} == {
        place.name: (place.dims, place.type, place.start) for place in ours.tensors.values()
    }
    assert ours.metadata["llama.expert_count"] == EXPERTS
    assert ours.metadata["llama.rope.freq_base"] == 10000.0


def test_an_unknown_architecture_and_a_missing_tensor_are_told(write):
    assert "unknown GGUF architecture 'mamba'" in plan_error(write(arch="mamba")[0])
    assert "has no tensor 'blk.0.ffn_up_exps.weight'; convert" in plan_error(write(leave=("up",))[0])


def plan_error(path):
    with pytest.raises(MoebenchError) as caught:
        GgufModel(str(path)).shape()
    assert GgufModel(str(path)).missing() == str(caught.value)
    return str(caught.value)


def test_a_type_that_the_library_does_not_decode_is_told(write):
    path, _ = write()
    content, name = bytearray(path.read_bytes()), b"blk.0.ffn_down_exps.weight"
    at = content.index(name) + len(name) + 4 + 8 * 3
    content[at : at + 4] = struct.pack("<I", int(gguf.GGMLQuantizationType.Q8_K))
    path.write_bytes(bytes(content) + bytes(EXPERTS * HIDDEN * WIDTH * 2))
    said = "'blk.0.ffn_down_exps.weight' is stored as Q8_K, which the installed gguf does not decode"
    assert said in GgufModel(str(path)).missing()
    with pytest.raises(MoebenchError, match="stored as Q8_K"):
        build(GgufModel(str(path))).layer(0)


def test_sizes_that_disagree_with_the_metadata_are_told(write):
    path, _ = write()
    content, name = bytearray(path.read_bytes()), b"llama.embedding_length"
    at = content.index(name) + len(name) + 4
    content[at : at + 4] = struct.pack("<I", HIDDEN // 2)
    path.write_bytes(bytes(content))
    assert "is (256, 512, 4) and not (128, 512, 4) as the metadata say" in plan_error(path)


@pytest.fixture
def strange(tmp_path):
    """Write a dense model with attention and a tokenizer, one entry of whose metadata is given."""

    def one(name="more.one", kind="uint32", value=1, more=(), arch="llama"):
        writer = gguf.GGUFWriter(tmp_path / "strange.gguf", arch)
        metadata(writer, arch)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        getattr(writer, f"add_{kind}")(name, value)
        sizes = {"ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH)}
        sizes |= {"attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN)}
        names = {f"blk.0.{part}.weight": size for part, size in sizes.items()} | {"token_embd.weight": (8, HIDDEN)}
        for part, size in {**names, **dict(more)}.items():
            writer.add_tensor(part, np.zeros(size, dtype=np.float32))
        close(writer)
        return tmp_path / "strange.gguf"

    return one


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("block_count", "uint64", 2**33),
        ("block_count", "float32", 1.0),
        ("attention.head_count", "uint32", 0),
        ("attention.head_count_kv", "int32", -2),
        ("expert_count", "int32", -4),
        ("context_length", "float32", float("nan")),
        ("attention.layer_norm_rms_epsilon", "float32", float("nan")),
        ("rope.freq_base", "float32", float("inf")),
        ("split.count", "string", "x"),
        ("embedding_length", "string", "many"),
    ],
)
def test_sizes_that_are_none_are_told(name, kind, value, strange):
    said = plan_error(strange(name if name == "split.count" else f"llama.{name}", kind, value))
    assert name in said
    assert said.endswith(("convert it again.", "convert the model again.", "use model=hf."))


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("rope.dimension_count", "uint32", 32),
        ("attention.value_length", "uint32", 32),
        ("attention.sliding_window", "uint32", 4096),
        ("attention.clamp_kqv", "float32", 8.0),
        ("rope.scale_linear", "float32", 4.0),
        ("rope.scaling.type", "string", "yarn"),
    ],
)
def test_attention_of_another_kind_has_layers_and_no_text(name, kind, value, strange):
    assert GgufModel(str(strange())).recorded
    path = strange(f"llama.{name}", kind, value)
    assert not GgufModel(str(path)).recorded
    assert GgufModel(str(path)).missing() is None
    with pytest.raises(MoebenchError, match=rf"has {name} in its attention, which is not carried over"):
        check_whole(open_file(path))


def test_what_a_file_holds_too_much_of_is_told(strange):
    biased = strange(more={"blk.0.ffn_down.bias": (HIDDEN,)}.items())
    assert "has 'blk.0.ffn_down.bias', and FFNs here have no biases" in plan_error(biased)
    same = "x" * 13 + ".length"  # as long as llama.context_length
    content = strange(same).read_bytes()
    biased.write_bytes(content.replace(same.encode(), b"llama.context_length"))
    assert "is damaged (two metadata of one name)" in plan_error(biased)


def test_no_sentence_carries_what_a_terminal_would_obey(strange):
    said = plan_error(strange(arch="mam\x1b[2Jba"))
    assert r"'mam\x1b[2Jba'" in said
    path = strange(more={"blk.0.\x1b[2J": (1,)}.items())
    with pytest.raises(MoebenchError, match=r"'blk\.0\.\\x1b\[2J'"):
        as_transformers(path)


def test_a_type_without_a_number_is_told_where_a_tensor_is_decoded(strange):
    path = strange()
    content, name = bytearray(path.read_bytes()), b"token_embd.weight"
    at = content.index(name) + len(name) + 4 + 8 * 2
    content[at : at + 4] = struct.pack("<I", 999)
    path.write_bytes(bytes(content))
    with pytest.raises(MoebenchError, match="is stored as type 999, which the installed gguf does not decode"):
        read_dense(path, "token_embd.weight")


def test_what_was_made_by_another_converter_is_not_found_again(strange, monkeypatch):
    source = build(GgufModel(str(strange())))
    before = source.identity()
    monkeypatch.setattr("moebench.suites.models.gguf_model.CONVERTER", 0)
    assert source.identity() != before


def test_a_folder_without_a_tensor_of_its_model_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("llama", **SIZES))
    state = model.state_dict()
    state.pop("model.layers.1.mlp.up_proj.weight")
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(MoebenchError, match=r"has no tensor 'model\.layers\.1\.mlp\.up_proj\.weight' of its model"):
        load(tmp_path)


def test_no_file_and_another_file_are_told(tmp_path):
    with pytest.raises(MoebenchError, match=r"add model\.path=FILE\.gguf"):
        GgufModel().shape()
    with pytest.raises(MoebenchError, match=r"cannot be read \(No such file"):
        GgufModel(str(tmp_path / "no.gguf")).shape()
    other = tmp_path / "other.gguf"
    for content in (b"", b"PK\x03\x04", b"GGML" + bytes(40)):
        other.write_bytes(content)
        with pytest.raises(MoebenchError, match="is no GGUF file"):
            GgufModel(str(other)).shape()
    other.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(64))
    with pytest.raises(MoebenchError, match=r"version 50331648.*little-endian"):
        GgufModel(str(other)).shape()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    metadata(writer, "llama", EXPERTS)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((4, HIDDEN), dtype=np.float32))
    close(writer)
    return path.read_bytes()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_costs_a_sentence(small, tmp_path, data):
    """With any eight bytes of its header changed: an error of ours, or tensors that lie within the file."""
    path = Path(tmp_path) / "damaged.gguf"
    content = bytearray(small)
    at = data.draw(st.integers(4, small.index(b"token_embd.weight") + 60))
    content[at : at + 8] = data.draw(st.one_of(st.binary(min_size=8, max_size=8), st.just(b"\xff" * 8)))
    path.write_bytes(bytes(content))
    with contextlib.suppress(MoebenchError):
        assert all(place.start <= len(content) for place in open_file(path).tensors.values() if place.size)


def test_every_truncation_is_seen(small, tmp_path):
    path = tmp_path / "cut.gguf"
    for length in range(0, len(small) - 1, 37):
        path.write_bytes(small[:length])
        with pytest.raises(MoebenchError, match=r"is no GGUF file|it ends within its header|is truncated"):
            open_file(path)
    assert read_header(path).metadata  # only its tensors are cut off


# --- a real file ------------------------------------------------------------------------------------------------------


def test_smollm2_by_its_file_is_smollm2():
    pytest.importorskip("transformers")
    from moebench.suites.model_plugins import SmolLM2
    from moebench.suites.models.smollm2 import SmolLM2Model

    known = SmolLM2Model(SmolLM2(), lambda line: None)
    try:
        file = known.params.fetch(known.progress)
    except MoebenchError as error:
        pytest.skip(str(error))
    source = build(GgufModel(str(file)))
    assert source.shape == known.shape
    assert source.params.weights_sha256() == known.params.weights_sha256()
    mine, theirs = source.layer(7), known.layer(7)
    assert torch.equal(mine.gate_up, theirs.gate_up)
    assert torch.equal(mine.down, theirs.down)
    assert mine.stored.down[0].scheme.codec == "gguf_q4_1"
    assert 8 * mine.stored.down[0].nbytes / mine.down.numel() == 5.0
    (model, tokenizer), (other, _) = source.language_model(), known.language_model()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, other(ids).logits)
