"""Sizes as people write them: ``24G``, ``512M``, ``32k``.

K, M, G and T are powers of 1024, with or without ``i`` or ``iB`` behind them, as memory is sold and as tools print it;
KB, MB, GB and TB are powers of 1000, as disks are sold. Rates (bytes a second) take the same words, and a letter alone
is there a power of 1000, as data sheets have it.
"""

from __future__ import annotations

import math
import re

from ...contracts import MoebenchError

PATTERN = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
MOST = 2**63 - 1


def parse_bytes(text: str) -> int:
    """Return a size in bytes; MoebenchError where ``text`` is none."""
    return round(_parse(text, "a size such as 24G, 24GiB, 24GB or 512M", letter=1024, word=1000))


def parse_rate(text: str) -> float:
    """Return bytes a second; MoebenchError where ``text`` is no rate above 0."""
    rate = _parse(text.removesuffix("/s"), "a rate such as 25G, 25GB/s or 800M", letter=1000, word=1000)
    if rate <= 0:
        raise MoebenchError(f"'{text}' is no rate above 0; give bytes a second such as 25G.")
    return rate


def parse_count(text: str) -> int:
    """Return a whole number of tokens above 0, where k is 1024; MoebenchError where ``text`` is none."""
    wanted = "a number of tokens such as 4096 or 32k"
    value = _parse(text, wanted, letter=1024, word=0)
    if value < 1 or value != int(value):
        raise MoebenchError(f"'{text}' is not {wanted}; give a whole number above 0.")
    return int(value)


def _parse(text: str, wanted: str, letter: int, word: int) -> float:
    found = PATTERN.fullmatch(text.strip())
    if not found or (found[3] and not found[2]) or ((found[3] or found[4]) and not word):
        raise MoebenchError(f"'{text}' is not {wanted}; write a number and a unit.")
    base = 1024 if found[3] else word if found[2] and found[4] else letter
    value = float(found[1]) * float(base) ** POWERS[found[2].lower()]
    if not value <= MOST:
        raise MoebenchError(f"'{text}' is larger than anything that is; write a number and a unit.")
    return value


def bytes_text(size: float) -> str:
    """Return a size as people read it, such as ``23.4 GiB``."""
    power = min(int(math.log(size, 1024)), len(UNITS) - 1) if size >= 1 else 0
    return f"{size / 1024**power:.{1 if power else 0}f} {UNITS[power]}"


def count_text(count: float) -> str:
    """Return a number of weights as models are named by it, such as ``46.7B``."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{count / scale:.{1 if count < 1000 * scale else 0}f}{unit}"
    return f"{count:.0f}"


def time_text(seconds: float) -> str:
    """Return a time with three digits, such as ``12.3 ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError
