"""One layer's experts as a store: dense or quantized per expert, in the layout of transformers 5.

Shape letters: E expert ids, N_F experts that own weights, F expert width, Q width of an attention's queries, H hidden,
T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..contracts import OWNERS, MoebenchError, Scheme
from .channels import DENSE, Slot, Sparsity, WeightMask
from .token_codes import rounded_tokens

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nnf.silu,
    "gelu": nnf.gelu,
    "relu": nnf.relu,
}
"""Activation functions by the name used in LayerSpec."""


@runtime_checkable
class QTensor(Protocol):
    """A weight matrix [out, in] in its real packed storage."""

    @property
    def scheme(self) -> Scheme:
        """How the matrix is stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros as stored."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix [out, in]: the exact values that every execution must use."""


Weight = Tensor | QTensor


class Stored(NamedTuple):
    """The FFN matrices of a layer in the packed bytes of a model's file: one of each per expert, or those of a FFN."""

    gate_up: tuple[QTensor, ...]
    down: tuple[QTensor, ...]


@dataclass(frozen=True)
class Constants:
    """Constant experts of MoE++ (arXiv 2410.07348): E(x) = a1 x + a2 v with [a1, a2] = softmax(W_c x).

    ``gate_C2H`` and ``value_CH`` have one entry per constant expert, in the order of their ids.
    """

    gate_C2H: Tensor
    value_CH: Tensor


@dataclass(frozen=True)
class ExpertStore:
    """The routed experts of one layer.

    ``gate_up`` and ``down`` hold the experts that own weights (``contracts.OWNERS``) in the order of their ids: one
    tensor [N_F, 2F, H] / [N_F, F, H] (ungated) and [N_F, H, F], or a sequence of N_F QTensors of shapes [2F, H] and
    [H, F]. ``kinds`` names every expert id; other kinds own no weights here (``constants`` aside). An expert of kind
    ``sequence`` is a causal attention of ``heads`` heads: its ``gate_up`` [3Q, H] are the rows of query, key and value,
    its ``down`` [H, Q] is the output. ``stored`` are the same weights as a file has them, for quantization ``file``.
    """

    gate_up: Tensor | Sequence[QTensor]
    down: Tensor | Sequence[QTensor]
    kinds: tuple[str, ...]
    activation: str = "silu"
    gated: bool = True
    constants: Constants | None = None
    sparsity: Sparsity | None = None
    heads: int = 0
    stored: Stored | None = None

    def __post_init__(self) -> None:
        owners = len(self.ffn_ids)
        if len(self.gate_up) != owners or len(self.down) != owners:
            raise ValueError(
                f"{len(self.gate_up)} weights for {owners} experts that own some; give one per 'ffn' in kinds, or one "
                f"per 'gather' or 'sequence'."
            )

    @property
    def num_experts(self) -> int:
        """E: expert ids of every kind."""
        return len(self.kinds)

    @cached_property
    def ffn_ids(self) -> tuple[int, ...]:
        """The expert ids that own weights."""
        return tuple(i for i, kind in enumerate(self.kinds) if kind in OWNERS)

    @cached_property
    def slots(self) -> dict[int, int]:
        """The place in ``gate_up`` and ``down`` of each expert id that owns weights."""
        return {expert: slot for slot, expert in enumerate(self.ffn_ids)}

    @property
    def quantized(self) -> bool:
        """Whether the weights are QTensors."""
        return not isinstance(self.gate_up, Tensor)

    @property
    def hidden(self) -> int:
        """H."""
        return self._shape(self.down)[0]

    @property
    def width(self) -> int:
        """F."""
        return self._shape(self.down)[1]

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """How each expert that owns weights is stored."""
        if isinstance(self.down, Tensor):
            return (Scheme(bits=8.0 * self.down.element_size()),) * len(self.down)
        return tuple(weight.scheme for weight in self.down)

    @cached_property
    def act_bits(self) -> int | None:
        """The bits to which experts round what their products read, each token by its own scale; None: not at all."""
        if isinstance(self.gate_up, Tensor) or isinstance(self.down, Tensor):
            return None
        found = {weight.scheme.act_bits for weight in (*self.gate_up, *self.down)}
        if len(found) > 1:
            raise MoebenchError(
                "experts of one layer round their tokens to different bits; give all the same act_bits."
            )
        return found.pop() if found else None

    @property
    def nbytes(self) -> int:
        """Bytes of all expert weights as stored."""
        return self._nbytes(self.gate_up) + self._nbytes(self.down)

    def weights(self, slot: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return (gate_up [2F, H], down [H, F]) of the FFN expert in place ``slot``, dequantized, as ``dtype``."""
        return self._one(self.gate_up, slot, dtype), self._one(self.down, slot, dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return all FFN experts (gate_up [N_F, 2F, H], down [N_F, H, F]) dequantized, as ``dtype``."""
        return self._all(self.gate_up, dtype), self._all(self.down, dtype)

    @staticmethod
    def _shape(weights: Tensor | Sequence[QTensor]) -> tuple[int, int]:
        if isinstance(weights, Tensor):
            return int(weights.shape[1]), int(weights.shape[2])
        return weights[0].shape

    @staticmethod
    def _nbytes(weights: Tensor | Sequence[QTensor]) -> int:
        return weights.nbytes if isinstance(weights, Tensor) else sum(weight.nbytes for weight in weights)

    @staticmethod
    def _one(weights: Tensor | Sequence[QTensor], slot: int, dtype: torch.dtype) -> Tensor:
        weight = weights[slot]
        return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)

    @staticmethod
    def _all(weights: Tensor | Sequence[QTensor], dtype: torch.dtype) -> Tensor:
        if isinstance(weights, Tensor):
            return weights.to(dtype)
        return torch.stack([weight.dequantize(dtype) for weight in weights])


