"""Backend ``offload``: experts lie in a slow tier, a share of them in slots of a fast one, and a policy says which.

On tier ``disk`` they are in a file, written once for each set of weights under ``$MOEBENCH_CACHE/offload`` and read
with O_DIRECT, so that the page cache does not hold what the budget forbids. On tier ``host`` they stay in RAM as they
are stored, and a slot holds one dequantized.

Whoever gives a backend its layers has them in memory, and so does a model that is attached: what the slots save is
seen where a session is opened on the file alone (``open_offload``). Imports no torch at module level.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...contracts import Availability, Execution, LayerSpec, MoebenchError, Refusal, Registry
from .. import plugins, rules
from ..eager import DTYPES
from ..packing import unpackable
from .access import Future, Layout
from .execution import LowBits
from .names import needs_costs
from .opening import NO_COSTS, Opening, make_cache, open_disk, open_host, open_offload
from .session import OffloadSession

if TYPE_CHECKING:
    from ...moe.experts import ExpertStore

__all__ = ["Offload", "open_offload"]

ANYWHERE = Layout((0,), 1)
"""Stands for a model whose layers are not known yet."""


class Offload:
    """The backend."""

    def __init__(self, params: plugins.Offload, future: Future | None = None) -> None:
        self.params, self.future = params, future

    def foreseeing(self) -> Offload:
        """Return the same backend as a suite has it that knows the accesses to come, and opens sessions with them."""
        return Offload(self.params, Future(()))

    def availability(self) -> Availability:
        """It runs wherever torch does and files can be read as the parameters say; tier host on the CPU alone."""
        if self.params.tier == "disk" and self.params.io == "direct" and not hasattr(os, "O_DIRECT"):
            return Availability(False, "offload reads with O_DIRECT, which this system has not; use io=page_cache")
        return Availability(True) if self.params.tier == "host" else rules.wherever_torch_runs()

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take every layer of FFN experts, dense or quantized, forward only; packed products where they are needed."""
        reason = self._unplayable(spec)
        if reason:
            return Refusal(reason)
        in_place = needs_costs(self.params.execution)
        refused = rules.refusal(
            spec,
            "offload",
            ("bfloat16",) if in_place else DTYPES,
            rounds_tokens=not in_place,
            leaves_out=rules.MASKED if in_place else rules.FEATURES,
        )
        return refused or rules.execution(spec, ("topk", "sorted"))

    def _unplayable(self, spec: LayerSpec) -> str:
        """Return why a layer cannot run with these parameters, or an empty string."""
        params = self.params
        try:
            cache = make_cache(params, ANYWHERE, self.future, NO_COSTS)
            low = None if params.low == "none" else Registry.load().get("quantization", params.low)
        except MoebenchError as error:
            return str(error).removesuffix(".")
        if isinstance(cache.execution, LowBits) and low is None:
            return f"execution={params.execution} fetches copies of few bits; name their quantization, as in low=int4"
        if low is not None and rules.is_quantized(spec):
            return "copies of few bits are made of dense experts; use quantization=none, or low=none"
        if low is not None and getattr(low.params, "calibrated", False):
            return f"low={params.low} is calibrated, and there is no calibration here; use low=int4 or low=int8"
        return unpackable(spec) if needs_costs(params.execution) else ""

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> OffloadSession:
        """Load layers: on tier disk ``layers`` are not kept once they are in a file, on tier host their weights are.

        Slots of tier disk are on the device of the weights.
        """
        for index, store in layers.items():
            if store.kinds != specs[index].kinds:
                raise MoebenchError("the store and its specification name different experts; fold both or neither.")
        if self.params.tier == "host":
            return self._on_host(layers, specs)
        from .keeping import device_of, kept_file

        file = kept_file(layers, self.params.low)
        return open_disk(file, Opening(file.layout, layers, specs, self.params, device=device_of(layers)))

    def _on_host(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> OffloadSession:
        counts = {store.num_experts for store in layers.values()}
        if len(counts) > 1:
            raise MoebenchError(f"layers have {sorted(counts)} experts; offload wants the same number in all.")
        layout = Layout(tuple(sorted(layers)), counts.pop())
        weights = {
            (index, expert): (store.gate_up[expert], store.down[expert])
            for index, store in layers.items()
            for expert in range(layout.experts)
        }
        return open_host(weights, Opening(layout, layers, specs, self.params))
