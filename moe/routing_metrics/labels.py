"""What experts tell of a label of their tokens (modality, task, time step). T tokens, E expert ids, L labels, N."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contracts import Metric
from ..routing import Routing


def label_information(routing: Routing, label_T: Tensor, name: str) -> list[Metric]:
    """Return the mutual information of label and expert over all assignments, in nats and as a share.

    ``information_<name>`` = H(label) + H(expert) - H(label, expert), from the counts; ``information_<name>_share``
    divides it by H(label): 0 where experts know nothing of the label, 1 where each serves one label only. Counts of
    independent labels give about (E - 1)(L - 1) / 2N nats by chance. ``label_T`` is int64, any values.
    """
    if len(label_T) != routing.num_tokens:
        raise ValueError(f"{len(label_T)} labels for {routing.num_tokens} tokens; give one for each token.")
    label_N = torch.unique(label_T, return_inverse=True)[1][routing.token_N]
    entries = len(label_N)
    names = (f"information_{name}", f"information_{name}_share")
    if entries == 0:
        return [Metric(names[0], None, "nats", n=0), Metric(names[1], None, "share", n=0)]
    of_label, of_expert = _entropy(label_N), _entropy(routing.expert_N)
    information = max(0.0, of_label + of_expert - _entropy(label_N * routing.num_experts + routing.expert_N))
    share = information / of_label if of_label > 0 else None
    return [Metric(names[0], information, "nats", n=entries), Metric(names[1], share, "share", n=entries)]


def _entropy(value_N: Tensor) -> float:
    """Return the entropy in nats of the values of ``value_N``, which is not empty."""
    count_M = torch.unique(value_N, return_counts=True)[1].double()
    return float(torch.special.entr(count_M / len(value_N)).sum())
