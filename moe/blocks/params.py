"""Parameters of the block codecs, ready to be registered; no torch.

``Scheme.bits`` is what a code takes; with its scales a matrix takes more, and ``8 nbytes / (out in)`` says how much.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...contracts import Scheme

GGUF_BLOCKS = {"Q4_0": 32, "Q5_0": 32, "Q8_0": 32, "TQ2_0": 256, "MXFP4": 32}
"""The GGUF types that can be encoded, with the weights of a block."""

GGUF_OFFSETS = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K", "IQ1_S", "IQ1_M")
"""The GGUF types whose blocks shift their codes besides scaling them."""


@dataclass(frozen=True)
class Codebook:
    """4 bit codes into a table of 16 values, scaled by float32 max|w| per ``block`` weights."""

    codec: ClassVar[str]

    block: int = 64

    def __post_init__(self) -> None:
        if self.block < 2 or self.block % 2:
            raise ValueError(
                f"block must be even and at least 2, not {self.block}: two codes share a byte; 64 is usual."
            )

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return Scheme(self.codec, 4.0, self.block)


class Nf4(Codebook):
    """NormalFloat4 (QLoRA, arXiv 2305.14314): 16 quantiles of a normal; float32 max|w| per ``block`` weights.

    4.5 bits per weight at the default of 64, which is also bitsandbytes's.
    """

    codec = "nf4"


class Fp4(Codebook):
    """The 4 bit floats of bitsandbytes (0, 1/192, 1/6 ... 1 and their negatives); float32 max|w| per ``block``.

    4.5 bits per weight at the default of 64, which is also bitsandbytes's.
    """

    codec = "fp4"


@dataclass(frozen=True)
class Mxfp4:
    """OCP microscaling: E2M1 codes, a power of two (E8M0) per 32 weights; 4.25 bits per weight."""

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return Scheme("mxfp4", 4.0, 32)


@dataclass(frozen=True)
class Nvfp4:
    """NVIDIA's FP4: E2M1 codes, an e4m3 scale per 16 weights, a float32 scale per matrix; 4.5 bits per weight + 4 B."""

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return Scheme("nvfp4", 4.0, 16)


@dataclass(frozen=True)
class Fp8:
    """8 bit floats, e4m3 (largest 448) or e5m2 (largest 57344), with a float32 scale per output row."""

    format: Literal["e4m3", "e5m2"] = "e4m3"

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return Scheme(f"fp8_{self.format}", 8.0)


@dataclass(frozen=True)
class Gguf:
    """A block format of GGUF, encoded by the package gguf: 4.5, 5.5, 8.5, 2.0625 and 4.25 bits per weight."""

    type: Literal["Q4_0", "Q5_0", "Q8_0", "TQ2_0", "MXFP4"] = "Q4_0"

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return gguf_scheme(self.type, GGUF_BLOCKS[self.type])


@dataclass(frozen=True)
class AsStored:
    """The packed matrices of the model's own file, such as a GGUF's K-quants: its bytes, and nothing encoded again.

    The model says which types these are. Structures that cut within a block are refused.
    """

    as_stored: ClassVar[bool] = True

    def scheme(self) -> Scheme:
        """Return nothing that is known: a plan asks the model for the scheme."""
        raise ValueError("what a file stores is known to its model alone; use model=gguf")


@dataclass(frozen=True)
class Ternary:
    """-1, 0 or 1 times one float32 mean|w| of the whole matrix (BitNet b1.58, arXiv 2402.17764), 5 codes per byte."""

    def scheme(self) -> Scheme:
        """Return the scheme; ``group`` None stands for the whole matrix here, since rows share their scale."""
        return Scheme("ternary", 1.6)


@dataclass(frozen=True)
class Binary:
    """The sign of a weight times the bfloat16 mean|w| of its ``group``; None = one mean per output row."""

    group: int | None = 128

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise ValueError(f"group must be at least 1 or null, not {self.group}; 128 is usual.")

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return Scheme("binary", 1.0, self.group)


def gguf_scheme(type_name: str, block: int) -> Scheme:
    """Return the scheme of a GGUF type with blocks of ``block`` weights; ``gguf_type`` reads the type from it again.

    Its bits are the number in the type's name: what a code takes, but for some IQ types, whose numbers are nominal.
    """
    bits = float(re.findall(r"\d+", type_name)[0])
    return Scheme(f"gguf_{type_name.lower()}", bits, block, type_name not in GGUF_OFFSETS)


def gguf_mixed(bits: float) -> Scheme:
    """Return what stands in a plan for matrices of several GGUF types, with ``bits`` per weight on average."""
    return Scheme("gguf_mixed", bits)


def gguf_type(scheme: Scheme) -> str:
    """Return the GGUF type of a scheme, such as Q4_K."""
    return scheme.codec.removeprefix("gguf_").upper()
