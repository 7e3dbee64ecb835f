"""Whether this machine has a GPU that a kernel could be launched on, asked of its driver; imports no torch."""

from __future__ import annotations

import ctypes
from functools import cache

DRIVERS = {
    "CUDA": ("libcuda.so.1", "cuInit", "cuDeviceGetCount"),
    "ROCm": ("libamdhip64.so", "hipInit", "hipGetDeviceCount"),
}
"""Library, initialisation and count of devices, by the platform's name; both calls return 0 where all is well."""


@cache
def missing(*platforms: str) -> str:
    """Return why no device of ``platforms`` (of ``DRIVERS``) can be used, or an empty string where one can."""
    reasons = [_missing(platform) for platform in platforms]
    return "" if "" in reasons else "; ".join(reasons)


def _missing(platform: str) -> str:
    library, initialise, count_of = DRIVERS[platform]
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"no {platform} device: {library} is not installed"
    found = ctypes.c_int(0)
    code = getattr(driver, initialise)(0) or getattr(driver, count_of)(ctypes.byref(found))
    if code:
        return f"no {platform} device: its driver answers with error {code}"
    return "" if found.value else f"no {platform} device: its driver counts none"
