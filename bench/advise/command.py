"""The command ``moebench advise``: what fits where, and how fast it would decode."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from ...contracts import MoebenchError, Registry
from .. import host
from ..store import store_path
from .advice import Advice, advise, compared_facts, facts
from .hardware import ASSUMED, DEFAULTS, Hardware, device_rates, given_rates, probed_rates
from .measure import measured
from .predict import Load
from .sizes import parse_bytes, parse_count
from .source import Described, describe
from .text import advice_text, checked_text, compared_text, rates_text
from .validate import Compared, calibrate, probe, stored, validate

MOST_TOKENS = 2**30


def command(options: argparse.Namespace) -> int:
    """Say what of the model fits where, the best first; or how far such predictions are off here."""
    if options.top < 1:
        raise MoebenchError("--top takes how many lines to show, from 1.")
    if options.validate:
        if options.model is not None or options.measure:
            raise MoebenchError("--validate runs models of its own; leave out MODEL and --measure.")
        return _validate(options)
    if options.model is None:
        raise MoebenchError("name a MODEL: a folder, a config.json, an index, a *.gguf, or owner/name of the hub.")
    described = describe(options.model)
    load = Load(_batch(options), parse_count(options.context), _skew(options.skew))
    if load.context > MOST_TOKENS:
        raise MoebenchError(f"a context of {load.context} tokens is more than any model has; give fewer.")
    machine, errors = hardware(options, described)
    advice = advise(described, machine, load, options.goal, options.form)
    compared = _measured(options, advice) if options.measure else []
    if options.json:
        more = {"measured_errors": errors, "measured": compared_facts(compared)}
        print(json.dumps({**facts(advice), **more}, indent=1))
    else:
        print(advice_text(advice, options.top, checked_text(errors)))
        if compared:
            print("\nmeasured with one thread, and what is predicted of that:")
            print(f"{rates_text(_one_thread(store_path(options.store)))}\n{compared_text(compared)}")
    return 0


def _measured(options: argparse.Namespace, advice: Advice) -> list[Compared]:
    if options.measure < 0:
        raise MoebenchError("--measure takes how many placements to run, such as 3.")
    store = store_path(options.store)
    return measured(advice, options.measure, Registry.load(), _one_thread(store), store, options.json)


def _one_thread(store: Path) -> Hardware:
    """Return this host as one thread has it, with what was found of it."""
    host_key = host.host_facts()["host_key"]
    program, _ = stored(store, host_key)
    return Hardware(0, 0, DEFAULTS, program).with_rates(probed_rates(store, host_key, "float32", 1))


def _validate(options: argparse.Namespace) -> int:
    """Measure, and say how far the model is off on this host."""
    registry, store = Registry.load(), store_path(options.store)
    host_key = host.host_facts()["host_key"]
    if not {"ram", "disk", "cpu"} <= probed_rates(store, host_key, "float32", 1).keys():
        probe(registry, store, options.json)
    machine = _one_thread(store)
    assumed = [name for name in ("ram", "disk", "cpu") if machine.rates[name].source == ASSUMED]
    if assumed:
        raise MoebenchError(f"suite roofline gave no rate of {', '.join(assumed)}; see its run in `moebench report`.")
    machine = replace(machine, program=calibrate(registry, machine, store, options.json))
    compared = validate(registry, machine, store, options.json)
    if options.json:
        print(json.dumps(compared_facts(compared), indent=1))
    else:
        print(compared_text(compared))
    return 0


def hardware(options: argparse.Namespace, described: Described) -> tuple[Hardware, list[float]]:
    """Return the machine, and how far predictions were off on this host.

    Memory is what was given, else this machine's; rates are given, by data sheet, measured here, or assumed.
    """
    known = host.host_facts()
    stable = known["stable"]
    vram = max((gpu.get("memory_bytes") or 0 for gpu in stable["gpus"] or ()), default=0)
    vram = vram if options.vram is None else parse_bytes(options.vram)
    ram = stable["memory_bytes"] if options.ram is None else parse_bytes(options.ram)
    dtype = "float32" if described.stored is not None and described.stored.form == "float32" else "bfloat16"
    store = store_path(options.store)
    program, errors = stored(store, known["host_key"])
    machine = Hardware(vram, ram, DEFAULTS, program).with_rates(probed_rates(store, known["host_key"], dtype))
    sheet = device_rates(options.device)
    if sheet and options.vram is None and not vram:
        raise MoebenchError(f"this machine has no GPU; say with --vram how much of '{options.device}' to use.")
    return machine.with_rates(sheet).with_rates(given_rates(options.rate)), errors


def _batch(options: argparse.Namespace) -> int:
    if not 1 <= options.batch <= 2**16:
        raise MoebenchError("--batch takes a number of sequences from 1 to 65536.")
    return int(options.batch)


def _skew(skew: float) -> float:
    if not (math.isfinite(skew) and 0 <= skew <= 8):
        raise MoebenchError("--skew takes the exponent of a Zipf law, from 0 to 8.")
    return skew
