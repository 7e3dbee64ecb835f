"""``column_skip``: a C kernel that reads the weights of kept channels alone; execution ``sparse=skip``.

Weights are copied once, at load time, so that what one channel needs lies in one piece: columns of gate and up by
input channel, columns of down by neuron, and rows of up by neuron where the gate decides. A token's channels are
decided in the kernel's own loops. An expert's tokens go in chunks of at most ``chunk``, of which the union of channels
is read; a decode of one token reads what that token keeps. Without sparsity the same loops read everything: the dense
baseline of the kernel. Sums are float32; one thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..contracts import Availability, Execution, LayerSpec, Refusal
from ..kernels.cpu import build
from ..kernels.cpu.column_skip import ACTIVATIONS, SITES, Counts, Kernel, Layer, Site, pointers
from . import rules
from .convert import to_sorted
from .plugins import ColumnSkip as Params
from .session import Executor, Session, open_session, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.channels import SiteRule
    from ..moe.experts import ExpertStore

DTYPES = ("float32", "bfloat16")
LEAVES_OUT = ("topk", "fixed", "gate", "per_expert", "residual")
"""The features of sparsity that the kernel has (``rules.FEATURES``)."""


class Columns:
    """One layer's experts in the kernel's layout, with its rules; every tensor is a copy of its own."""

    def __init__(self, store: ExpertStore, spec: LayerSpec, chunk: int) -> None:
        self.dtype = torch_dtype(spec.dtype)
        self.kept_alive: list[Any] = []
        gate_up, down = store.dense(self.dtype)
        sites = {} if store.sparsity is None else store.sparsity.sites
        self.layer = Layer(store.hidden, store.width, chunk)
        self.layer.bfloat16 = int(spec.dtype == "bfloat16")
        self.layer.activation, self.layer.gated = ACTIVATIONS.index(store.activation), int(store.gated)
        if "gate" in sites:
            gate_up, up = gate_up.chunk(2, dim=1)
            self.layer.up = self._pointers(up)
        self.layer.first = self._pointers(gate_up.transpose(1, 2))
        self.layer.down = self._pointers(down.transpose(1, 2))
        for place, name in enumerate(SITES):
            if name in sites:
                self._set(self.layer.sites[place], sites[name])
        rank = max(site.rank for site in self.layer.sites)
        widest = max(store.hidden, store.width)
        self.working = chunk * (3 * store.width + store.hidden + widest + rank) + widest

    def _copied(self, tensor: Tensor) -> Tensor:
        """Return a copy in one piece, kept for as long as the kernel may read it."""
        copied = tensor.detach().clone(memory_format=_contiguous())
        self.kept_alive.append(copied)
        return copied

    def _pointers(self, by_expert: Tensor) -> Any:
        """Return where each expert's part of a copy of ``by_expert`` [N_F, ..] begins."""
        copied = self._copied(by_expert.to(self.dtype))
        step = copied[0].nbytes if len(copied) else 0
        made = pointers([copied.data_ptr() + place * step for place in range(len(copied))])
        self.kept_alive.append(made)
        return made

    def _set(self, site: Site, rule: SiteRule) -> None:
        """Write a rule as the kernel reads it; fixed channels are those with weight 1 of weights 0 and 1."""
        site.active = 1
        weight, site.threshold = rule.weight, rule.threshold or 0.0
        if rule.kept is not None:
            weight = rule.kept.float()
        elif rule.k is not None:
            site.top, site.threshold = rule.k, float("inf")
        if weight is not None:
            site.by_expert = int(weight.dim() == 2)
            site.weight = self._copied(weight.float()).data_ptr()
        if rule.residual is not None:
            site.rank = rule.residual.right_FRI.shape[1]
            site.right = self._pointers(rule.residual.right_FRI.transpose(1, 2))
            site.left = self._pointers(rule.residual.left_FOR.transpose(1, 2))

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(kept.nbytes for kept in self.kept_alive if hasattr(kept, "nbytes"))


def _contiguous() -> Any:
    import torch

    return torch.contiguous_format


