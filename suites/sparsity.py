"""Suite ``sparsity``: what a sparsity leaves out of a model's layers, and what is lost by it. Torch is in workers.

Like a case of ``accuracy`` one of this suite is a method, judged once, on ``eager``; speed meets it on ``method_key``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..contracts import Case, Registry, Trial
from .accuracy import AccuracySuite


@dataclass(frozen=True)
class SparsitySuite(AccuracySuite):
    """The suite; how much text is judged, in windows of what length, is said by its parameters."""

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the model with its layers changed, their sparsity calibrated anew."""
        from .quality.sparsified import SparsityTrial

        return SparsityTrial(case, registry)


def create(params: object) -> SparsitySuite:
    """Make the suite; cases carry what of its parameters they need."""
    return SparsitySuite()
