"""What backends say before they load: descriptors without torch, executions, and refusals in a sentence."""

import subprocess
import sys

import pytest

from moebench.backends import compiled
from moebench.backends.plugins import DESCRIPTORS
from moebench.contracts import Execution, LayerSpec, MoebenchError, Refusal, Scheme, Selection, SparsitySpec

NAMES = (
    "reference",
    "eager",
    "batched",
    "grouped",
    "compiled",
    "packed",
    "duplex",
    "column_skip",
    "triton",
    "cuda_fused",
    "offload",
)
INT8, INT4 = Scheme("rtn", 8.0), Scheme("rtn", 4.0, 128, symmetric=False)
W8A8 = Scheme("rtn", 8.0, act_bits=8)
INT2 = Scheme("rtn", 2.0, 64, symmetric=False)


def layer(dtype="float32", scheme=None, **changes):
    values = {"hidden": 256, "width": 128, "kinds": ("ffn",) * 4, "dtype": dtype, "schemes": (scheme or Scheme(),) * 4}
    return LayerSpec(**{**values, **changes})


def supports(name, spec, **params):
    return next(d for d in DESCRIPTORS if d.name == name).create(params).supports(spec)


def test_all_are_described_in_order():
    assert tuple(d.name for d in DESCRIPTORS) == NAMES