def masked(store: ExpertStore, weights: WeightMask) -> ExpertStore:
    """Return the store with the weights that ``weights`` does not keep set to zero; experts must be dense."""
    if not isinstance(store.gate_up, Tensor) or not isinstance(store.down, Tensor):
        raise MoebenchError("weights are masked before they are quantized; use quantization=none with this sparsity.")
    return replace(store, gate_up=store.gate_up * weights.gate_up, down=store.down * weights.down)


def hidden_from(product: Tensor, store: ExpertStore, slot: Slot = None) -> Tensor:
    """Return what down reads [.., F] before site ``hidden``, from the product with gate_up [.., 2F] (up [.., F])."""
    act = ACTIVATIONS[store.activation]
    if not store.gated:
        return act(product)
    gate, up = product.chunk(2, dim=-1)
    return (store.sparsity or DENSE).apply("gate", act(gate), slot) * up


def expert_product(x_TH: Tensor, gate_up: Tensor, store: ExpertStore, slot: int | None = None) -> Tensor:
    """Return the product of one FFN expert's ``gate_up`` [T, 2F] (up [T, F]); see ``expert_forward``."""
    sparsity = store.sparsity or DENSE
    product = nnf.linear(rounded_tokens(sparsity.apply("input", x_TH, slot), store.act_bits), gate_up)
    return sparsity.added("input", product, x_TH, slot)


def expert_forward(x_TH: Tensor, gate_up: Tensor, down: Tensor, store: ExpertStore, slot: int | None = None) -> Tensor:
    """Return f_e(x) [T, H] for one FFN expert with dense ``gate_up`` [2F or F, H] and ``down`` [H, F].

    ``slot`` is its place among the experts that own weights.
    """
    sparsity, hidden = store.sparsity or DENSE, hidden_from(expert_product(x_TH, gate_up, store, slot), store, slot)
    product = nnf.linear(rounded_tokens(sparsity.apply("hidden", hidden, slot), store.act_bits), down)
    return sparsity.added("hidden", product, hidden, slot)
