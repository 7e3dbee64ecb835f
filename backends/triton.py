"""``triton``: our Triton kernels; on a GPU, or without one through Triton's interpreter, under a guard and untimed.

Many tokens go through two grouped products over blocks of assignments that are sorted on the device, few through split
products of single tokens. Nothing comes back to the host, so a call may be captured into a graph. The kernels are in
``kernels/triton``; what is verified of them, and how, is in docs/gpu-kernels.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..contracts import Availability, Evidence, Execution, LayerSpec, MoebenchError, Refusal
from ..kernels import devices
from . import rules
from .convert import to_topk
from .packed import MATMULS
from .plugins import Triton as Params
from .session import Executor, Session, open_session
from .triton_weights import experts_of, packed_form

if TYPE_CHECKING:
    from torch import Tensor

    from ..kernels.triton.layer import Plan
    from ..moe.experts import ExpertStore

DTYPES = ("float32", "bfloat16", "float16")
LEAVES_OUT = ("gate",)
"""The features of sparsity that the kernels have (``rules.FEATURES``)."""

ABSENT = "triton is not installed; pip install 'moebench[gpu]'"
NOT_INTERPRETED = "this process compiles its kernels; start it with TRITON_INTERPRET=1 in its environment."


class TritonExecutor(Executor):
    """One layer: the kernels of a grouped call, or those of a call of few tokens."""

    def __init__(self, store: ExpertStore, spec: LayerSpec, params: Params, turned: bool) -> None:
        self.packed = bool(packed_form(spec))
        super().__init__(store, spec)
        from ..kernels.triton import layer, tiles

        self.params, self.layer, self.tiles = params, layer, tiles
        self.experts = experts_of(store, spec, turned)
        self.leaves = (store.gate_up, store.down)
        sorting = ("cut_kernel",) if spec.boundary == "sorted" else ("count_kernel", "place_kernel")
        self.kernels = (*sorting, "gate_up_kernel", "down_kernel")
        if params.combine == "deterministic" or params.decode_tokens or spec.backward:
            self.kernels += ("combine_kernel",)
        if params.decode_tokens:
            self.kernels += ("decode_up_kernel", "decode_down_kernel")
        if spec.backward:
            self.kernels += ("outer_kernel",)

    def __call__(self, x_TH: Tensor, *inputs: Any, out_TH: Tensor | None = None) -> Tensor:
        """Return y_TH as every executor does; new outputs of a layer with a backward are open to autograd."""
        if out_TH is not None or not self.spec.backward:
            return super().__call__(x_TH, *inputs, out_TH=out_TH)
        from .triton_backward import differentiable

        return differentiable(self, x_TH, self.boundary_inputs(x_TH, inputs))

    def boundary_inputs(self, x_TH: Tensor, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Return (token_N, offsets_E1, weight_N), or (indices_TK, weights_TK), all in one piece."""
        given = inputs if self.spec.boundary == "sorted" else to_topk(inputs, self.spec, len(x_TH))
        return tuple(tensor.contiguous() for tensor in given)

    def add(self, y_TH: Tensor, x_TH: Tensor, inputs: Sequence[Any]) -> None:
        """Write the experts' sum, which is to be added to zeros."""
        self.run(y_TH, x_TH.detach().contiguous(), self.boundary_inputs(x_TH, inputs))

    def run(self, y_TH: Tensor, x_TH: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """Write the experts' sum to ``y_TH``, of inputs as ``boundary_inputs`` returns them."""
        out_TH = y_TH if y_TH.is_contiguous() else x_TH.new_empty(y_TH.shape)
        weights = inputs[-1].detach().float()
        plan = self.plan(x_TH, weights.numel())
        if self.spec.boundary == "sorted":
            self.layer.sorted_layer(x_TH, inputs[0], inputs[1], weights, self.experts, out_TH, plan)
        else:
            self.layer.topk_layer(x_TH, inputs[0], weights, self.experts, out_TH, plan)
        if out_TH is not y_TH:
            y_TH.copy_(out_TH)

    def plan(self, x_TH: Tensor, assignments: int) -> Plan:
        """Return how a call is run: by sizes alone, so that calls of one size are alike."""
        experts, tiles, params = self.experts, self.tiles, self.params
        if x_TH.device.type == "cpu":
            first = tiles.interpreted(experts.width, experts.hidden_size)
            second = tiles.interpreted(experts.hidden_size, experts.width)
            decode = replace(second, block_m=1)
        else:
            matrices = 2 if experts.gated else 1  # what fits for gate and up fits for down
            limit, size = _shared_limit(x_TH), x_TH.element_size()
            barred = tiles.BARRED.get(_target(x_TH), ())
            sizes = (size, assignments, experts.num_experts, matrices, limit)
            first = second = tiles.candidates(*sizes, barred)[0]
            decode = tiles.SPARSE_DECODE if experts.gate_up.form == "turned" else tiles.DECODE
        return self.layer.Plan(first, second, params.combine, params.decode_tokens, decode)

    def resident_bytes(self) -> int:
        """Return the bytes of the weights as the kernels read them."""
        return self.experts.nbytes


def _shared_limit(x_TH: Tensor) -> int:
    """Return how many bytes of shared memory a program may have on the device of ``x_TH``."""
    import torch

    properties = torch.cuda.get_device_properties(x_TH.device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def _target(x_TH: Tensor) -> str:
    """Return the name by which ``kernels/targets.py`` knows the device of ``x_TH``."""
    import torch

    if torch.version.hip:
        return str(torch.cuda.get_device_properties(x_TH.device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(x_TH.device)
    return f"sm_{major}{minor}"


class Triton:
    """The backend."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def availability(self) -> Availability:
        """It is measured on a GPU; without one it is interpreted and compiled, and not timed."""
        if importlib.util.find_spec("triton") is None:
            return Availability(False, ABSENT)
        missing = devices.missing("CUDA", "ROCm")
        if not missing:
            return Availability(True, devices=("cuda",), evidence=(Evidence.MEASURED_GPU,))
        return Availability(True, missing, evidence=(Evidence.INTERPRETED, Evidence.STATIC_COMPILE))

    def own_form(self, spec: LayerSpec) -> str:
        """Say which copies ``load`` makes of dense weights: layers with the same answer share them."""
        return "turned" if self.skips(spec) else ""

    def skips(self, spec: LayerSpec) -> bool:
        """Whether unused channels are left in memory: of dense weights, where all calls have few tokens."""
        few = spec.tokens is not None and spec.tokens <= self.params.decode_tokens
        asked = spec.sparsity
        return few and asked is not None and bool(asked.sites) and "gate" not in asked.sites and not packed_form(spec)

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of FFN experts of any sizes, dense ones with a backward; other codes are dequantized."""
        refused = rules.refusal(spec, "triton", DTYPES, backward=True, leaves_out=LEAVES_OUT)
        if refused is not None:
            return refused
        if spec.backward and spec.sparsity is not None:
            return Refusal("triton has no backward through channels that are left out; use eager or grouped")
        packed = bool(packed_form(spec))
        answer = rules.execution(spec, ("topk", "sorted"), packed, MATMULS if packed else ())
        return replace(answer, sparse="skip") if self.skips(spec) else answer

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers; dense weights in the case's dtype are used where they lie, unless channels are skipped."""
        from ..kernels.triton.grouped import down_kernel
        from ..kernels.triton.launch import is_interpreted

        interpreted = is_interpreted(down_kernel)
        if not interpreted and devices.missing("CUDA", "ROCm"):
            raise MoebenchError(f"{self.availability().reason}: {NOT_INTERPRETED}")
        turned = any(self.skips(spec) for spec in specs.values())

        def make(store: ExpertStore, spec: LayerSpec) -> TritonExecutor:
            return TritonExecutor(store, spec, self.params, turned)

        notes = "interpreted, under the guard" if interpreted else ""
        return open_session(make, layers, specs, notes, sparse="skip" if turned else "mask")
