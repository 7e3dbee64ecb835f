"""The command ``moebench trace``: record who goes where in a model, make traces up, and look at them. No torch here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..contracts import Case, MoebenchError, Registry, build_params
from ..suites.models.fetch import run_lines
from ..suites.traces.files import check_target, write_trace
from .run import planned, split_plugins, warn
from .trace_text import inspection

JOB = "moebench.suites.traces.record_job"


def record(options: argparse.Namespace) -> int:
    """Record the routing of a model that generates, in a process of its own, and print how to replay it."""
    plugins, settings = split_plugins(_settings(options))
    check_target(options.output, options.force)
    if options.tokens < 1:
        raise MoebenchError(f"--tokens {options.tokens} records nothing; give a number from 1.")
    text = _readable(options.text)
    registry = Registry.load(plugins)
    warn(registry)
    job = {
        "case": _case(options.model, settings, registry).to_json(),
        "plugins": plugins,
        "target": str(Path(options.output).absolute()),
        "tokens": options.tokens,
        "prompt": options.prompt,
        "text": text,
    }
    code, last = run_lines([sys.executable, "-m", JOB, json.dumps(job)], _to_stderr)
    if code:
        reason = last if code == 1 else f"its process ended with code {code} after '{last}'; free some memory."
        raise MoebenchError(f"model '{options.model}' could not be recorded: {reason}")
    print(inspection(options.output, ()))
    return 0


def synthesize(options: argparse.Namespace) -> int:
    """Write a made-up trace and print how to replay it."""
    from ..suites.traces.synthetic import KINDS

    values = {name: _value(text) for name, text in map(_pair, _settings(options))}
    params = build_params(KINDS[options.kind], values, f"trace '{options.kind}'")
    check_target(options.output, options.force)
    write_trace(options.output, params.columns(), params.facts())
    print(inspection(options.output, ()))
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Print what a trace says of itself, and what a cache makes of it."""
    if options.settings:
        raise MoebenchError(f"'{options.settings[0]}' says nothing to `moebench trace inspect`; leave it out.")
    for capacity in options.capacity or ():
        if not 0 < capacity <= 1:
            raise MoebenchError(f"--capacity {capacity:g} is no share of all experts; give one above 0, up to 1.")
    print(inspection(options.file, options.capacity or (0.25,)))
    return 0


def _case(model: str, settings: Sequence[str], registry: Registry) -> Case:
    """Return the one case that says which model, and what is made of its layers."""
    layers = [] if any(setting.startswith("model.layers=") for setting in settings) else ["model.layers=moe"]
    plan, _ = planned(["suite=accuracy", f"model={model}", *layers, *settings], registry)
    for item in plan.refused:
        if not registry.params("model", item.case.model).recorded:
            raise MoebenchError(
                f"model '{model}' has no language model with a tokenizer; record tinymoe, smollm2 or, by hf, your own."
            )
        raise MoebenchError(item.refusal or "this model cannot be recorded here.")
    if len(plan.cases) != 1:
        raise MoebenchError(f"these settings describe {len(plan.cases)} methods; record them one by one.")
    if plan.cases[0].sparsity.name != "none":
        raise MoebenchError("a trace says who is asked, whatever an expert leaves out; leave out axes.sparsity.")
    return plan.cases[0]


def _settings(options: argparse.Namespace) -> list[str]:
    """Return the settings NAME=VALUE; an option that nobody knows is an error."""
    for setting in options.settings:
        if setting.startswith("-"):
            raise MoebenchError(f"unknown option '{setting}'; see `moebench trace {options.action} --help`.")
    return list(options.settings)


def _pair(setting: str) -> tuple[str, str]:
    name, equals, value = setting.partition("=")
    if not equals:
        raise MoebenchError(f"'{setting}' sets nothing of a trace; write it as steps=512.")
    return name, value


def _value(text: str) -> Any:
    """Return a number or a truth value as what it is, and anything else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _readable(path: str | None) -> str | None:
    """Return the absolute path of a text, after reading it."""
    if path is None:
        return None
    try:
        Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise MoebenchError(f"{path} cannot be read ({reason}); give a text file.") from error
    return str(Path(path).absolute())


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
