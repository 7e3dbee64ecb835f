"""Bugs put into the CUDA sources, each behind a number that the shim is given: one build has them all."""

from __future__ import annotations

import re
import shutil
from typing import NamedTuple

from moebench.kernels.cuda import host


class Mutant(NamedTuple):
    """A bug: in ``file``, ``new`` runs instead of ``old``, which is one or several statements, or an ``expression``.

    ``rung`` kills it on ``layer``: ``numerics`` (the oracle refuses an output), ``stuck`` (the shim finds a deadlock or
    a divergence), ``asan`` (with UBSan) or ``tsan``; ``said`` is in its words.
    """

    name: str
    file: str
    old: str
    new: str
    rung: str
    layer: str = "fused"
    said: str = ""
    expression: bool = False


def relaxed(statement):
    """Return a statement with its fetch_add as one that orders nothing."""
    return re.sub(r"fetch_add\((.*?), (-?1)\)", r"__atomic_fetch_add(\1, \2, __ATOMIC_RELAXED)", statement, count=1)


STORE = "of.partial[static_cast<long long>(assignment) * of.hidden + h0 + col] = value;"
COUNT = "if (fetch_add(of.pending() + token_tile, -1) == 1) s.released[count_shared(&s.num_released)] = token_tile;"
PUSH = "store_release(of.slots + at + i, tasks.tag | static_cast<unsigned>(first + i));"
RELAXED_PUSH = "__atomic_store_n(of.slots + at + i, tasks.tag | unsigned(first + i), __ATOMIC_RELAXED);"
LAST_TILE = "fetch_add(of.finished() + block, 1) == tasks.width_tiles - 1"
DISPATCHED = "if (dispatch_tile(of, task - tasks.gate_up)) push(of, tasks, tasks.down + task - tasks.gate_up, 1);"
STALE = "(found >> 32) != (tasks.tag >> 32)"
RAISE = "store_release_system(of.flag(peer, 0, of.rank, expert), epoch << 32 | static_cast<unsigned>(rows));"
RAISED = "__atomic_store_n(of.flag(peer, 0, of.rank, expert), epoch << 32 | unsigned(rows), __ATOMIC_RELAXED);"
ALL_HERE = (
    "for (int i = 0; i < packets; ++i) wait_for(of.flag(of.rank, 1, i / of.experts, i % of.experts), of.expected[i]);"
)