def test_describing_and_asking_imports_no_torch():
    code = (
        "import sys\n"
        "from moebench.backends.plugins import DESCRIPTORS\n"
        "from moebench.contracts import LayerSpec\n"
        "for d in DESCRIPTORS:\n"
        "    b = d.create()\n"
        "    b.availability(); b.supports(LayerSpec(64, 64, ('ffn',) * 4))\n"
        "import moebench.backends.bridge, moebench.backends.session, moebench.backends.convert\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_executions_say_what_will_run(name):
    if name in ("packed", "duplex"):
        told = supports(name, layer("bfloat16", INT8))
        assert told.weights == {"packed": "packed", "duplex": "dequantized"}[name]
        assert (told.boundary, supports(name, layer("bfloat16", INT4, boundary="sorted")).boundary) == (
            "topk",
            "sorted",
        )
        return
    if name == "cuda_fused":
        told = supports(name, layer("bfloat16", INT4, boundary="sorted"))
        assert told == Execution("dequantized", boundary="sorted")
        return
    boundary = "sorted" if name in ("eager", "grouped", "compiled", "column_skip", "triton", "offload") else "topk"
    sparse = "skip" if name == "column_skip" else "mask"
    assert supports(name, layer()) == Execution()
    assert supports(name, layer(boundary="sorted")).boundary == boundary
    weights = "packed" if name == "triton" else "dequantized"
    assert supports(name, layer(scheme=INT4)).weights == weights
    assert supports(name, layer(sparsity=SparsitySpec(("input",)))).sparse == sparse
    selected = layer(boundary="logits", selection=Selection("softmax", 2, renormalize=False))
    assert supports(name, selected).boundary == "topk"


REFUSED = [
    ("eager", layer(kinds=("ffn", "copy")), "no 'copy' experts; fold them"),
    ("reference", layer(kinds=("ffn", "lora")), "no 'lora' experts"),
    ("eager", layer(kinds=("gather",) * 4), "no 'gather' experts; use the reference backend"),
    ("grouped", layer(kinds=("gather",) * 4), "no 'gather' experts; use the reference backend"),
    ("compiled", layer(kinds=("gather",) * 4), "no 'gather' experts"),
    ("packed", layer("bfloat16", INT8, kinds=("gather",) * 4), "no 'gather' experts"),
    ("eager", layer(kinds=("sequence",) * 4, heads=4), "no 'sequence' experts; use the reference backend"),
    ("batched", layer(kinds=("sequence",) * 4, heads=4), "no 'sequence' experts; use the reference backend"),
    ("reference", layer(kinds=("sequence",) * 4), "attentions of 0 heads"),
    ("reference", layer(kinds=("sequence",) * 4, heads=3), "3 heads do not divide their 128 channels"),
    ("packed", layer("bfloat16", INT8, kinds=("ffn", "zero")), "no 'zero' experts"),
    ("eager", layer("int8"), "not int8"),
    ("grouped", layer("float64"), "float32, bfloat16, float16, not float64"),
    ("eager", layer(activation="swiglu_oai"), "activations silu, gelu, relu, not swiglu_oai"),
    ("eager", layer(boundary="hidden"), "boundaries topk, sorted, logits, not hidden"),
    ("eager", layer(boundary="logits"), "use boundary=topk"),
    (
        "compiled",
        layer(sparsity=SparsitySpec(("input",), rule="topk")),
        "leave out a number of channels per",
    ),
    ("compiled", layer(sparsity=SparsitySpec(("gate",))), "leave out channels by the gate"),
    ("grouped", layer(sparsity=SparsitySpec(("input",), residual=True)), "channels that a low-rank matrix reads"),
    ("batched", layer(sparsity=SparsitySpec(("input",), basis=True)), "channels of a rotated input"),
    ("eager", layer(sparsity=SparsitySpec(("gate",)), gated=False), "no site 'gate'"),
    ("batched", layer(sparsity=SparsitySpec(("gate",)), kinds=("gather",) * 4), "one shared threshold"),
    ("eager", layer("bfloat16", INT8, sparsity=SparsitySpec((), masked_weights=True)), "use quantization=none"),
    ("column_skip", layer(sparsity=SparsitySpec(("input",), basis=True)), "channels of a rotated input; use the eager"),
    ("column_skip", layer(sparsity=SparsitySpec((), masked_weights=True)), "channels, not single weights"),
    ("column_skip", layer("float16"), "float32, bfloat16, not float16"),
    ("column_skip", layer(backward=True), "no backward"),
    ("column_skip", layer(scheme=W8A8), "tokens as they are, not rounded to 8 bits"),
    ("column_skip", layer(kinds=("gather",) * 4), "no 'gather' experts; use the reference backend"),
    ("batched", layer(backward=True), "no backward; use eager or grouped"),
    ("compiled", layer(backward=True), "no backward"),
    ("eager", layer(scheme=INT8, backward=True), "use quantization=none"),
    ("reference", layer("bfloat16", backward=True), "wants float32 or float64"),
    ("grouped", layer(hidden=30), "divisible by 4, not 30 and 128"),
    ("grouped", layer("bfloat16", width=36), "divisible by 8, not 256 and 36"),
    ("packed", layer("float32", INT8), "bfloat16, not float32"),
    ("packed", layer("bfloat16"), "choose quantization=int8"),
    (
        "packed",
        layer("bfloat16", schemes=(INT8, INT4, INT2, INT4)),
        "expert 2 cannot be packed: packed reads 8 or 4 bit",
    ),
    ("packed", layer("bfloat16", schemes=(INT8, Scheme(), INT8, INT8)), "expert 1 cannot be packed: packed runs quant"),
    ("packed", layer("bfloat16", Scheme("mixed", 5.0), width=40), "sizes divisible by 16, not 256 and 40"),
    ("packed", layer("bfloat16", Scheme("rtn", 8.0, 32)), "group=None and symmetric=true"),
    ("packed", layer("bfloat16", Scheme("rtn", 8.0, symmetric=False)), "group=None and symmetric=true"),
    ("packed", layer("bfloat16", INT8, width=40), "sizes divisible by 16"),
    ("packed", layer("bfloat16", Scheme("rtn", 4.0, 16)), "groups of 32, 64, 128, 256, not 16"),
    ("packed", layer("bfloat16", Scheme("rtn", 4.0)), "groups of 32, 64, 128, 256, not None"),
    ("packed", layer("bfloat16", INT4, width=192), "do not divide"),
    ("packed", layer("bfloat16", Scheme("nf4", 4.0, 64)), "not nf4 of 4 bits"),
    ("packed", layer("bfloat16", Scheme("rtn", 2.0, 64, False)), "not rtn of 2 bits; use eager"),
    ("packed", layer("bfloat16", INT8, backward=True), "no backward"),
    ("duplex", layer("bfloat16"), "duplex keeps cold experts packed, and packed runs quantized weights"),
    ("duplex", layer("bfloat16", INT2), "not rtn of 2 bits; use eager"),
    ("duplex", layer("bfloat16", W8A8), "duplex reads tokens as they are, not rounded to 8 bits"),
    ("duplex", layer("float32", INT8), "duplex computes in bfloat16, not float32"),
    ("duplex", layer("bfloat16", INT8, kinds=("ffn", "zero")), "no 'zero' experts"),
    ("duplex", layer("bfloat16", INT8, backward=True), "no backward"),
    ("packed", layer("bfloat16", W8A8, backward=True), "no backward"),
    ("packed", layer("bfloat16", W8A8, width=40), "sizes divisible by 16"),
    ("packed", layer("float16", W8A8), "bfloat16, float32, not float16"),
    ("packed", layer("bfloat16", Scheme("rtn", 8.0, act_bits=4)), "not to 4 beside 8; use eager"),
    ("packed", layer("bfloat16", Scheme("rtn", 4.0, 64, act_bits=8)), "not to 8 beside 4; use eager"),
    ("packed", layer("bfloat16", Scheme("rtn", 8.0, 64, act_bits=8)), "group=None and symmetric=true"),
    ("packed", layer("bfloat16", Scheme("mixed", 6.0, act_bits=4)), "not to 4 beside 6; use eager"),
    ("packed", layer("bfloat16", schemes=(INT8, INT8, W8A8, W8A8)), "round their tokens to different bits"),
    ("eager", layer(schemes=(INT8, INT8, W8A8, W8A8)), "round their tokens to different bits"),
    ("eager", layer(scheme=Scheme("rtn", 8.0, act_bits=16)), "rounded to 2 to 8 bits, not 16"),
    ("compiled", layer(scheme=W8A8), "tokens as they are, not rounded to 8 bits; use eager or grouped"),
    ("triton", layer("float64"), "float32, bfloat16, float16, not float64"),
    ("triton", layer(kinds=("ffn", "copy")), "no 'copy' experts; fold them"),
    ("triton", layer(backward=True, sparsity=SparsitySpec(("input",))), "no backward through channels"),
    ("triton", layer("bfloat16", INT8, backward=True), "quantized weights have no gradient"),
    ("triton", layer("bfloat16", W8A8), "tokens as they are, not rounded to 8 bits"),
    ("triton", layer(sparsity=SparsitySpec(("input",), rule="topk")), "a number of channels per token"),
    ("cuda_fused", layer(), "bfloat16, float16, not float32"),
    ("cuda_fused", layer("bfloat16", backward=True), "no backward"),
    ("cuda_fused", layer("bfloat16", W8A8), "tokens as they are, not rounded to 8 bits"),
    ("cuda_fused", layer("bfloat16", sparsity=SparsitySpec(("input",), rule="topk")), "a number of channels per"),
    ("cuda_fused", layer("bfloat16", sparsity=SparsitySpec(("input",))), "leaves out no channels"),
    ("cuda_fused", layer("bfloat16", kinds=("ffn", "copy")), "no 'copy' experts; fold them"),
    ("reference", layer(scheme=W8A8, kinds=("sequence",) * 4, heads=4), "rounds no tokens of attentions"),
    ("offload", layer(kinds=("ffn", "copy")), "no 'copy' experts; fold them"),
    ("offload", layer(kinds=("gather",) * 4), "no 'gather' experts; use the reference backend"),
    ("offload", layer(backward=True), "no backward"),
    ("offload", layer(boundary="logits"), "use boundary=topk"),
]


@pytest.mark.parametrize(("name", "spec", "words"), REFUSED)
def test_refusals_are_one_sentence(name, spec, words):
    answer = supports(name, spec)
    assert isinstance(answer, Refusal)
    assert words in answer.reason
    assert "\n" not in answer.reason


def test_folding_makes_a_refused_layer_acceptable():
    spec = layer(kinds=("ffn", "copy", "ffn", "zero"), schemes=(Scheme(),) * 2)
    assert isinstance(supports("grouped", spec), Refusal)
    assert supports("grouped", spec.folded()) == Execution()


def test_triton_packs_what_its_kernels_read_and_dequantizes_the_rest():
    packed = [INT8, INT4, Scheme("hqq", 4.0), Scheme("fp8_e4m3", 8.0), Scheme("mxfp4", 4.0, 32)]
    assert {supports("triton", layer(scheme=scheme)).weights for scheme in packed} == {"packed"}
    others = [INT2, Scheme("nf4", 4.0, 64), Scheme("fp8_e5m2", 8.0), Scheme("mixed", 5.0)]
    assert {supports("triton", layer(scheme=scheme)).weights for scheme in others} == {"dequantized"}
    assert supports("triton", layer(schemes=(INT8, INT8, INT4, INT4))).weights == "dequantized"


def test_triton_skips_channels_where_calls_have_few_tokens():
    teal, gate = SparsitySpec(("input", "hidden")), SparsitySpec(("gate",))
    told = [
        supports("triton", layer(sparsity=sparsity, tokens=tokens, scheme=scheme)).sparse
        for sparsity, tokens, scheme in [
            (teal, 8, None),
            (teal, 9, None),
            (teal, None, None),
            (gate, 1, None),
            (teal, 1, INT8),
            (None, 1, None),
        ]
    ]
    assert told == ["skip", "mask", "mask", "mask", "mask", "none"]
    assert supports("triton", layer(sparsity=teal, tokens=1), decode_tokens=0).sparse == "mask"


def test_triton_wants_few_tokens_for_decoding():
    with pytest.raises(MoebenchError, match="decode_tokens=65 must lie between 0 and 64"):
        supports("triton", layer(), decode_tokens=65)


def test_batched_wants_a_limit_above_zero():
    with pytest.raises(MoebenchError, match="limit_mib=0 must be at least 1"):
        supports("batched", layer(), limit_mib=0)


@pytest.mark.parametrize("crossover", [-1, 2**31])
def test_duplex_wants_a_number_of_tokens(crossover):
    with pytest.raises(MoebenchError, match=f"crossover={crossover} must be a number of tokens; 0 dequantizes all"):
        supports("duplex", layer(), crossover=crossover)


def test_compiled_is_not_available_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    answer = compiled.Compiled().availability()
    assert (answer.available, answer.reason) == (
        False,
        "compiled needs a C++ compiler; install g++ or name one in CXX",
    )


def test_compiled_code_is_kept_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    assert compiled.cache_folder() == tmp_path / "inductor"
    monkeypatch.delenv("MOEBENCH_CACHE")
    assert compiled.cache_folder().parts[-3:] == (".cache", "moebench", "inductor")
