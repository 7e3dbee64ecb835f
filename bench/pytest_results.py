"""Results of pytest-benchmark as one run of the store: a case for each benchmark, its rounds as samples.

The benchmarks ran one after the other, so every case is a group and a sitting of its own, and its mode is
``sequential``: they stand beside each other in a report and are never compared. Column ``model`` names the benchmark,
for that is what is computed. Where a round holds several calls, a sample is their mean: the case says how many, and has
no percentiles. A file does not tell whether a test passed after it was timed; a session that is kept does.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import reprlib
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..contracts import NAMED_AXES, Evidence, MoebenchError, Status, make_key
from ..results.parts import RUN_FILE, write_json_atomic, write_part
from ..results.statistics import summary
from ..version import __version__

SUITE, SUITE_VERSION = "pytest-benchmark", "1"
LONGEST = 200
"""Characters that are kept of a parameter, or of anything else that is no plain number."""

MOST_NAMES = 64
"""Parameters, options and extra facts that are kept of one benchmark."""

WALL_TIMERS = ("perf_counter", "monotonic", "time")
CPU_TIMERS = ("process_time", "thread_time")
UNSERIALIZABLE = "UNSERIALIZABLE["
"""What pytest-benchmark writes before the repr of an object, and `]` behind it, in its JSON."""

ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
NO_RAW_DATA = (
    "its raw data are not in the file; write it with --benchmark-json=FILE, or with --benchmark-save=NAME "
    "--benchmark-save-data."
)
NO_TIME = "its raw data hold {value}, which is no time; choose a finer --benchmark-timer and run it again."
FIT_NS = 2**63

Record = dict[str, Any]
Ending = tuple[str, str]
"""(status, reason) of a benchmark that has no times."""


def import_file(store: Path, path: Path) -> str:
    """Bring a JSON file of pytest-benchmark into the store; return the run's id, the same for the same content."""
    return store_results(store, read_file(path), shlex.join(["moebench", "ingest", SUITE, path.name]))


