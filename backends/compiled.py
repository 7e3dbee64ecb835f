"""``compiled``: the expert FFN through torch.compile, once for all experts and all numbers of tokens.

Compilation happens in ``load``, apart from any timed call, and Inductor's code is kept in ``$MOEBENCH_CACHE/inductor``.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contracts import Availability, Execution, LayerSpec, Refusal
from . import rules
from .session import DenseWeights, LoopExecutor, Session, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore


def compiler() -> str | None:
    """Return the C++ compiler that Inductor will call, or None."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def cache_folder() -> Path:
    """Return where Inductor's code is kept."""
    root = os.environ.get("MOEBENCH_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "moebench") / "inductor"


@cache
def compiled_ffn() -> Callable[..., Tensor]:
    """Return the one compiled function; variants (activation, sparsity, dtype) are compiled as they come."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
    import torch
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    inductor.compile_threads = 1
    dynamo.recompile_limit = 64  # dtypes x activations x sparsity sites in one worker
    dynamo.fail_on_recompile_limit_hit = True  # or Dynamo would run the Python code and nobody would notice
    return torch.compile(_ffn, dynamic=True, fullgraph=True)


def _ffn(
    x_NH: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: Callable[[Tensor], Tensor],
    gated: bool,
    threshold: Tensor | None,
    weight_F: Tensor | None,
) -> Tensor:
    """Return f_e(x) [N, H]; ``threshold`` is a tensor so that its value is not compiled in."""
    hidden = x_NH @ gate_up.T
    if gated:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = activation(gate) * up
    else:
        hidden = activation(hidden)
    if threshold is not None:
        score = hidden.abs().to(threshold.dtype)
        score = score if weight_F is None else score * weight_F
        hidden = hidden * (score > threshold)
    return hidden @ down.T


class CompiledExecutor(LoopExecutor):
    """One layer: the compiled function for every expert that has tokens. Input sparsity is applied before it."""

    kernels = ("inductor::cpp_fused", "aten::mm", "aten::index_add_")

    def __init__(self, store: ExpertStore, spec: LayerSpec) -> None:
        super().__init__(store, spec)
        self.weights = DenseWeights(store, spec)
        self.function = compiled_ffn()
        if self.weights.down.device.type != "cpu":
            self.kernels = ("inductor::triton_fused", *self.kernels[1:])
        self.options = (self.hidden.activation, self.hidden.gated, *self._threshold())
        self._compile()

    def _threshold(self) -> tuple[Tensor | None, Tensor | None]:
        import torch

        sparsity = self.hidden.sparsity
        if "hidden" not in sparsity.sites:
            return None, None
        rule = sparsity.sites["hidden"]
        wide = torch.promote_types(self.weights.down.dtype, torch.float32)
        return torch.tensor(rule.threshold, dtype=wide, device=self.weights.down.device), rule.weight

    def _compile(self) -> None:
        """Compile for any number of tokens: an unbacked size is not specialised for the values 0 and 1."""
        from torch._dynamo.decorators import mark_unbacked

        x_NH = self.weights.down.new_zeros(2, self.spec.hidden)
        mark_unbacked(x_NH, 0)
        self.ffn(x_NH, *self.per_expert()[0], 0)

    def per_expert(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Return (gate_up [2F, H], down [H, F]) of every expert."""
        return self.weights.per_expert()

    def ffn(self, x_NH: Tensor, gate_up: Any, down: Any, expert: int) -> Tensor:
        """Return f_e(x) [N, H], without autograd: one compiled variant serves every caller."""
        with self._no_grad():
            return self.function(self.hidden.input(x_NH), gate_up, down, *self.options)

    def resident_bytes(self) -> int:
        """Return the bytes of the weights."""
        return self.weights.nbytes


class Compiled:
    """The backend."""

    def availability(self) -> Availability:
        """It needs a C++ compiler and Python's headers."""
        if compiler() is None:
            return Availability(False, "compiled needs a C++ compiler; install g++ or name one in CXX")
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            return Availability(False, "compiled needs Python's headers; install the python3-dev package")
        if find_spec("triton") is None:  # which Inductor writes its code for GPUs in
            return Availability(True)
        return rules.wherever_torch_runs()

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of FFN experts, forward only."""
        refused = rules.refusal(spec, "compiled", ("float32", "bfloat16", "float16"))
        return refused or rules.execution(spec, ("topk", "sorted"))

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers and compile; dense weights in the case's dtype are used where they lie."""
        return open_session(CompiledExecutor, layers, specs)


def create(params: object) -> Compiled:
    """Return the backend; it has no parameters."""
    return Compiled()
