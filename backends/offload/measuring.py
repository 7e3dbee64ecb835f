"""Experts as the host tier holds them, and what they cost there: measured on the experts themselves.

Shape letters: T tokens, H hidden, I inputs of a matrix.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...contracts import LayerSpec
from ...moe.experts import Weight
from ..packed import Products
from ..packing import pack
from ..session import Described, Hidden, torch_dtype
from .access import Key
from .costs import Curve, ExpertCosts
from .host import HostExpert

LIMIT = 256
"""The most tokens of an expert that are tried."""

ROUNDS = 5
"""Calls whose median is one point of a curve."""

COPIES = 8
"""How many experts take turns, so that weights are not in the innermost caches."""


def host_experts(
    weights: Mapping[Key, tuple[Weight, Weight]], spec: LayerSpec, in_place: bool
) -> dict[Key, HostExpert]:
    """Return every expert as RAM holds it; with ``in_place`` its codes are laid out for packed kernels besides."""
    dtype = torch_dtype(spec.dtype)
    return {key: _expert(pair, dtype, in_place) for key, pair in weights.items()}


def _expert(pair: tuple[Weight, Weight], dtype: torch.dtype, in_place: bool) -> HostExpert:
    gate_up, down = pair
    stored = gate_up.nbytes + down.nbytes
    packed = (pack(gate_up), pack(down)) if in_place else None
    laid_out = 0 if packed is None else packed[0].nbytes + packed[1].nbytes
    return HostExpert(lambda: (_dense(gate_up, dtype), _dense(down, dtype)), packed, stored, stored + laid_out)


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return a matrix for a slot: what is dense already is copied there."""
    if isinstance(weight, Tensor):
        return weight.detach().to(dtype, copy=True)
    return weight.dequantize(dtype)


def measured(experts: Sequence[HostExpert], described: Described, spec: LayerSpec) -> ExpertCosts:
    """Return what it costs to fill a slot, and to compute an expert from a slot or in place, by its tokens.

    Numbers of tokens are doubled up to what a call will have, at most ``LIMIT``. Experts stored in different ways share
    one curve. Experts that were not packed are computed in place as they are from a slot.
    """
    hidden, products = Hidden(described, described.act_bits), Products()
    limit = min(LIMIT, LIMIT if spec.tokens is None else max(1, spec.tokens))
    numbers = sorted({min(2**power, limit) for power in range(limit.bit_length() + 1)})
    some = experts[:COPIES]
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(limit, spec.hidden, generator=generator).to(torch_dtype(spec.dtype))
    dense: list[tuple[Any, Any]] = [one.dense() for one in some]
    packed: list[tuple[Any, Any]] = [one.packed for one in some if one.packed is not None]

    def curve(pairs: Sequence[tuple[Any, Any]], product: Callable[[Tensor, Any], Tensor]) -> Curve:
        def seconds(tokens: int) -> float:
            def call(pair: tuple[Any, Any]) -> None:
                hidden.ffn(x_TH[:tokens], lambda x_TI: product(x_TI, pair[0]), lambda x_TI: product(x_TI, pair[1]), 0)

            return _seconds([partial(call, pair) for pair in pairs])

        return Curve(tuple((tokens, seconds(tokens)) for tokens in numbers))

    with torch.no_grad():
        load = _seconds([one.dense for one in some])
        fast = curve(dense, nnf.linear)
        return ExpertCosts(load, fast, curve(packed, products) if packed else fast)


def _seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median time of a call; the first of each, which may set kernels up, is not timed."""
    calls[0]()
    times = []
    for call in islice(cycle(calls), max(ROUNDS, len(calls))):
        begun = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begun)
    return statistics.median(times) / 1e9