def read_file(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of pytest-benchmark."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise MoebenchError(f"{path} cannot be read ({error.strerror}); name a file of --benchmark-json.") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise MoebenchError(f"{path} is no JSON ({reason}); write it anew with --benchmark-json.") from error
    benchmarks = document.get("benchmarks") if isinstance(document, dict) else None
    if not isinstance(benchmarks, list) or not all(_is_benchmark(one) for one in benchmarks):
        raise MoebenchError(f"{path} is no file of pytest-benchmark; write one with --benchmark-json.")
    if not benchmarks:
        raise MoebenchError(f"{path} holds no benchmarks; run some with --benchmark-json.")
    return dict(document)


def _is_benchmark(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("fullname"), str)


def store_results(
    store: Path,
    document: Mapping[str, Any],
    command: str,
    ended: Mapping[str, Ending] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Write the benchmarks of ``document`` as one finished run and return its id.

    ``ended`` maps benchmarks, by full name, to a status and a reason: they get no times, whatever the document holds.
    ``provenance`` replaces what the document tells of the host, as fields of ``run.json``.
    """
    records = [_record(benchmark, (ended or {}).get(benchmark["fullname"])) for benchmark in document["benchmarks"]]
    taken = _moment(document.get("datetime"))
    told = _provenance(document)
    content = hashlib.sha256(json.dumps([records, told, str(taken)], sort_keys=True, default=str).encode()).hexdigest()
    run_id = f"{taken:%Y%m%d-%H%M%S}-{content[:12]}"
    folder = store / "runs" / run_id
    run = {"run_id": run_id, "plan_hash": content, "started_at": taken.isoformat(), "finished_at": taken.isoformat()}
    run |= {"status": "finished", "command": command, "version": __version__, **told, **(provenance or {})}
    if not (folder / RUN_FILE).exists():
        write_json_atomic(folder / RUN_FILE, run)
    write_part(folder, content, _tables(run_id, records, taken))
    return run_id


def _record(benchmark: Mapping[str, Any], ended: Ending | None) -> Record:
    """Return what is kept of one benchmark, made of plain values."""
    stats = _mapping(benchmark.get("stats"))
    iterations, data = stats.get("iterations"), stats.get("data")
    return {
        "identity": {"benchmark": clean(benchmark["fullname"]), "params": shortened(benchmark.get("params"))},
        "told": {
            "group": short(benchmark.get("group")),
            **{name: shortened(benchmark.get(name)) for name in ("options", "extra_info")},
        },
        "iterations": iterations if type(iterations) is int and 0 < iterations < FIT_NS else 1,
        "data": data if isinstance(data, list) else [],
        "ended": ended,
    }


def _moment(value: Any) -> datetime.datetime:
    """Return when the session ended, as naive UTC; files without a time have the beginning of all times."""
    try:
        moment = datetime.datetime.fromisoformat(value)
        return moment if moment.tzinfo is None else moment.astimezone(datetime.UTC).replace(tzinfo=None)
    except (TypeError, ValueError, OverflowError):
        return datetime.datetime(1970, 1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Provenance


def _provenance(document: Mapping[str, Any]) -> Record:
    """Return what the document tells of its machine and its sources, as fields of ``run.json``."""
    machine, commit = _mapping(document.get("machine_info")), _mapping(document.get("commit_info"))
    cpu = _mapping(machine.get("cpu"))
    steady = {name: _known(machine, name) for name in ("node", "machine", "system", "processor")}
    steady["cpu"] = _known(cpu, "brand_raw")
    cores = cpu.get("count")
    sha, dirty = _known(commit, "id"), commit.get("dirty")
    return {
        "host_key": make_key(steady),
        "git_sha": sha,
        "git_dirty": dirty if isinstance(dirty, bool) else None,
        "packages": {SUITE: short(document.get("version")), "python": _known(machine, "python_version")},
        "config": {"source": SUITE, "commit_info": shortened(commit)},
        "host": {
            "cpu": steady["cpu"] or steady["processor"],
            "cores": cores if type(cores) is int and 0 < cores < 2**31 else None,
            "facts": {**shortened({k: v for k, v in machine.items() if k != "cpu"}), "cpu": shortened(cpu)},
        },
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _known(values: Mapping[str, Any], name: str) -> str | None:
    return None if values.get(name) in (None, "") else clean(str(values[name]))[:LONGEST]


def shortened(values: Any) -> dict[str, Any]:
    """Return a mapping with its values made plain and short; what is no mapping counts as empty."""
    pairs = list(_mapping(values).items())[:MOST_NAMES]
    return {clean(str(name))[:LONGEST]: short(value) for name, value in pairs}


def short(value: Any) -> Any:
    """Return numbers, booleans and None as they are, texts cut, and anything else as the beginning of its repr."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, (int, float)) and abs(value) < FIT_NS:
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, str):
        inside = value.startswith(UNSERIALIZABLE) and value.endswith("]")
        text = value[len(UNSERIALIZABLE) : -1] if inside else value
    else:
        text = _REPR.repr(list(value) if isinstance(value, tuple) else value)
    return clean(ADDRESS.sub("", text[: 2 * LONGEST]))[:LONGEST]


def clean(text: str) -> str:
    """Return a text that every file format takes: no half characters, no NUL."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 4 * LONGEST
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxarray = 20


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def _tables(run_id: str, records: Sequence[Record], taken: datetime.datetime) -> dict[str, list[Record]]:
    tables: dict[str, list[Record]] = {"cases": [], "timings": [], "metrics": []}
    seen: Counter[str] = Counter()
    for record in records:
        first = make_key(record["identity"])
        seen[first] += 1
        key = first if seen[first] == 1 else make_key({**record["identity"], "nth": seen[first]})
        samples, status, reason = _samples(record)
        case = {"run_id": run_id, "case_key": key}
        tables["cases"].append({**case, **_case_row(key, record, status, reason), "finished_at": taken})
        if samples:
            tables["timings"].append({**case, **_timing_row(key, record, samples)})
            calls = {"name": "calls_per_sample", "value": float(record["iterations"]), "unit": "1"}
            tables["metrics"].append({**case, **calls})
    return tables


def _samples(record: Record) -> tuple[list[int], Status, str]:
    """Return the rounds in whole nanoseconds, or none with the status and the reason of their absence."""
    if record["ended"] is not None:
        status, reason = record["ended"]
        return [], Status(status), clean(reason)
    if not record["data"]:
        return [], Status.SKIPPED, NO_RAW_DATA
    samples = []
    for value in record["data"]:
        ns = _nanoseconds(value)
        if ns is None:
            return [], Status.FAILED, NO_TIME.format(value=short(value))
        samples.append(ns)
    return samples, Status.OK, ""


def _nanoseconds(seconds: Any) -> int | None:
    """Return seconds as whole nanoseconds; None for what is no time that can be kept."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < FIT_NS / 1e9:
        return None
    return round(seconds * 1e9) or None


def _case_row(key: str, record: Record, status: Status, reason: str) -> Record:
    identity = record["identity"]
    return {
        "method_key": key,
        "group_key": key,
        "suite": SUITE,
        "suite_version": SUITE_VERSION,
        "protocol": "timed",
        **dict.fromkeys(NAMED_AXES, "none"),
        "model": identity["benchmark"],
        "device": "cpu",
        "evidence": str(Evidence.MEASURED_CPU),
        "status": str(status),
        "reason": reason or None,
        "flags": [],
        "params": {"pytest": {"params": identity["params"], **record["told"]}},
    }


def _timing_row(key: str, record: Record, samples: list[int]) -> Record:
    found = summary(samples)
    if record["iterations"] > 1:
        found |= dict.fromkeys(name for name in found if name.startswith("p"))
    return {"process": 0, "clock": _clock(record), "sitting": key, "mode": "sequential", "ns": samples, **found}


def _clock(record: Record) -> str:
    """Return the clock that a timer reads: wall, cpu, or the timer's own name where it is another."""
    timer = str(record["told"]["options"].get("timer") or WALL_TIMERS[0])
    name = timer.rpartition(".")[2].removesuffix("_ns")
    if name in WALL_TIMERS:
        return "wall"
    return "cpu" if name in CPU_TIMERS else timer