class ColumnSkipExecutor(Executor):
    """One layer: assignments sorted by expert, then one call of the kernel."""

    def __init__(self, store: ExpertStore, spec: LayerSpec, chunk: int) -> None:
        super().__init__(store, spec)
        import torch

        self.torch = torch
        self.kernel = Kernel()
        self.columns = Columns(store, spec, chunk)
        self.memory = torch.empty(self.columns.working)
        self.counts = Counts()
        self.kernels = (f"column_skip.c ({self.kernel.told})",)

    def add(self, y_TH: Tensor, x_TH: Tensor, inputs: Sequence[Any]) -> None:
        """Add the weighted outputs of the experts."""
        x = x_TH.detach().float().contiguous()
        direct = y_TH.dtype == self.torch.float32 and y_TH.is_contiguous()
        y = y_TH if direct else y_TH.new_zeros(y_TH.shape, dtype=self.torch.float32)
        token_N, offsets_E1, weight_N = self._sorted(inputs, len(x_TH))
        addresses = [tensor.data_ptr() for tensor in (x, token_N, offsets_E1, weight_N, y, self.memory)]
        self.kernel.layer(ctypes.byref(self.columns.layer), self.spec.experts, *addresses, self.counts)
        if not direct:
            y_TH.copy_(y)

    def _sorted(self, inputs: Sequence[Any], num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (token_N, offsets_E1, weight_N); slots are sorted by the kernel, and may leave room behind N."""
        torch, experts = self.torch, self.spec.experts
        if self.spec.boundary != "topk":
            token_N, offsets_E1, weight_N = to_sorted(inputs, self.spec, num_tokens)
            return token_N.contiguous(), offsets_E1.contiguous(), weight_N.detach().float().contiguous()
        indices_TK, weights_TK = inputs[0].contiguous(), inputs[1].detach().float().contiguous()
        token_S = torch.empty(indices_TK.numel(), dtype=torch.int64)
        weight_S = torch.empty(indices_TK.numel())
        offsets_E1 = torch.empty(experts + 1, dtype=torch.int32)
        addresses = [tensor.data_ptr() for tensor in (token_S, offsets_E1, weight_S)]
        tokens, slots = indices_TK.shape
        self.kernel.sort(indices_TK.data_ptr(), weights_TK.data_ptr(), tokens, slots, experts, *addresses)
        return token_S, offsets_E1, weight_S

    def events(self) -> Iterator[Mapping[str, Any]]:
        """Yield what the kernel counted at each site since it was loaded."""
        for name, count in zip(SITES, self.counts, strict=True):
            if count.channels:
                counted = {field: getattr(count, field) for field, _ in count._fields_}
                yield {"event": "channels", "site": name, **counted}

    def resident_bytes(self) -> int:
        """Return the bytes of the copies that the kernel reads."""
        return self.columns.nbytes


class ColumnSkip:
    """The backend."""

    own_form = True

    def __init__(self, params: Params) -> None:
        self.params = params

    def availability(self) -> Availability:
        """It needs a C compiler; nothing is built to find out."""
        reason = build.missing("column_skip")
        return Availability(not reason, reason)

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of FFN experts, forward only; sparse ones by skipping, others as the kernel's dense baseline."""
        refused = rules.refusal(spec, "column_skip", DTYPES, leaves_out=LEAVES_OUT)
        if refused is None and spec.sparsity is not None and not spec.sparsity.sites:
            refused = Refusal("column_skip leaves out channels, not single weights; use the eager backend")
        sparse = "none" if spec.sparsity is None else "skip"
        return refused or replace(rules.execution(spec, ("topk", "sorted")), sparse=sparse)  # type: ignore[arg-type]

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers: build the kernel where the cache does not have it, and copy the weights into its layout."""
        chunk = self.params.chunk
        notes = f"chunks of at most {chunk} tokens"
        return open_session(
            lambda store, spec: ColumnSkipExecutor(store, spec, chunk), layers, specs, notes, sparse="skip"
        )
