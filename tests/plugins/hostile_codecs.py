"""Quantizations that misbehave, each in one way, beside one that is honest with codes of its own.

``EXPECTED`` says how each one must end in suite ``quantization``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moebench.contracts import Descriptor, Scheme

if TYPE_CHECKING:
    from torch import Tensor

SCHEME = Scheme("its_own", 8.0)


@dataclass(frozen=True)
class Codec:
    """No parameters: what each does is its name."""

    def scheme(self) -> Scheme:
        return SCHEME


@dataclass(frozen=True, eq=False)
class Coded:
    """8 bit codes of one scale; ``spoil`` is what is done to the decoded matrix, told which dtype was asked for."""

    codes: Tensor
    scale: Tensor
    spoil: Callable[[Tensor, Any], Tensor]
    understated: int = 1
    scheme: Scheme = SCHEME
    calls: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return (self.codes.nbytes + self.scale.nbytes) // self.understated

    def dequantize(self, dtype: Any = None) -> Tensor:
        import torch

        dtype = torch.float32 if dtype is None else dtype
        self.calls.append(1)
        return self.spoil(self.codes * self.scale, dtype).to(dtype)


def step(change: Callable[[Coded], Any]) -> Callable[[Any, Any], Any]:
    """Return the quantization that encodes every matrix honestly and hands out what ``change`` makes of it."""

    def encode(weight: Tensor) -> Any:
        import torch

        scale = weight.abs().max() / 127
        return change(Coded((weight / scale).round().to(torch.int8), scale, lambda decoded, dtype: decoded))

    def quantize(store: Any, seen: Any) -> Any:
        return replace(store, gate_up=tuple(map(encode, store.gate_up)), down=tuple(map(encode, store.down)))

    return quantize


def own_codes(params: Codec) -> Any:
    return step(lambda coded: coded)


def unsteady(params: Codec) -> Any:
    """Decodes to a little more each time."""

    def change(coded: Coded) -> Coded:
        return replace(coded, spoil=lambda decoded, dtype: decoded * (1 + 0.001 * len(coded.calls)), calls=coded.calls)

    return step(change)


def more_in_half(decoded: Tensor, dtype: Any) -> Tensor:
    return decoded * (1.1 if dtype.itemsize == 2 else 1.0)


def two_faced(params: Codec) -> Any:
    """What is computed with in bfloat16 is not what the oracle is shown in float32."""
    return step(
        lambda coded: replace(coded, spoil=lambda decoded, dtype: decoded * (1.1 if dtype.itemsize == 2 else 1))
    )


def understates(params: Codec) -> Any:
    return step(lambda coded: replace(coded, understated=2))


def decodes_to_nan(params: Codec) -> Any:
    return step(lambda coded: replace(coded, spoil=lambda decoded, dtype: decoded / 0 * 0))


def drops_a_row(params: Codec) -> Any:
    return step(lambda coded: replace(coded, codes=coded.codes[:-1].clone()))


EXPECTED = {
    "own_codes": ("ok", "no file is written"),
    "unsteady": ("wrong", "decodes to something else each time"),
    "two_faced": ("wrong", "of its norm"),
    "understates": ("wrong", "bytes and holds"),
    "decodes_to_nan": ("wrong", "does not decode to finite numbers"),
    "drops_a_row": ("wrong", "has shape"),
}
"""How each quantization must end: status, and words of its reason."""

DESCRIPTORS = [
    Descriptor("quantization", name, f"misbehaves: {name}", f"{__file__}:{name}", Codec) for name in EXPECTED
]
