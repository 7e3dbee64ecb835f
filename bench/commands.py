"""The commands that look at results, plug-ins, models and the machine."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..contracts import KINDS, Descriptor, MoebenchError, Registry, unknown
from . import host
from .run import warn
from .store import existing_store, store_path


def report(options: argparse.Namespace) -> int:
    """Write the HTML report."""
    from ..dashboards.report import write_report

    store = existing_store(options.store)
    file = Path(options.output) if options.output else store / "report.html"
    try:
        print(write_report(store, file, options.run))
    except OSError as error:
        raise MoebenchError(f"{file} cannot be written ({error.strerror}); name another file with -o.") from error
    return 0


def ingest(options: argparse.Namespace) -> int:
    """Bring the database up to date, with the results of another tool where a file of it is named."""
    from ..results.database import ingest as ingest_parts

    if options.source:
        from .pytest_results import import_file

        if not options.file:
            raise MoebenchError(f"name the file to take in, for example `moebench ingest {options.source} out.json`.")
        print(f"run {import_file(store_path(options.store), Path(options.file))}")
    done = ingest_parts(existing_store(options.store))
    for sentence in done.set_aside + done.left_out:
        print(f"moebench: {sentence}", file=sys.stderr)
    print(f"{done.parts_added} parts with {done.rows} rows added")
    return int(bool(done.set_aside))


def sql(options: argparse.Namespace) -> int:
    """Print the result of one query, or the tables and views."""
    from ..results.query import run_sql

    query = options.query or (
        "SELECT table_name AS name, table_type AS kind FROM information_schema.tables ORDER BY kind, name"
    )
    print(run_sql(existing_store(options.store), query, format=options.format), end="")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write tables to Parquet or CSV files."""
    from ..results.export import export as export_tables

    for path in export_tables(existing_store(options.store), Path(options.target), options.format, options.table):
        print(path)
    return 0


def list_plugins(options: argparse.Namespace) -> int:
    """Print every plug-in: kind, name, availability, one line."""
    registry = Registry.load(options.plugin)
    warn(registry)
    if options.kind and options.kind not in KINDS:
        raise MoebenchError(unknown("plug-in kind", options.kind, KINDS))
    for kind in [options.kind] if options.kind else KINDS:
        print(kind)
        for descriptor in registry.all(kind):
            print(f"  {descriptor.name:20s} {descriptor.summary}")
            for line in _availability(descriptor):
                print(f"  {'':20s} {line}")
    return 0


def _availability(descriptor: Descriptor) -> Iterator[str]:
    """Yield what keeps a plug-in from working here; nothing where it works."""
    absent = [name for name in descriptor.requires if not any(metadata.distributions(name=name))]
    if absent:
        yield f"needs {', '.join(absent)}: pip install {' '.join(absent)}"
    elif descriptor.kind == "backend":
        available = descriptor.create().availability()
        if not available.available:
            yield f"not available: {available.reason}"
            return
        yield f"available for {', '.join(available.evidence)}"
        if not available.timed:
            yield f"not timed: {available.reason}"
    elif descriptor.kind == "model" and descriptor.params is not None:
        try:
            missing = descriptor.params_from().missing()
        except MoebenchError as error:
            missing = str(error)
        if missing:
            yield f"not available: {missing}"


def doctor(options: argparse.Namespace) -> int:
    """Print what this machine is and what moebench can do with it; exit 1 where a run would not work."""
    facts = host.host_facts()
    for section in ("stable", "snapshot"):
        for name, value in facts[section].items():
            print(f"{name:24s} {'unknown' if value is None else value}")
    installed = host.packages()
    for package in host.PACKAGES:
        print(f"{package:24s} {installed.get(package, 'not installed')}")
    problems = list(_problems(store_path(options.store)))
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print("ready: `moebench run suite=selftest` will work here")
    return int(bool(problems))


def _problems(store: Path) -> Iterator[str]:
    if importlib.util.find_spec("torch") is None:
        yield "torch is not installed; run pip install torch."
    parent = next(path for path in (store, *store.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < 2**30:
        yield f"only {free / 2**30:.1f} GiB are free at {parent}; make room or choose another store."


EXAMPLES = {"fetch": "moebench models fetch smollm2", "train": "moebench models train tinymoe"}


def models(options: argparse.Namespace) -> int:
    """List the models, or fetch or train one into the cache with progress."""
    registry = Registry.load()
    if options.action == "list":
        options.kind, options.plugin = "model", []
        return list_plugins(options)
    if not options.name:
        raise MoebenchError(f"name the model to {options.action}, for example `{EXAMPLES[options.action]}`.")
    if options.action == "train":
        from .train import train

        return train(options, registry)
    params = registry.get("model", options.name).params_from(_model_settings(options.settings))
    if not hasattr(params, "fetch"):
        raise MoebenchError(f"model '{options.name}' needs no fetching: its weights are made from a seed or are local.")
    print(params.fetch(lambda line: print(line, file=sys.stderr, flush=True)))
    return 0


def _model_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Return the parameters in settings such as ``model.path=owner/name``."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.startswith("model."):
            raise MoebenchError(f"'{setting}' sets nothing of a model; write it as model.path=owner/name.")
        values[name.removeprefix("model.")] = {"true": True, "false": False}.get(value, value)
    return values
