"""Routing traces: who went where, recorded elsewhere. Imports no torch.

A trace has one row per assignment: ``step``, ``layer``, ``token`` and ``expert`` are whole numbers from 0, ``weight``
is finite. It is Parquet (``.parquet``) or JSON lines (``.jsonl``, ``.ndjson``). A column ``tokens``, which may be left
out, says how many tokens the row's step has; without it a step ends with its last token that has an expert somewhere.
Other columns are left alone.

A model is recorded by collecting what its layers did (``suites.models.reroute``), whichever routing they had:

    places = []
    with reroute(model, "topk") as routers:
        for step, input_ids in enumerate(texts):
            model(input_ids)
            places += [(step, layer, routing) for layer, routing in routers.routings.items()]
    sha256 = save_trace("trace.parquet", columns_of(places))

It is replayed by ``axes.traffic=replay`` with ``params.traffic.replay.path`` and ``params.traffic.replay.sha256``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contracts import MoebenchError, canonical_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from ..moe.routing import Routing

    Whole = NDArray[np.int64]

INDICES = ("step", "layer", "token", "expert")
COLUMNS = (*INDICES, "weight")
TOKENS = "tokens"
FACTS = "moebench"
SUFFIXES = (".parquet", ".jsonl", ".ndjson")

LARGEST = 2**31 - 1
"""The largest step, layer, token or expert."""


class TraceError(MoebenchError, ValueError):
    """A trace that cannot be replayed: one sentence that names the remedy."""


@dataclass(frozen=True)
class Entries:
    """The assignments of one step and layer, sorted by token; those of a token keep their order in the file.

    ``token_N`` and ``expert_N`` are int64, ``weight_N`` float64; ``tokens`` is how many the step has in all layers.
    """

    token_N: Whole
    expert_N: Whole
    weight_N: NDArray[np.float64]
    tokens: int

    @cached_property
    def most_k(self) -> int:
        """Return the most experts that a token has."""
        import numpy as np

        return int(np.unique(self.token_N, return_counts=True)[1].max())

    @cached_property
    def most_expert(self) -> int:
        """Return the largest expert id."""
        return int(self.expert_N.max())


@dataclass(frozen=True)
class Trace:
    """A whole trace in memory; ``by_place`` holds the assignments of (step, layer), steps counted from 0 in order."""

    by_place: dict[tuple[int, int], Entries]
    steps: int
    layers: tuple[int, ...]

    def at(self, step: int, layer: int) -> Entries:
        """Return the assignments of ``layer`` at ``step``; after its last step a trace begins anew."""
        place = step % self.steps
        if (place, layer) not in self.by_place:
            raise TraceError(f"the trace has nothing of layer {layer} at its step {place}; choose another layer.")
        return self.by_place[place, layer]

    def of_layer(self, layer: int | None) -> list[Entries]:
        """Return the assignments of every step of ``layer``, or of all layers."""
        return [entries for (_, where), entries in self.by_place.items() if layer in (None, where)]


@lru_cache(maxsize=4)
def load_trace(path: str, sha256: str) -> Trace:
    """Return the trace in the file ``path``, whose content must have this ``sha256``; TraceError says what is wrong.

    What is hashed is what is parsed, so a file that changes later changes nothing.
    """
    data = _bytes(path, sha256)
    return _sorted(_checked(_table(path, data), path))


def sha256_of_file(path: str) -> str:
    """Return the sha256 of a file: what a replay must name."""
    return hashlib.sha256(_read(path)).hexdigest()


def save_trace(path: str, columns: dict[str, Any], facts: Mapping[str, Any] | None = None) -> str:
    """Write the columns (sequences of one length; ``tokens`` if given) as a trace and return the file's sha256.

    ``facts`` are kept in a Parquet file's metadata as JSON, such as ``experts``, the number that each layer has; JSON
    lines have no place for them.
    """
    import pyarrow.parquet as pq

    table = _table_of(columns)
    if Path(path).suffix == ".parquet":
        pq.write_table(table.replace_schema_metadata({FACTS: canonical_json(facts)}) if facts else table, path)
    else:
        import json

        lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        Path(path).write_text(lines)
    return sha256_of_file(path)


def facts_of(path: str) -> dict[str, Any]:
    """Return what whoever made the trace said of it; nothing where they said nothing."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    if Path(path).suffix != ".parquet":
        return {}
    try:
        metadata = pq.read_schema(io.BytesIO(_read(path))).metadata or {}
        facts = json.loads(metadata.get(FACTS.encode(), b"{}"))
    except (pa.ArrowException, ValueError) as error:
        raise TraceError(f"what trace '{path}' says of itself cannot be parsed; write it anew.") from error
    kinds = {"experts": int, "hints_sha256": str}
    if not isinstance(facts, dict) or any(
        not isinstance(facts.get(name, kind()), kind) for name, kind in kinds.items()
    ):
        raise TraceError(f"what trace '{path}' says of itself is of other kinds than we write; write it anew.")
    return facts


def trace_of(columns: dict[str, Any]) -> Trace:
    """Return the trace that ``save_trace`` of these columns and ``load_trace`` would give, without a file."""
    return _sorted(_checked(_table_of(columns), "in memory"))


def columns_of(places: Iterable[tuple[int, int, Routing]]) -> dict[str, list[Any]]:
    """Return all six columns of what routers did: (step, layer, Routing of all tokens of that step) for each place."""
    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, TOKENS)}
    for step, layer, routing in places:
        tokens = routing.token_N.tolist()
        columns["step"] += [step] * len(tokens)
        columns["layer"] += [layer] * len(tokens)
        columns["token"] += tokens
        columns["expert"] += routing.expert_N.tolist()
        columns["weight"] += routing.weight_N.detach().double().tolist()
        columns[TOKENS] += [routing.num_tokens] * len(tokens)
    return columns


