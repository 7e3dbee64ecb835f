"""moebench: benchmarks Mixture-of-Experts layers and models on one scale.

Same layer, same traffic, same oracle, same statistics; see README.md for the two commands that matter. The names below
are loaded when they are first used, so that importing moebench imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .backends.bridge import attach
    from .bench.compare import Comparison, compare
    from .suites.models.reroute import reroute

__all__ = ["Comparison", "__version__", "attach", "compare", "reroute"]

_LAZY = {
    "attach": ".backends.bridge",
    "compare": ".bench.compare",
    "Comparison": ".bench.compare",
    "reroute": ".suites.models.reroute",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module 'moebench' has no attribute '{name}'")
