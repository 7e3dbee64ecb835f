"""What was dropped, and where in the batch. Shape letters: T tokens, E expert ids, N assignments, P parts."""

from __future__ import annotations

import torch

from ...contracts import Metric, Series
from ..routing import Routing
from .agreement import kept_entries

PARTS = 10
"""Deciles of the position in the batch."""


def drop_metrics(asked: Routing, kept: Routing, parts: int = PARTS) -> tuple[list[Metric], Series]:
    """Return ``drop_rate``, and its course over the positions of the batch in ``parts`` equal parts.

    ``kept`` is what a capacity, of whatever policy, left of ``asked``. The rate of a part is the share of its entries
    that were dropped, 0 where nothing was asked for. ``unserved_share``: tokens that asked for experts and kept none.
    With fewer tokens than parts there is one part for each token.
    """
    tokens, entries = asked.num_tokens, len(asked.token_N)
    dropped_N = ~kept_entries(asked, kept)
    parts = max(1, min(parts, tokens))
    part_N = asked.token_N * parts // max(tokens, 1)
    asked_P = torch.bincount(part_N, minlength=parts)
    lost_P = torch.bincount(part_N[dropped_N], minlength=parts)
    kept_T = torch.bincount(asked.token_N[~dropped_N], minlength=tokens)
    unserved = int(((kept_T == 0) & (asked.k_T > 0)).sum())
    metrics = [
        Metric("drop_rate", float(lost_P.sum()) / entries if entries else None, "share", n=entries),
        Metric("unserved_share", unserved / tokens if tokens else None, "share", n=tokens),
    ]
    rate_P = lost_P.double() / asked_P.clamp(min=1)
    return metrics, Series("drop_rate_by_position", tuple(rate_P.tolist()), "share")
