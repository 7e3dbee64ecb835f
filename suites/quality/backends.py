"""The trial of suite ``backend_kl``: a backend against ``reference``, by what the whole model says next.

Both run the same layers on the same text with the same Routings, those of the reference, so that no choice between
near-equal experts hides or makes a difference; and attention leaves out the same inputs, where it leaves out any. The
bound on the divergence follows from the dtype; where it is passed, the layer and the expert are named whose outputs are
off the most. Imported by workers only.

Why the bound is what it is: rounding perturbs a layer's output by about 1.6 u of its size (``moe.oracle``), u the
unit roundoff, and what n layers do adds up as squares. A perturbation of relative size d moves logits that spread by s
nats by s d, and the divergence is half the variance of that: s^2 n (1.6 u)^2 / 2, some 30 n u^2 for the s of 5 that
models have. The model around the layers computes in float32 and rounds anew whatever comes out of them, which is of
the same kind with the u of float32 and the model's own layers. ``SLACK`` is what the bound leaves above both.

Shape letters: T tokens, H hidden, C columns of scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...contracts import Case, Check, Facts, Metric, Registry
from ...moe.oracle_near import unit_roundoff
from ..models import substream
from ..subject import DTYPES
from .blame import blame
from .block import Call
from .bootstrap import metric_of
from .changed import Changed
from .language_model import dense_states
from .scores import COLUMNS, score
from .windows import TextTrial

REFERENCE = "reference"

ITEMS = {"kl": "kl_to_reference", "agree": "reference_agreement"}
"""Columns of the scores that are kept block by block, and the metrics' names."""

SPREAD = 30.0
SLACK = 30.0


def kl_bound(dtype: torch.dtype, changed: int, layers: int) -> float:
    """Return the largest mean divergence (nat) that rounding explains; ``changed`` of ``layers`` are in ``dtype``."""
    own = changed * unit_roundoff(dtype) ** 2
    around = layers * unit_roundoff(torch.float32) ** 2
    return SLACK * SPREAD * (own + around)


@dataclass(frozen=True)
class Window:
    """What one window showed: the calls of the backend's layers, and the scores against the reference."""

    calls: list[Call]
    scores_TC: Tensor


class BackendTrial(TextTrial):
    """The whole model with the case's layers on the case's backend, against the same layers on ``reference``."""

    def __init__(self, case: Case, registry: Registry) -> None:
        super().__init__(case, registry)
        ids = self.passage.ids
        self.dense = dense_states(self.model, case.weights_sha256, ids[:-1], self.window, min(self.subjects))
        self.reference = Changed(case, registry, REFERENCE, self.subjects, self.model)
        self.reference.prompt = self.changed.prompt
        self.bound = kl_bound(DTYPES[case.dtype], len(self.subjects), len(self.model.model.layers))

    def run(self, step: int) -> Window:
        """Run window ``step`` on the reference, then on the backend with the same Routings."""
        part, ids_T = self.part(step), self.passage.ids[:-1]
        expected_TH = self.reference.forward(self.dense, part, ids_T)
        forced = {call.block.index: call.routing for call in self.reference.calls}
        self.changed.sparse_attention.follow(self.reference.sparse_attention)
        final_TH = self.changed.forward(self.dense, part, ids_T, forced)
        next_T, bytes_T = self.passage.ids[1:][self.judged(step)], self.passage.bytes_T[self.judged(step)]
        after = slice(self.prompt, None)
        scores_TC = score(self.model.lm_head, final_TH[after], expected_TH[after], next_T, bytes_T)
        self.scores.append(scores_TC)
        return Window(list(self.changed.calls), scores_TC)

    def verify(self, step: int, output: Window) -> Check:
        """Compare the divergence with its bound and every layer with the oracle; name the expert where one fails."""
        checks = [call.check() for call in output.calls]
        failed = [check for check in checks if not check.ok]
        worst = max(failed or checks, key=lambda check: check.error or 0.0)
        flips = sum(check.flips for check in checks)
        divergence = float(output.scores_TC[:, COLUMNS.index("kl")].mean())
        if divergence <= self.bound and not failed:
            return replace(worst, flips=flips)
        told = [worst.reason] if failed else []
        if not divergence <= self.bound:
            allowed = f"where rounding makes {self.bound:.2g} at most"
            told.insert(0, f"the model's predictions diverge by {divergence:.2g} nat, {allowed}")
        guilty = blame(output.calls)
        told += [str(guilty)] if guilty is not None else []
        return Check(False, worst.error, worst.bound, "; ".join(told), flips)

    def facts(self) -> Facts:
        """Return the divergence from the reference with its interval, its largest token and its bound."""
        scores_TC = torch.cat(self.scores)
        seed = substream(self.case.seed, "bootstrap")
        kl, agree, tokens = (COLUMNS.index(column) for column in ("kl", "agree", "tokens"))
        largest = float(scores_TC[:, kl].max())
        metrics = (
            metric_of("kl_to_reference", "nat/token", scores_TC, lambda sums: sums[..., kl] / sums[..., tokens], seed),
            metric_of("reference_agreement", "1", scores_TC, lambda sums: sums[..., agree] / sums[..., tokens], seed),
            Metric("kl_to_reference_max", largest, "nat", n=len(scores_TC)),
            Metric("kl_bound", self.bound, "nat/token"),
        )
        return Facts(metrics, (), tuple(self.items(ITEMS)), self.changed.session.executed())

    def close(self) -> None:
        """Free both backends' sessions."""
        self.reference.close()
        super().close()
