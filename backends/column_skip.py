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
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakValueDictionary

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


class Form:
    """The weights of one layer's experts in the kernel's layout: copies of their own, and where each expert begins."""

    def __init__(self, gate_up: Tensor, down: Tensor, dtype: str, rows: bool) -> None:
        self.dtype, self.kept = torch_dtype(dtype), Kept()
        self.up: Any = None
        self.source: tuple[Tensor, ...] = ()
        if rows:
            gate_up, up = gate_up.chunk(2, dim=1)
            self.up = self.kept.pointers(up.to(self.dtype))
        self.first = self.kept.pointers(gate_up.transpose(1, 2).to(self.dtype))
        self.down = self.kept.pointers(down.transpose(1, 2).to(self.dtype))


class Kept:
    """Tensors that the kernel reads by their address, alive for as long as this is."""

    def __init__(self) -> None:
        self.alive: list[Any] = []
        self.nbytes = 0

    def copied(self, tensor: Tensor) -> Tensor:
        """Return a copy in one piece."""
        import torch

        copied = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.alive.append(copied)
        self.nbytes += copied.nbytes
        return copied

    def pointers(self, by_expert: Tensor) -> Any:
        """Return where each expert's part of a copy of ``by_expert`` [N_F, ..] begins."""
        copied = self.copied(by_expert)
        made = pointers([one.data_ptr() for one in copied])
        self.alive.append(made)
        return made


_FORMS: WeakValueDictionary[tuple[Any, ...], Form] = WeakValueDictionary()


def form_of(store: ExpertStore, spec: LayerSpec) -> Form:
    """Return the weights of a store in the kernel's layout; stores of the same dense tensors share what is alive."""
    rows = "gate" in sites_of(store)
    if store.quantized:
        return Form(*store.dense(torch_dtype(spec.dtype)), spec.dtype, rows)
    gate_up, down = cast("tuple[Tensor, Tensor]", (store.gate_up, store.down))
    where = tuple((tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype) for tensor in (gate_up, down))
    key = (where, spec.dtype, rows)
    form = _FORMS.get(key)
    if form is None:
        _FORMS[key] = form = Form(gate_up, down, spec.dtype, rows)
        form.source = (gate_up, down)  # so that their addresses stay taken for as long as the form is known by them
    return form


def sites_of(store: ExpertStore) -> Mapping[str, SiteRule]:
    """Return the rules of a store by site."""
    return {} if store.sparsity is None else store.sparsity.sites


class Columns:
    """One layer as the kernel reads it: its weights, and the rules of its sites."""

    def __init__(self, store: ExpertStore, spec: LayerSpec, chunk: int) -> None:
        self.form, self.kept = form_of(store, spec), Kept()
        self.layer = Layer(store.hidden, store.width, chunk)
        self.layer.bfloat16 = int(spec.dtype == "bfloat16")
        self.layer.activation, self.layer.gated = ACTIVATIONS.index(store.activation), int(store.gated)
        self.layer.first, self.layer.down = self.form.first, self.form.down
        if self.form.up is not None:
            self.layer.up = self.form.up
        rules_by_site = sites_of(store)
        for place, name in enumerate(SITES):
            if name in rules_by_site:
                self._set(self.layer.sites[place], rules_by_site[name])
        rank = max(site.rank for site in self.layer.sites)
        widest = max(store.hidden, store.width)
        self.working = chunk * (3 * store.width + store.hidden + widest + rank) + widest

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
            site.weight = self.kept.copied(weight.float()).data_ptr()
        if rule.residual is not None:
            dtype = self.form.dtype
            site.rank = rule.residual.right_FRI.shape[1]
            site.right = self.kept.pointers(rule.residual.right_FRI.transpose(1, 2).to(dtype))
            site.left = self.kept.pointers(rule.residual.left_FOR.transpose(1, 2).to(dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, and of what the rules have besides."""
        return self.form.kept.nbytes + self.kept.nbytes


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

    def __init__(self, params: Params) -> None:
        self.params = params

    def own_form(self, spec: LayerSpec) -> str:
        """Say which copies ``load`` makes: layers with the same weights and the same answer share them."""
        return "rows" if spec.sparsity is not None and "gate" in spec.sparsity.sites else "columns"

    def availability(self) -> Availability:
        """It needs a C compiler; nothing is built to find out."""
        reason = build.missing("column_skip")
        return Availability(not reason, reason)

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of FFN experts, forward only; sparse ones by skipping, others as the kernel's dense baseline."""
        refused = rules.refusal(spec, "column_skip", DTYPES, leaves_out=LEAVES_OUT)
        if refused is None and spec.sparsity is not None and not spec.sparsity.sites:
            refused = Refusal("column_skip leaves out channels, not single weights; use the eager backend")
        asked = spec.sparsity
        if refused is None and asked is not None and "gate" in asked.sites and "residual" in asked.features:
            refused = Refusal("column_skip has no low-rank part where the gate decides; use the eager backend")
        sparse = "none" if spec.sparsity is None else "skip"
        return refused or replace(rules.execution(spec, ("topk", "sorted")), sparse=sparse)  # type: ignore[arg-type]

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers: build the kernel where the cache does not have it, and copy the weights into its layout."""
        from torch import get_num_threads

        chunk = self.params.chunk
        notes = f"chunks of at most {chunk} tokens{', one thread' if get_num_threads() > 1 else ''}"
        return open_session(
            lambda store, spec: ColumnSkipExecutor(store, spec, chunk), layers, specs, notes, sparse="skip"
        )