MUTANTS = (
    # a tile: pipeline, masks, fragments
    Mutant("no_barrier_before_a_stage_is_overwritten", "tile.cuh", "__syncthreads();  // this step's", "", "tsan"),
    Mutant(
        "copies_waited_for_one_step_late",
        "tile.cuh",
        "cp_async_wait<STAGES - 2>();",
        "cp_async_wait<STAGES - 1>();",
        "numerics",
    ),
    Mutant(
        "one_row_too_many",
        "tile.cuh",
        "row < rows && col < cols",
        "row <= rows && col < cols",
        "asan",
        said="heap-buffer-overflow",
        expression=True,
    ),
    Mutant(
        "one_column_too_many",
        "tile.cuh",
        "c < of.cols ?",
        "c <= of.cols ?",
        "asan",
        said="heap-buffer-overflow",
        expression=True,
    ),
    Mutant("unmasked_depth", "tile.cuh", "valid > 0 ? 16 : 0", "16", "numerics", expression=True),
    Mutant(
        "unmasked_scalar_tail",
        "tile.cuh",
        "i < valid ? from[i].bits : 0",
        "from[i].bits",
        "numerics",
        "odd",
        expression=True,
    ),
    Mutant(
        "copies_of_unaligned_rows",
        "tile.cuh",
        "of.depth % CHUNK == 0 && aligned16(of.a) && aligned16(of.b)",
        "true",
        "asan",
        "odd",
        "misaligned",
        True,
    ),
    Mutant(
        "fragment_rows_swapped",
        "tile.cuh",
        "a[m][1] = pair_at(lower)",
        "a[m][1] = pair_at(upper + 8)",
        "numerics",
        expression=True,
    ),
    Mutant(
        "divergent_barrier",
        "tile.cuh",
        "__syncthreads();  // the stages",
        "if (threadIdx.x < 40) __syncthreads();",
        "stuck",
        said="divergent barrier",
    ),
    # the tasks: weights, lists, what one block must see of another
    Mutant("weight_forgotten", "layer.cuh", STORE, STORE.replace("value;", "sum[0][m][n][i];"), "numerics"),
    Mutant(
        "weight_of_another_row",
        "layer.cuh",
        STORE,
        STORE.replace("value;", "of.weight_N[mine.first] * sum[0][m][n][i];"),
        "numerics",
    ),
    Mutant(
        "order_counts_itself", "layer.cuh", "((1u << lane) - 1u)", "((2u << lane) - 1u)", "numerics", expression=True
    ),
    Mutant(
        "lane_skips_a_ballot",
        "layer.cuh",
        "before += __popc(__ballot_sync(0xffffffffu, token < first));",
        "if (lane < 31) before += __popc(__ballot_sync(0xffffffffu, token < first));",
        "stuck",
        said="divergent warp",
    ),
    Mutant("rows_counted_off_unwritten", "layer.cuh", "__syncthreads();  // so that what one thread", "", "tsan"),
    Mutant("rows_counted_off_relaxed", "layer.cuh", COUNT, relaxed(COUNT), "tsan"),
    Mutant("rows_counted_off_relaxed_in_two_kernels", "layer.cuh", COUNT, relaxed(COUNT), "tsan", "two_kernels"),
    # the queue: dependencies, release and acquire, what is left for the next launch
    Mutant(
        "down_released_one_tile_early",
        "moe.cuh",
        LAST_TILE,
        LAST_TILE.replace("- 1", "- 2"),
        "numerics",
        expression=True,
    ),
    Mutant(
        "combine_never_released",
        "moe.cuh",
        DISPATCHED,
        "dispatch_tile(of, task - tasks.gate_up);",
        "stuck",
        "dropped",
        "deadlock",
    ),
    Mutant("push_without_release", "moe.cuh", PUSH, RELAXED_PUSH, "tsan"),
    Mutant(
        "slot_without_acquire",
        "moe.cuh",
        "found = load_acquire(slot);  // again",
        "sim::yield(false); found = __atomic_load_n(slot, __ATOMIC_RELAXED);",
        "tsan",
    ),
    Mutant(
        "stale_slot_taken",
        "moe.cuh",
        "(found >> 32) != (tasks.tag >> 32)",
        "found == 0",
        "numerics",
        "idle",
        expression=True,
    ),
    Mutant(
        "tail_not_reset",
        "moe.cuh",
        "state[HEAD] = state[TAIL] = state[EXITED] = 0;",
        "state[HEAD] = state[EXITED] = 0;",
        "stuck",
        said="deadlock",
    ),
    # several devices
    Mutant(
        "flag_raised_before_rows_are_there", "symmetric.cuh", "__syncthreads();  // all rows", "", "tsan", "devices"
    ),
    Mutant("flag_raised_without_release", "symmetric.cuh", RAISE, RAISED, "tsan", "devices"),
    Mutant("results_not_waited_for", "symmetric.cuh", ALL_HERE, "", "tsan", "devices"),
)


UNSEEN = (
    "rows_counted_off_unwritten",
    "rows_counted_off_relaxed",
    "rows_counted_off_relaxed_in_two_kernels",
    "push_without_release",
    "slot_without_acquire",
    "flag_raised_before_rows_are_there",
    "flag_raised_without_release",
)
"""Mutants whose numbers are right: the shim runs one thread at a time; only ThreadSanitizer sees what orders memory."""


def numbered(name):
    """Return the number of a mutant; 0 is none."""
    return 1 + next(i for i, one in enumerate(MUTANTS) if one.name == name)


def mutate(folder):
    """Copy the sources into ``folder`` with all mutants in them; each place must be there exactly once."""
    shutil.copytree(host.SOURCES, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for number, one in enumerate(MUTANTS, 1):
        file = folder / one.file
        text = file.read_text()
        if text.count(one.old) != 1:
            raise AssertionError(f"{one.name}: {text.count(one.old)} places in {one.file} read {one.old!r}")
        file.write_text(text.replace(one.old, replacement(one, number)))
    return folder


def replacement(one, number):
    """Return the text that chooses between a bug and what it replaces; a statement may end in a comment's beginning."""
    if one.expression and one.old.endswith("?"):
        return f"(sim::mutant == {number} ? {one.new[:-1]} : {one.old[:-1]}) ?"
    if one.expression and "] = " in one.old:
        place, value = one.old.split(" = ")
        return f"{place} = sim::mutant == {number} ? {one.new.split(' = ')[1]} : {value}"
    if one.expression:
        return f"(sim::mutant == {number} ? ({one.new}) : ({one.old}))"
    code, slashes, comment = one.old.partition("//")
    return f"if (sim::mutant == {number}) {{ {one.new} }} else {{ {code.strip()} }}  {slashes}{comment}"
