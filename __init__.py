"""moebench: benchmarks Mixture-of-Experts layers and models on one scale.

Same layer, same traffic, same oracle, same statistics; see README.md for the two commands that matter.
"""

from .version import __version__

__all__ = ["__version__"]
