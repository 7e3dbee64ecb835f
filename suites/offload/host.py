"""Experts that lie in RAM, packed or dense, made once for all turns. Imported by workers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...backends.offload.access import Future, Key
from ...backends.offload.costs import ExpertCosts
from ...backends.offload.file import SlabFile
from ...backends.offload.host import HostExpert
from ...backends.offload.measuring import host_experts, measured
from ...backends.offload.names import needs_costs
from ...backends.offload.opening import Opening, described_by, session_on_host
from ...backends.offload.session import OffloadSession
from ...backends.offload.slabs import read_all
from ...backends.plugins import Offload
from .prepared import Prepared


@dataclass(frozen=True)
class Hosted:
    """All experts, and what they cost: measured once, so that every turn decides by the same ``costs``."""

    experts: Mapping[Key, HostExpert]
    opening: Opening
    costs: ExpertCosts

    def session(
        self, params: Offload, future: Future | None, popularity: Mapping[Key, float] | None = None
    ) -> OffloadSession:
        """Return a new session under ``params``."""
        known = replace(self.opening, params=params, future=future, costs=self.costs, popularity=popularity)
        return session_on_host(self.experts, known)

    def all_at_hand(self, params: Offload) -> OffloadSession:
        """Return a session with a slot for every expert, all filled from the start."""
        return self.session(replace(params, policy="static", prefetch="none", execution="fetch", capacity=1.0), None)


def hosted(found: Prepared, file: SlabFile, params: Offload) -> Hosted:
    """Return the experts of ``file`` in RAM; those that may be computed where they lie are packed for it, too."""
    in_place = needs_costs(params.execution)
    key = (file.path, in_place)
    if key not in found.hosted:
        spec, described = next(iter(found.specs.values())), described_by(file, found.specs)
        experts = host_experts(read_all(file), spec, in_place)
        costs = measured(list(experts.values()), next(iter(described.values())), spec)
        found.hosted[key] = Hosted(experts, Opening(file.layout, described, found.specs, params), costs)
    made: Hosted = found.hosted[key]
    return made
