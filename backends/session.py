"""What all our backends share: a session of executors, and executors that begin at slots or at sorted assignments.

Imports no torch at module level: backends are described in a parent that never loads it. Shape letters: T tokens,
H hidden, F expert width, E experts, K slots, N assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from ..contracts import ExecutedPath, LayerSpec, MoebenchError
from .convert import to_sorted, to_topk
from .rules import act_bits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..moe.channels import Slot, Sparsity
    from ..moe.experts import ExpertStore


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``name``."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


Product = Callable[["Tensor"], "Tensor"]


class Described(Protocol):
    """What an executor must know of a layer's experts beside their weights: an ``ExpertStore`` knows it, or a file."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every expert id."""

    @property
    def activation(self) -> str:
        """The name of the activation function."""

    @property
    def gated(self) -> bool:
        """Whether experts have a gate."""

    @property
    def sparsity(self) -> Sparsity | None:
        """Which channels are left out."""

    @property
    def act_bits(self) -> int | None:
        """The bits to which tokens are rounded."""


class Hidden:
    """What an expert does beside its products: leaving out channels, activation and gating, rounding its tokens.

    ``act_bits`` None leaves tokens as they are: no scheme asks for it, or the product takes codes and rounds itself.
    ``slot`` is whose tokens they are (``moe.channels.Slot``); it is asked for by sparsity that differs by expert.
    """

    def __init__(self, store: Described, act_bits: int | None) -> None:
        from ..moe.channels import DENSE
        from ..moe.experts import ACTIVATIONS
        from ..moe.token_codes import rounded_tokens

        self.act_bits, self.rounded = act_bits, rounded_tokens
        self.activation = ACTIVATIONS[store.activation]
        self.gated = store.gated
        self.sparsity = store.sparsity or DENSE

    def input(self, x_NH: Tensor, slot: Slot = None) -> Tensor:
        """Return what gate and up read."""
        return self.rounded(self.sparsity.apply("input", x_NH, slot), self.act_bits)

    def activated(self, product: Tensor, slot: Slot = None) -> Tensor:
        """Return what comes to site ``hidden`` [.., F], from the product with gate_up [.., 2F] (or up [.., F])."""
        if not self.gated:
            return self.activation(product)
        gate, up = product.chunk(2, dim=-1)
        return self.sparsity.apply("gate", self.activation(gate), slot) * up

    def __call__(self, product: Tensor, slot: Slot = None) -> Tensor:
        """Return what down reads [.., F], from the product with gate_up [.., 2F] (or up [.., F])."""
        return self.rounded(self.sparsity.apply("hidden", self.activated(product, slot), slot), self.act_bits)

    def slots(self, offsets_E1: Tensor) -> Tensor | None:
        """Return the slot of each of the assignments sorted by expert, [N]; None where no rule asks for it."""
        if not self.sparsity.per_expert:
            return None
        counts_E = offsets_E1.diff().long()
        return counts_E.new_ones(len(counts_E)).cumsum(0).sub(1).repeat_interleave(counts_E)

    def ffn(self, x_NH: Tensor, gate_up: Product, down: Product, slot: int) -> Tensor:
        """Return f_e(x) [N, H] of one expert by its two products, low-rank residuals included."""
        product = self.sparsity.added("input", gate_up(self.input(x_NH, slot)), x_NH, slot)
        hidden = self.activated(product, slot)
        read = self.rounded(self.sparsity.apply("hidden", hidden, slot), self.act_bits)
        return self.sparsity.added("hidden", down(read), hidden, slot)


class Executor:
    """One layer in one backend. A subclass adds the experts' outputs to ``y_TH``, which holds zeros."""

    kernels: tuple[str, ...] = ()
    packed = False
    notes = ""

    def __init__(self, store: Described, spec: LayerSpec) -> None:
        import torch

        if store.kinds != spec.kinds:
            raise MoebenchError("the store and its specification name different experts; fold both or neither.")
        if store.act_bits != act_bits(spec):
            said = f"{act_bits(spec)} bits for its tokens, and the store has {store.act_bits}"
            raise MoebenchError(f"the specification says {said}; write the store's act_bits into its schemes.")
        self.spec = spec
        self.hidden = Hidden(store, None if self.packed else store.act_bits)
        self._no_grad = torch.no_grad

    def __call__(self, x_TH: Tensor, *inputs: Any, out_TH: Tensor | None = None) -> Tensor:
        """Return y_TH in the dtype of ``x_TH``: in ``out_TH`` where one is given, else new and open to autograd."""
        if out_TH is None:
            y_TH = x_TH.new_zeros(x_TH.shape)
            self.add(y_TH, x_TH, inputs)
            return y_TH
        with self._no_grad():
            self.add(out_TH.zero_(), x_TH, inputs)
        return out_TH

    def add(self, y_TH: Tensor, x_TH: Tensor, inputs: Sequence[Any]) -> None:
        """Add the weighted outputs of the experts to ``y_TH``; ``inputs`` are those of the case's boundary."""
        raise NotImplementedError

    def resident_bytes(self) -> int:
        """Return the bytes of weights that this layer holds, views of the store's own tensors included."""
        raise NotImplementedError

    def events(self) -> Iterable[Mapping[str, Any]]:
        """Return what is worth telling of the calls so far; by default nothing."""
        return ()


