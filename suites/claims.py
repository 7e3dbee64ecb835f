"""Suite ``routing_claims``: what papers say of their routing, computed once with our own. Imports torch in workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..contracts import Case, Planned, Registry, Trial
from .base import SuiteConfig, plain_case
from .claims_plugins import ALL, FAMILY_OF


@dataclass(frozen=True)
class ClaimSuite:
    """One case per claim; no model and no axis has a say in it."""

    def cases(self, config: SuiteConfig, registry: Registry) -> Iterator[Planned]:
        """Yield the claim that is asked for, or all of them."""
        wanted = config.suite_params.claim
        for name in FAMILY_OF if wanted == ALL else (wanted,):
            yield Planned(plain_case(config, protocol="once", workload={"claim": name}))

    def prepare(self, case: Case, registry: Registry) -> Trial:
        """Return the computation of one claim."""
        from .routing_claims.trial import ClaimTrial

        return ClaimTrial(case, registry)


def create(params: Any) -> ClaimSuite:
    """Make suite ``routing_claims``."""
    return ClaimSuite()
