"""The command ``moebench models train``: suite ``pretraining`` of one model, unless the cache has the model already."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..contracts import MoebenchError, Registry, plain
from .run import execute, exit_status, planned
from .store import store_path

OF_RUN = {"threads": "axes.threads", "device": "device", "store": "store"}
"""Settings of the run; all others are parameters of the model."""


def train(options: argparse.Namespace, registry: Registry) -> int:
    """Train a model into the cache and print its folder; a training that was interrupted goes on."""
    descriptor = registry.get("model", options.name)
    if not hasattr(descriptor.params, "trainer"):
        raise MoebenchError(f"model '{options.name}' is not trained here; train tinymoe, or fetch a model.")
    given = dict(_setting(setting) for setting in options.settings)
    params = descriptor.params_from({name: value for name, value in given.items() if name not in OF_RUN})
    if params.missing() is None:
        return _tell(params, options.quiet)
    settings = ["suite=pretraining", f"model={options.name}"]
    settings += [f"model.{name}={json.dumps(value, ensure_ascii=False)}" for name, value in plain(params).items()]
    settings += [
        f"{OF_RUN[name]}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items() if name in OF_RUN
    ]
    plan, settled = planned(settings, registry)
    if not plan.cases:
        raise MoebenchError(plan.refused[0].refusal or "the model cannot be trained here.")
    command = shlex.join(["moebench", "models", "train", options.name, *options.settings])
    finished = execute(plan, [], store_path(options.store or settled.store), command, options.quiet)
    if exit_status(finished.outcome, strict=False):
        _explain(finished.store, finished.run_id)
    print(f"run {finished.run_id}: {finished.outcome.phases['wall']:.1f} s; store {finished.store}")
    return _tell(params, options.quiet)


def _setting(text: str) -> tuple[str, Any]:
    """Return name and value of NAME=VALUE; numbers are numbers, and files are named from the root."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise MoebenchError(f"'{text}' sets nothing of a training; write it as variant=short.")
    if name == "data" and value:
        return name, str(Path(value).expanduser().absolute())
    return name, int(value) if value.lstrip("-").isdigit() else value


def _explain(store: Path, run_id: str) -> None:
    from ..results.query import reading

    with reading(store) as connection:
        rows: Sequence[Any] = connection.execute(
            "SELECT status, reason FROM cases WHERE run_id = ? AND status <> 'ok'", [run_id]
        ).fetchall()
    raise MoebenchError("; ".join(f"the training {status}: {reason}" for status, reason in rows))


def _tell(params: Any, quiet: bool) -> int:
    """Print the figures of the model, then its folder."""
    if not quiet:
        for name, value in params.manifest()["figures"].items():
            print(f"{name:30s} {value:.4f}")
    print(params.folder())
    return 0