def _table_of(columns: dict[str, Any]) -> pa.Table:
    import pyarrow as pa

    names = [*COLUMNS, TOKENS] if TOKENS in columns else COLUMNS
    return pa.table({name: pa.array(columns[name], _type(name)) for name in names})


def _type(name: str) -> pa.DataType:
    import pyarrow as pa

    return pa.float64() if name == "weight" else pa.int64()


def _read(path: str) -> bytes:
    if not path:
        raise TraceError("no file is named; add params.traffic.replay.path=FILE.")
    file = Path(path).expanduser()
    if file.suffix not in SUFFIXES:
        raise TraceError(f"'{path}' is no trace by its name; give a file ending in {', '.join(SUFFIXES)}.")
    try:
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise TraceError(
            f"trace '{path}' cannot be read ({getattr(error, 'strerror', error)}); check the path."
        ) from error


def _bytes(path: str, sha256: str) -> bytes:
    data = _read(path)
    found = hashlib.sha256(data).hexdigest()
    if not sha256:
        raise TraceError(f"a replay names its file's content; add params.traffic.replay.sha256={found}.")
    if found != sha256.lower():
        raise TraceError(f"trace '{path}' has sha256 {found}, not {sha256}; give the file that was recorded.")
    return data


def _table(path: str, data: bytes) -> pa.Table:
    """Return the file as it is, whatever its columns are."""
    import pyarrow as pa
    import pyarrow.json as pj
    import pyarrow.parquet as pq

    try:
        if Path(path).suffix == ".parquet":
            return pq.read_table(io.BytesIO(data))
        return pj.read_json(io.BytesIO(data)) if data.strip() else pa.table({})
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
        raise TraceError(f"trace '{path}' cannot be parsed ({reason}); write it anew.") from error


def _checked(table: pa.Table, path: str) -> dict[str, Any]:
    """Return the six columns as arrays of numbers, with nothing missing and nothing impossible."""
    import numpy as np

    if table.num_rows == 0:
        raise TraceError(f"trace '{path}' has no rows; write {', '.join(COLUMNS)} for every assignment.")
    columns = {name: _column(table, name, path) for name in COLUMNS}
    if TOKENS in table.column_names:
        columns[TOKENS] = _column(table, TOKENS, path)
    for name in sorted(columns.keys() - {"weight"}):
        least, most = columns[name].min(), columns[name].max()
        if least < 0 or most > LARGEST:
            wrong = least if least < 0 else most
            raise TraceError(f"column '{name}' of trace '{path}' holds {wrong}; count from 0 to {LARGEST} at most.")
    if not np.isfinite(columns["weight"]).all():
        raise TraceError(f"column 'weight' of trace '{path}' holds a value that is not finite; mend it.")
    if (columns.setdefault(TOKENS, columns["token"] + 1) <= columns["token"]).any():
        raise TraceError(f"trace '{path}' has a token beyond its column '{TOKENS}'; count all tokens of a step.")
    return columns


def _column(table: pa.Table, name: str, path: str) -> NDArray[Any]:
    """Return a column as int64, or as float64 where it is the weight."""
    import pyarrow as pa

    if table.column_names.count(name) != 1:
        raise TraceError(f"trace '{path}' needs one column '{name}'; write {', '.join(COLUMNS)} for every assignment.")
    column = table.column(name)
    if column.null_count:
        raise TraceError(f"column '{name}' of trace '{path}' lacks {column.null_count} values; fill them in.")
    wanted = _type(name)
    if pa.types.is_integer(column.type) or (name == "weight" and pa.types.is_floating(column.type)):
        with contextlib.suppress(pa.ArrowException):
            array: NDArray[Any] = column.cast(wanted).to_numpy()
            return array
    kind = "numbers" if name == "weight" else "whole numbers of at most 64 bits"
    raise TraceError(f"column '{name}' of trace '{path}' is of type {column.type}; write {kind}.")


def _sorted(columns: dict[str, Any]) -> Trace:
    """Return the trace of checked columns; a pair of token and expert may not come twice in a place."""
    import numpy as np

    order_N = np.lexsort([columns[name] for name in ("token", "layer", "step")])  # stable: the last key comes first
    step_N, layer_N, token_N, expert_N, weight_N, size_N = (columns[name][order_N] for name in (*COLUMNS, TOKENS))
    pairs = np.unique(np.stack([step_N, layer_N, token_N, expert_N], axis=1), axis=0)
    if len(pairs) < len(step_N):
        raise TraceError(
            f"{len(step_N) - len(pairs)} assignments of the trace repeat the step, layer, token and expert of another; "
            "write each once."
        )
    steps, place_N = np.unique(step_N, return_inverse=True)
    tokens_S = np.zeros(len(steps), dtype=np.int64)
    np.maximum.at(tokens_S, place_N, size_N)
    changes = np.flatnonzero((np.diff(place_N) != 0) | (np.diff(layer_N) != 0)) + 1
    by_place = {}
    for part in np.split(np.arange(len(step_N)), changes):
        place = int(place_N[part[0]])
        entries = Entries(token_N[part], expert_N[part], weight_N[part], int(tokens_S[place]))
        by_place[place, int(layer_N[part[0]])] = entries
    return Trace(by_place, len(steps), tuple(int(layer) for layer in np.unique(layer_N)))
