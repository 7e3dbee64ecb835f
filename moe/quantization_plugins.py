"""Descriptors of quantizations beside rounding to 8, 4 and 2 bits, which ``plugins`` has, and of their outliers.

Imports no torch.
"""

from __future__ import annotations

from typing import Any

from ..contracts import Descriptor
from .bits.mixed_params import Mixed
from .blocks.params import AsStored, Binary, Fp4, Fp8, Gguf, Mxfp4, Nf4, Nvfp4, Ternary
from .codecs.integer_params import Awq, Gptq, Hqq, Rtn
from .smoothing.params import EAQuant, Outliers
from .token_params import W4A4, W8A8


def _codec(name: str, summary: str, params: type[Any]) -> Descriptor:
    return Descriptor("quantization", name, summary, "moebench.moe.quantization:coded", params)


DESCRIPTORS = [
    _codec("rtn", "round to nearest, 1 to 8 bits", Rtn),
    _codec("gptq", "GPTQ: later columns make good for the errors of earlier ones", Gptq),
    _codec("awq", "AWQ: channels of large activations scaled up first", Awq),
    _codec("hqq", "HQQ: offsets sought without data", Hqq),
    _codec("w8a8", "weights and tokens rounded to 8 bits", W8A8),
    _codec("w4a4", "weights and tokens rounded to 4 bits", W4A4),
    _codec("nf4", "NF4: quantiles of a normal", Nf4),
    _codec("fp4", "FP4 of bitsandbytes", Fp4),
    _codec("mxfp4", "OCP MXFP4", Mxfp4),
    _codec("nvfp4", "NVIDIA's FP4 with FP8 scales", Nvfp4),
    _codec("fp8", "8 bit floats", Fp8),
    _codec("gguf", "a block format of GGUF", Gguf),
    _codec("ternary", "-1, 0 and 1 (BitNet b1.58)", Ternary),
    _codec("binary", "signs", Binary),
    Descriptor(
        "quantization",
        "file",
        "as the model's own file has them, its bytes kept",
        "moebench.moe.quantization:as_stored",
        AsStored,
    ),
    Descriptor(
        "quantization",
        "mixed",
        "bits for each expert by a rule, within a budget",
        "moebench.moe.bits.step:mixed",
        Mixed,
    ),
    Descriptor(
        "quantization",
        "eaquant",
        "weights and tokens smoothed by expert, an aligned gate, balanced calibration",
        "moebench.moe.smoothing.steps:eaquant",
        EAQuant,
    ),
    Descriptor(
        "structure",
        "outliers",
        "the model's own experts behind inputs with outlier channels",
        "moebench.moe.smoothing.steps:outliers",
        Outliers,
    ),
]
