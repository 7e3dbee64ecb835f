"""Parameters and descriptors of the routings beyond the ones in ``moe.plugins``, one file per family; no torch."""

from __future__ import annotations

from .attention import DESCRIPTORS as ATTENTION
from .capped import DESCRIPTORS as CAPPED
from .classic import DESCRIPTORS as CLASSIC
from .dcmoe import DESCRIPTORS as DCMOE
from .dropping import DESCRIPTORS as DROPPING
from .environment import DESCRIPTORS as ENVIRONMENT
from .gather import DESCRIPTORS as GATHER
from .graph import DESCRIPTORS as GRAPH
from .lookup import DESCRIPTORS as LOOKUP
from .modality import DESCRIPTORS as MODALITY
from .moex import DESCRIPTORS as MOEX
from .mofme import DESCRIPTORS as MOFME
from .nucleus import DESCRIPTORS as NUCLEUS
from .null import DESCRIPTORS as NULL
from .online_pruning import DESCRIPTORS as ONLINE_PRUNING
from .oracle import DESCRIPTORS as ORACLE
from .positive import DESCRIPTORS as POSITIVE
from .pregate import DESCRIPTORS as PREGATE
from .presets import DESCRIPTORS as PRESETS
from .sample import DESCRIPTORS as SAMPLE
from .slices import DESCRIPTORS as SLICES
from .smoothstep import DESCRIPTORS as SMOOTHSTEP
from .task import DESCRIPTORS as TASK
from .temperature import DESCRIPTORS as TEMPERATURE
from .vla import DESCRIPTORS as VLA

DESCRIPTORS = [
    *CLASSIC,
    *CAPPED,
    *NULL,
    *VLA,
    *POSITIVE,
    *NUCLEUS,
    *DCMOE,
    *TEMPERATURE,
    *SMOOTHSTEP,
    *PRESETS,
    *LOOKUP,
    *TASK,
    *MODALITY,
    *GRAPH,
    *MOEX,
    *PREGATE,
    *ENVIRONMENT,
    *SAMPLE,
    *MOFME,
    *GATHER,
    *SLICES,
    *ATTENTION,
    *ORACLE,
    *ONLINE_PRUNING,
    *DROPPING,
]
