"""The command ``moebench advise``: what fits where, and how fast it would decode."""

from __future__ import annotations

import argparse
import json
import math

from ...contracts import MoebenchError
from .. import host
from ..store import store_path
from .advice import advise, facts
from .hardware import DEFAULTS, Hardware, device_rates, given_rates, probed_rates
from .predict import Load
from .sizes import parse_bytes, parse_count
from .source import Described, describe
from .text import advice_text

MOST_TOKENS = 2**30


def command(options: argparse.Namespace) -> int:
    """Say what of the model fits where, the best first."""
    described = describe(options.model)
    load = Load(_batch(options), parse_count(options.context), _skew(options.skew))
    if load.context > MOST_TOKENS:
        raise MoebenchError(f"a context of {load.context} tokens is more than any model has; give fewer.")
    advice = advise(described, hardware(options, described), load, options.goal, options.form)
    if options.json:
        print(json.dumps(facts(advice), indent=1))
    else:
        print(advice_text(advice, options.top, ""))
    return 0


def hardware(options: argparse.Namespace, described: Described) -> Hardware:
    """Return the machine: what was given, else this one's memory; rates given, by data sheet, measured, or assumed."""
    known = host.host_facts()
    stable = known["stable"]
    vram = max((gpu.get("memory_bytes") or 0 for gpu in stable["gpus"] or ()), default=0)
    vram = vram if options.vram is None else parse_bytes(options.vram)
    ram = stable["memory_bytes"] if options.ram is None else parse_bytes(options.ram)
    dtype = "float32" if described.stored is not None and described.stored.form == "float32" else "bfloat16"
    probed = probed_rates(store_path(options.store), known["host_key"], dtype)
    machine = Hardware(vram, ram, DEFAULTS).with_rates(probed)
    return machine.with_rates(device_rates(options.device)).with_rates(given_rates(options.rate))


def _batch(options: argparse.Namespace) -> int:
    if not 1 <= options.batch <= 2**16:
        raise MoebenchError("--batch takes a number of sequences from 1 to 65536.")
    return int(options.batch)


def _skew(skew: float) -> float:
    if not (math.isfinite(skew) and 0 <= skew <= 8):
        raise MoebenchError("--skew takes the exponent of a Zipf law, from 0 to 8.")
    return skew
