"""Other people's kernels as backends, for `moebench run plugin=tests/gpu_check/peers.py`; their outputs are checked.

Written from their documentation and never run by the authors, who had no GPU: a wrong call ends as `failed` or `wrong`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from moebench.backends import rules
from moebench.backends.session import DenseWeights, SlotExecutor, open_session
from moebench.contracts import Availability, Descriptor, Evidence
from moebench.kernels import devices


class VllmExecutor(SlotExecutor):
    """One layer by vLLM's Triton kernels of fused experts; its weights have our layout, gate rows first."""

    kernels = ("vllm::fused_experts",)

    def __init__(self, store: Any, spec: Any) -> None:
        super().__init__(store, spec)
        from vllm.model_executor.layers.fused_moe import fused_experts

        self.fused, self.weights = fused_experts, DenseWeights(store, spec)

    def add_slots(self, y_TH: Any, x_TH: Any, indices_TK: Any, weights_TK: Any) -> None:
        """Add the sum over slots."""
        y_TH += self.fused(x_TH, self.weights.gate_up, self.weights.down, weights_TK, indices_TK.int())

    def resident_bytes(self) -> int:
        """Return the bytes of the weights."""
        return self.weights.nbytes


class Vllm:
    """The backend."""

    def availability(self) -> Availability:
        """It needs the package and a GPU."""
        if importlib.util.find_spec("vllm") is None:
            return Availability(False, "vllm is not installed; run pip install vllm", ("cuda",))
        absent = devices.missing("CUDA", "ROCm")
        return Availability(not absent, absent, ("cuda",), (Evidence.MEASURED_GPU,))

    def supports(self, spec: Any) -> Any:
        """Take gated silu experts in half precisions, forward only."""
        return rules.refusal(spec, "vllm", ("bfloat16", "float16")) or rules.execution(spec, ("topk",))

    def load(self, layers: Any, specs: Any) -> Any:
        """Load layers; dense weights in the case's dtype are used where they lie."""
        return open_session(VllmExecutor, layers, specs)


def create(params: object) -> Vllm:
    """Return the backend; it has no parameters."""
    return Vllm()


DESCRIPTORS = [Descriptor("backend", "vllm", "vLLM's fused experts", f"{__file__}:create")]
