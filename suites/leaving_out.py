"""What activation sparsity leaves out of a batch, by the rules of a layer and by the count of a kernel that skips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..contracts import SITES, Metric
from ..moe.channel_use import dense_work, locality, needed_work
from ..moe.experts import ExpertStore
from .subject import Batch


def leaving_out(store: ExpertStore, batch: Batch, events: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    """Yield the density of weights that a batch needs, TLS, CLS and union density by site, and what a kernel counted.

    ``weight_density`` is the share of the weights of the experts with tokens that a call must read: what a backend that
    skips reads, whether the case's own does or not. A residual may bring it above 1.
    """
    routing, x_TH = batch.routing, batch.x_TH
    whole = dense_work(store, routing).weights
    needed = needed_work(store, routing, x_TH).weights
    yield Metric("weight_density", needed / whole if whole else None, "share", n=whole)
    yield from locality(store, routing, x_TH)
    yield from counted(events)


def counted(events: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    """Yield ``kernel_density_SITE`` and ``kernel_union_density_SITE`` over all calls that a kernel counted.

    The first is of channels of tokens; the second of columns of chunks, which a kernel reads once for all their tokens.
    """
    told = [event for event in events if event.get("event") == "channels"]
    for site in SITES:
        mine = [event for event in told if event["site"] == site]
        for name, part, whole in (("", "kept", "channels"), ("union_", "columns_read", "columns")):
            total = sum(event[whole] for event in mine)
            if total:
                share = sum(event[part] for event in mine) / total
                yield Metric(f"kernel_{name}density_{site}", share, "share", n=total)
