"""What a router is asked in suite ``routing``: hidden states, and the fields of a Context that it reads.

Imported by workers only. Shape letters: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..contracts import Case, Registry
from ..moe.routing import Context
from ..moe.stand_ins import StandIns
from .models import substream
from .subject import DTYPES, Subject


@dataclass(frozen=True)
class Question:
    """The input of one step. Segments and ``labels`` (ids_T by name) are there whether the router reads them or not."""

    x_TH: Tensor
    ctx: Context
    segment_T: Tensor
    labels: Mapping[str, Tensor]
    rng_seed: int

    def context(self) -> Context:
        """Return the Context with a generator in its first state: a router that draws draws the same again."""
        return replace(self.ctx, rng=torch.Generator().manual_seed(self.rng_seed))


def make_question(case: Case, registry: Registry, subject: Subject, number: int) -> Question:
    """Return the input of step ``number``: the traffic's hidden states in the case's dtype, and what goes with them."""
    traffic = registry.get("traffic", case.traffic.name).create(case.traffic.params)
    x_TH = traffic.hidden(subject.source, case.layers[0], case.tokens, number, case.seed).to(DTYPES[case.dtype])
    return question_of(case, registry, subject, x_TH, number)


def question_of(case: Case, registry: Registry, subject: Subject, x_TH: Tensor, number: int) -> Question:
    """Return ``x_TH`` as an input of the case's router."""
    params = registry.params("routing", case.routing)
    seed = substream(case.seed, "routing", number)
    fields = StandIns(len(x_TH), subject.spec.experts, params, seed, int(case.workload["sequence"]))
    ctx = fields.fill(Context(layer=case.layers[0], experts=subject.layer.store), subject.layer.router)
    labels = {"modality": fields.modality_T, "task": fields.task_T}
    rng_seed = substream(seed, "rng", case.layers[0])  # all else is the same at every layer; a draw is not
    return Question(x_TH, ctx, fields.segment_T, labels, rng_seed)
