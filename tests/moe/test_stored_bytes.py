"""Every registered quantization takes the bytes of its format, in memory and in a file; more bits err less."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moebench.contracts import MIXED, MoebenchError, Registry, Selection
from moebench.moe.bits.calibration import channel_stats
from moebench.moe.layer import LayerWeights
from moebench.moe.quantization import encoder
from moebench.moe.recipe import Recipe, Stage, prepare_layer
from moebench.moe.shapes import ModelShape
from moebench.moe.stage_artefacts import quantized_artefact

REGISTRY = Registry.load()
NAMES = [name for name in REGISTRY.names("quantization") if name not in ("none", "file")]
"""All that encode; what a file stores has tests of its own."""
EXPERTS = 3
FLOAT32, BFLOAT16 = 4, 2

GGUF_BLOCK_BYTES = {"q4_0": 2 + 16, "q5_0": 2 + 4 + 16, "q8_0": 2 + 32, "tq2_0": 64 + 2, "mxfp4": 1 + 16}
"""Of a block: a float16 scale (E8M0 in MXFP4), what the codes have beyond four bits, and the codes."""

VARIANTS = {
    "rtn": st.fixed_dictionaries(
        {"bits": st.integers(1, 8), "group": st.sampled_from([32, None]), "symmetric": st.booleans()}
    ),
    "gptq": st.fixed_dictionaries({"bits": st.integers(1, 8), "group": st.sampled_from([32, None])}),
    "awq": st.fixed_dictionaries({"bits": st.integers(1, 8), "group": st.sampled_from([32, None])}),
    "hqq": st.fixed_dictionaries({"bits": st.integers(1, 8), "group": st.sampled_from([32, 64])}),
    "w4a4": st.fixed_dictionaries({"group": st.sampled_from([32, None]), "symmetric": st.booleans()}),
    "nf4": st.fixed_dictionaries({"block": st.sampled_from([32, 64])}),
    "fp4": st.fixed_dictionaries({"block": st.sampled_from([32, 64])}),
    "fp8": st.fixed_dictionaries({"format": st.sampled_from(["e4m3", "e5m2"])}),
    "gguf": st.fixed_dictionaries({"type": st.sampled_from(["Q4_0", "Q5_0", "Q8_0", "TQ2_0", "MXFP4"])}),
    "binary": st.fixed_dictionaries({"group": st.sampled_from([32, None])}),
}
"""Parameters that change bytes; what is not named here has its defaults."""


def matrix_bytes(scheme, rows, columns):
    """The bytes of a matrix by the arithmetic of its format, written down once more."""
    groups = 1 if scheme.group is None else columns // scheme.group
    if scheme.codec in ("rtn", "gptq", "awq", "hqq"):
        numbers = groups * (1 if scheme.symmetric else 2)
        channels = columns * BFLOAT16 if scheme.codec == "awq" else 0
        return rows * (math.ceil(columns * scheme.bits / 8) + numbers * BFLOAT16) + channels
    if scheme.codec in ("nf4", "fp4"):
        return rows * (columns // 2 + groups * FLOAT32)
    if scheme.codec == "mxfp4":
        return rows * (columns // 2 + groups)
    if scheme.codec == "nvfp4":
        return rows * (columns // 2 + groups) + FLOAT32
    if scheme.codec.startswith("fp8_"):
        return rows * (columns + FLOAT32)
    if scheme.codec.startswith("gguf_"):
        return rows * groups * GGUF_BLOCK_BYTES[scheme.codec.removeprefix("gguf_")]
    if scheme.codec == "ternary":
        return rows * math.ceil(columns / 5) + FLOAT32
    if scheme.codec == "binary":
        return rows * (math.ceil(columns / 8) + groups * BFLOAT16)
    raise AssertionError(f"no arithmetic of codec '{scheme.codec}' is written down here")


def randn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def prepared(name, hidden, width, seed=0, **params):
    chosen = {"structure": "none", "routing": "topk", "quantization": name, "sparsity": "none"}
    members = {kind: REGISTRY.get(kind, choice) for kind, choice in chosen.items()}
    stages = {k: Stage(m, m.params_from(params if k == "quantization" else {})) for k, m in members.items()}
    up, down = randn(EXPERTS, 2 * width, hidden, seed=seed), randn(EXPERTS, hidden, width, seed=seed + 1)
    weights = LayerWeights(up, down, randn(EXPERTS, hidden, seed=seed + 2))
    shape = ModelShape(hidden, width, EXPERTS, 1, (0,), Selection("softmax", 2, True))
    x_TH = randn(64, hidden, seed=seed + 3)
    return prepare_layer(Recipe(**stages), weights, shape, x_TH, seed, torch.float32, {"layer": 0}, None).store


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_bytes_in_memory_and_on_disk_are_the_arithmetic_of_the_format(name, data, tmp_path_factory):
    params = data.draw(VARIANTS.get(name, st.just({})))
    unit = 256 if params.get("type") == "TQ2_0" else 128
    hidden, width = (unit * data.draw(st.integers(1, 2 if unit == 128 else 1)) for _ in range(2))
    store = prepared(name, hidden, width, **params)
    told = REGISTRY.get("quantization", name).params_from(params).scheme()
    for weights, shape in ((store.gate_up, (2 * width, hidden)), (store.down, (hidden, width))):
        for weight in weights:
            assert weight.shape == shape
            assert told.codec == MIXED or weight.scheme == told
            held = sum(part.untyped_storage().nbytes() for part in weight.parts().values())
            assert weight.nbytes == held == matrix_bytes(weight.scheme, *shape)
    file = tmp_path_factory.mktemp("file") / "experts.safetensors"
    save_file(quantized_artefact(store).tensors, file)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == store.nbytes == sum(t.nbytes for t in load_file(file).values())


# --- real weights ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """A piece of a gate of SmolLM2, and gaussian inputs of uneven channels; Q4_1 codes, so 4 bits may be exact."""
    pytest.importorskip("gguf")
    from moebench.suites.model_plugins import SmolLM2
    from moebench.suites.models.smollm2 import SmolLM2Model

    try:
        weight_OI = SmolLM2Model(SmolLM2(), lambda line: None).layer(14).gate_up[:48, :512].clone()
    except MoebenchError as error:
        pytest.skip(str(error))
    x_NI = randn(2048, 512, seed=5) * randn(512, seed=6).exp()
    return weight_OI, x_NI, channel_stats(x_NI, torch.ones(len(x_NI)))


def errors(found, params):
    weight_OI, x_NI, stats = found
    off_OI = encoder(params)(weight_OI, stats).dequantize() - weight_OI
    return float(off_OI.norm() / weight_OI.norm()), float((x_NI @ off_OI.T).norm() / (x_NI @ weight_OI.T).norm())


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize(
    ("name", "bits", "figure"),
    [
        ("rtn", range(1, 9), 0),  # asymmetric, as by default
        ("rtn", range(2, 9), 1),
        ("hqq", range(1, 9), 0),
        ("gptq", range(2, 9), 1),  # these make outputs right, and may pay with the weights
        ("awq", range(2, 9), 1),
    ],
)
def test_more_bits_err_less_on_real_weights(real, name, bits, figure, group):
    member = REGISTRY.get("quantization", name)
    curve = [errors(real, member.params_from({"bits": b, "group": group}))[figure] for b in bits]
    assert all(more < fewer for fewer, more in pairwise(curve)), curve
    assert curve[-1] < 0.01 < curve[0]


def test_wider_formats_err_less_on_real_weights(real):
    """In the order of their stored bits: 1.125, 1.6, 2.06, 4.25, 4.5, 5.5, 8.06 and 8.5."""
    order = [("binary", {}), ("ternary", {}), ("gguf", {"type": "TQ2_0"}), ("mxfp4", {}), ("nf4", {})]
    order += [("gguf", {"type": "Q5_0"}), ("fp8", {}), ("gguf", {"type": "Q8_0"})]
    curve = [errors(real, REGISTRY.get("quantization", name).params_from(params))[0] for name, params in order]
    assert curve[0] > 0.3
    assert all(more < fewer for fewer, more in pairwise(curve[3:])), curve
    assert min(curve[:3]) > max(curve[3:])