class SlotExecutor(Executor):
    """An executor that begins at slots: ``add_slots(y_TH, x_TH, indices_TK, weights_TK)``."""

    def add(self, y_TH: Tensor, x_TH: Tensor, inputs: Sequence[Any]) -> None:
        """Bring the inputs into slots and add the experts."""
        self.add_slots(y_TH, x_TH, *to_topk(inputs, self.spec, len(x_TH)))

    def add_slots(self, y_TH: Tensor, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> None:
        """Add w * f_e(x) for every slot that holds an expert."""
        raise NotImplementedError


class SortedExecutor(Executor):
    """An executor that begins at assignments sorted by expert: ``add_sorted(y_TH, x_TH, token_N, offsets_E1, ...)``."""

    def add(self, y_TH: Tensor, x_TH: Tensor, inputs: Sequence[Any]) -> None:
        """Sort the inputs by expert and add the experts."""
        self.add_sorted(y_TH, x_TH, *to_sorted(inputs, self.spec, len(x_TH)))

    def add_sorted(self, y_TH: Tensor, x_TH: Tensor, token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor) -> None:
        """Add w * f_e(x) for every assignment."""
        raise NotImplementedError


class LoopExecutor(SortedExecutor):
    """An executor that takes one expert after another: ``ffn(x_NH, gate_up, down, expert)`` for each with tokens."""

    def per_expert(self) -> Sequence[tuple[Any, Any]]:
        """Return (gate_up, down) of every expert, in whatever form ``ffn`` takes them."""
        raise NotImplementedError

    def ffn(self, x_NH: Tensor, gate_up: Any, down: Any, expert: int) -> Tensor:
        """Return f_e(x) [N, H]; all experts of such a layer own weights, so an id is a slot."""
        raise NotImplementedError

    def add_sorted(self, y_TH: Tensor, x_TH: Tensor, token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor) -> None:
        """Add w * f_e(x), expert by expert."""
        offsets = offsets_E1.tolist()
        for expert, (gate_up, down) in enumerate(self.per_expert()):
            start, stop = offsets[expert], offsets[expert + 1]
            if start == stop:
                continue
            mine_N = token_N[start:stop]
            out_NH = self.ffn(x_TH[mine_N], gate_up, down, expert) * weight_N[start:stop, None]
            y_TH.index_add_(0, mine_N, out_NH.to(y_TH.dtype))


class DenseWeights:
    """One layer's experts as two tensors in the case's dtype: the store's own where it has them so, else made here.

    For a backward pass they must be the store's own, since gradients are to arrive there.
    """

    def __init__(self, store: ExpertStore, spec: LayerSpec, dtype: torch.dtype | None = None) -> None:
        self.gate_up, self.down = store.dense(dtype or torch_dtype(spec.dtype))
        if spec.backward and self.gate_up is not store.gate_up:
            raise MoebenchError(f"a backward pass needs dense weights in {spec.dtype}; convert the store first.")
        self.backward = spec.backward

    @cached_property
    def views(self) -> list[tuple[Tensor, Tensor]]:
        """The views of every expert, made when they are first asked for: a backend that gathers rows needs none."""
        return list(zip(self.gate_up.detach().unbind(0), self.down.detach().unbind(0), strict=True))

    def per_expert(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Return (gate_up [2F, H], down [H, F]) of every FFN expert; with a backward, views that autograd follows."""
        if not self.backward:
            return self.views
        return list(zip(self.gate_up.unbind(0), self.down.unbind(0), strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.gate_up.nbytes + self.down.nbytes


class Session:
    """Layers loaded into one of our backends. ``reads_hints`` says whether ``hint`` has any effect."""

    reads_hints = False

    def __init__(self, executors: Mapping[int, Executor], path: ExecutedPath) -> None:
        self._executors = dict(executors)
        self._path = path

    def layer(self, index: int) -> Executor:
        """Return the executor of one layer."""
        if index not in self._executors:
            raise MoebenchError(f"layer {index} was not loaded; this session has {sorted(self._executors)}.")
        return self._executors[index]

    def hint(self, layer: int, experts: Any, priority: float) -> None:
        """Do nothing: all weights are resident."""

    def executed(self) -> ExecutedPath:
        """Return what really runs."""
        return self._path

    def events(self) -> Sequence[Mapping[str, Any]]:
        """Return what the executors tell of their calls, each with its layer."""
        return [{"layer": index, **event} for index, one in self._executors.items() for event in one.events()]

    def resident_bytes(self) -> int:
        """Return the bytes of all loaded weights."""
        return sum(executor.resident_bytes() for executor in self._executors.values())

    def close(self) -> None:
        """Let go of the weights."""
        self._executors.clear()


def open_session(
    make: Callable[[ExpertStore, LayerSpec], Executor],
    layers: Mapping[int, ExpertStore],
    specs: Mapping[int, LayerSpec],
    notes: str = "",
    sparse: str = "mask",
) -> Session:
    """Return a session whose executors ``make`` builds; the path is read off stores, specifications and executors.

    ``notes`` is of the backend; an executor adds what it knows of its own layer. ``sparse`` is what they do where a
    specification leaves something out, be it nothing at level 0.
    """
    executors = {index: make(store, specs[index]) for index, store in layers.items()}
    plain = "dequantized" if any(store.quantized for store in layers.values()) else "dense"
    weights = "packed" if any(executor.packed for executor in executors.values()) else plain
    sparse = sparse if any(specs[index].sparsity is not None for index in layers) else "none"
    kernels = tuple(dict.fromkeys(name for executor in executors.values() for name in executor.kernels))
    told = [f"layer {index}: {executor.notes}" for index, executor in executors.items() if executor.notes]
    return Session(executors, ExecutedPath(weights, sparse, kernels, "; ".join(filter(None, (notes, *told)))))
