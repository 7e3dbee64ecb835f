"""The page ``docs/offload.md``: two tiers, who decides what stays, and what published systems win by it here.

Names come from the code, figures from ``docs/offload.json``, which runs of experiment ``offloading`` leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..backends.offload.names import EXECUTIONS, POLICIES, PREFETCHERS
from ..results.claims import LEAST_SEEDS
from .offload_results import BASELINE, COMMAND, SYSTEMS, Figures, predictions, table

QUARTER, CAPACITIES = 0.25, (0.125, 0.25, 0.5)

INTRO = f"""\
A model whose experts do not fit into fast memory keeps a share of them there and brings the others when they are asked
for. Backend `offload` does that for any model here, suite `offload` measures it token by token, and a simulator with
the very same policy objects says beforehand what will be hit, missed and evicted.

```sh
moebench run suite=offload model=smollm2 "params.backend.offload.policy=[lru,lfru]"
moebench run suite=offload model=smollm2 "params.backend.offload.prefetch=[none,gate]" suite.feed=generated
{COMMAND}
python docs/generate.py --offload STORE
```

## Tiers, slots and reads

- **tier=disk**: experts lie in one file, each in a slab that begins at a multiple of 4 KiB and has a checksum, behind a
  safetensors header. It is written once for each set of weights, aside, synced and renamed, under
  `$MOEBENCH_CACHE/offload`. A slab that does not match its checksum, a file that changed, a disk that fails or takes
  too long end in a status, never in a number.
- **tier=host**: experts stay in RAM as they are stored, a slot holds one of them dequantized, and bringing one is
  dequantizing it. With RAM and a GPU the same code copies slabs through pinned memory; it is tested with a device that
  is played, and no speed of a GPU is stated.
- **Slots**: `capacity` is the share of all experts that has one; layers share them. `staging` more are for what passes
  through: experts that the policy does not keep, and those that were dropped while a read still goes on.
- **io=direct** reads past the page cache (O_DIRECT), so that the kernel does not hold what the budget forbids.
  **io=page_cache** reads through it: where RAM is free, the disk is then RAM, and the budget is not held. Rows of the
  two are different cases and their times are never mixed.
- `readers` threads read; what is waited for goes before what is brought ahead.

A budget is really held: tests look at the resident memory of the process from outside, with a model several times
larger than its budget.
"""

HONEST = """\
## What to know about the numbers

- **A turn is all steps, and begins anew**: an empty cache (or what the policy keeps from the start), and the prompts,
  off the clock. What a step finds depends on all steps before it, so no step is repeated alone, no call is made to warm
  up, and the first turn, by which the oracle is passed, is not sampled.
- **The oracle** is the same run with every expert at hand: the same bits, and event by event what the simulator says.
  Executions that change the result (`hobbit`, `defer`) must give the bits of the same execution with all experts in
  memory; `kl_to_exact` then says how far from the exact run they are, each by its own routing.
- **Routings are pinned** to those of the recording where a backend rounds otherwise or the result is changed: near a
  tie another expert would be chosen, and the traces would be two. Only `kl_to_exact` is of the execution's own routing.
- **Policies and prefetchers that look ahead** (`belady`, `pregate`, `oracle`) are given the recorded trace. `belady:W`
  and `pregate` stand for a model that knows its next experts, as Read-ME's pre-gating router does; here that knowledge
  takes no time. `belady` without a window is a bound on what is brought on demand, not a system; prefetching can hit
  more.
- **Gates** that are asked for the next layer's experts (`gate`) are computed on the clock, only where they are read.
- **Reader threads** run on any core of the machine, the computing thread on its own. On a machine whose cores are all
  busy, reading is hidden less.
- **Energy** is of the whole processor package (RAPL), where the kernel lets it be read; NULL elsewhere.
- **`resident_bytes`** are those of slots and staging. The rest of the model is in memory as ever. With a case of a
  backend that has all experts in memory, they are in the same process while that case is measured.
"""

METRICS: Mapping[str, str] = {
    "hit_rate": "share of requests that found their expert in a slot, brought ahead or not",
    "lru_hit_rate, belady_hit_rate": "the same of least recently used and of Belady, on the same accesses",
    "optimality": "(hit rate - LRU's) / (Belady's - LRU's): the share of the gap closed; prefetching may pass 1",
    "experts_per_step, misses_per_step, evictions_per_step": "requests of a step, those without a hit, who had to go",
    "prefetched_per_step, covered_per_step": "who was brought ahead, and who of them was asked for",
    "prefetch_precision, prefetch_recall": "share of those brought ahead that was used; of what would have been missed",
    "late_per_step": "brought ahead and asked for, but not there yet",
    "stall_per_step": "time that the computing thread waits for experts (on tier host: dequantizes, too)",
    "bytes_per_step, read_time_per_step": "bytes that came from the slow tier, and the time that readers took for them",
    "step_time": "mean time of a step; samples and percentiles are those of the timings: time per output token",
    "switch_step_time, steady_step_time": "the same of steps after a change of domain, and of all others",
    "gate_recall, gate_chance": "share of a layer's experts that the layer before it foresees; by chance",
    "by_token_misses_per_step": "misses if layers computed token by token and not expert by expert",
    "first_come_experts_per_step": "distinct experts of a step if waiting tokens were served in the order of coming",
    "kl_to_exact, agreement_with_exact, output_error": "of a changed result: nats a token, same favourite, norm",
    "resident_bytes, capacity_experts": "what is held in memory, and how many slots there are",
    "energy_per_step": "joules of the processor package",
    "predicted_step_time, predicted_stall_per_step, predicted_late_per_step": "by the two-tier model, event by event",
    "two_tier_step_time, lens_step_time, che_hit_rate": "closed form; MoE-Lens' longer stage; LRU by popularity",
    "prediction_error": "distance of predicted from measured step time over measured, in the worker that measured",
}

PREDICTED = """\
## How predictions are made

Before a case is timed, its worker measures what a step takes with every expert at hand, an expert by its number of
tokens, and bringing one through the very readers. The trace goes through the simulator, and its events through a model
of two tiers: reads one after the other on each reader, computing beside them, waiting where an expert is not there.
Nothing of the timed run is looked at. A case of evidence `model` does the same in a process of its own, and is stored
beside the measured one, never ranked with it. Che's approximation predicts the hits of an LRU from how popular experts
are, as if requests were independent: the difference to the measured hit rate is what order in time is worth.
"""


PAPERS: Mapping[str, Mapping[str, str]] = {
    "policy": {
        "lru_k": "O'Neil et al. 1993",
        "per_layer": "Mixtral-offloading, arXiv 2312.17238",
        "static": "Fiddler, arXiv 2402.07033; KTransformers, SOSP 2025",
        "cpu_moe": "llama.cpp, `--n-cpu-moe`",
        "pattern": "llama.cpp, `--override-tensor`",
        "eam": "MoE-Infinity, arXiv 2401.14361",
        "hobbit": "HOBBIT, arXiv 2411.01433",
        "belady": "Belady 1966; with a window Read-ME, arXiv 2410.19123",
    },
    "prefetch": {
        "gate": "Mixtral-offloading, arXiv 2312.17238",
        "eam": "MoE-Infinity, arXiv 2401.14361",
        "pregate": "Read-ME, arXiv 2410.19123",
    },
    "execution": {
        "fiddler": "Fiddler, arXiv 2402.07033",
        "duplex": "Duplex, arXiv 2409.01141",
        "hobbit": "HOBBIT, arXiv 2411.01433",
        "defer": "KTransformers, SOSP 2025",
    },
}
"""Where members come from that are not common knowledge."""


def offload_page(results: Mapping[str, Any] | None) -> str:
    """Return the page; None where nothing was measured yet."""
    lines = ["# Offloading experts", "", INTRO]
    lines += [*_named("Policies", "policy", POLICIES), *_named("Prefetchers", "prefetch", PREFETCHERS)]
    lines += [*_named("Executions", "execution", EXECUTIONS), "## Metrics", "", "| metric | what it is |", "|---|---|"]
    lines += [f"| {_code(names)} | {text} |" for names, text in METRICS.items()]
    lines += ["", PREDICTED, HONEST, "## Published systems, on one trace", ""]
    lines += ["Not measured yet."] if results is None else _measured(results)
    return "\n".join(lines) + "\n"


def _named(head: str, parameter: str, members: Mapping[str, str]) -> Iterator[str]:
    yield from (f"## {head}", "", f"`params.backend.offload.{parameter}=NAME` or `NAME:ARGUMENT`.", "")
    yield from ("| name | what it does | from |", "|---|---|---|")
    yield from (f"| `{name}` | {text} | {PAPERS[parameter].get(name, '-')} |" for name, text in members.items())
    yield ""


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _measured(results: Mapping[str, Any]) -> Iterator[str]:
    figures, runs = Figures(results["rows"]), results["runs"]
    about = next(iter(runs.values()))
    yield (
        f"Experiment `offloading`: {about['model']} cut into experts, {about['steps']} tokens after the prompt, one "
        f"sequence, threads={about['threads']} on {about['cpu']}, torch {about['torch']}; all cases of a seed in one "
        f"sitting, evidence `measured-cpu`. Means over {len(runs)} seeds (texts)"
        + (", with 95 % intervals by Student's t." if len(runs) >= LEAST_SEEDS else "; too few for intervals.")
    )
    yield ""
    yield from (_source(seed, run) for seed, run in runs.items())
    yield ""
    yield "Stall hidden is 1 - stall / that of `policy=lru` `prefetch=none` at the same capacity in the same sitting; a"
    yield "case that must stand off, or in whose sitting others took the processor, says so."
    yield ""
    yield from table(figures, [("every expert at hand", None, 1.0), *((name, own, QUARTER) for name, own in SYSTEMS)])
    yield from ("", "### By capacity", "")
    bound = dict(SYSTEMS)["Belady (bound on demand)"]
    entries = [("LRU", BASELINE, share) for share in CAPACITIES] + [("Belady", bound, share) for share in CAPACITIES]
    yield from table(figures, entries)
    yield from ("", "### Whole layers against experts, at equal bytes", "", LAYERS, "")
    whole = dict(SYSTEMS)["whole layers (llama.cpp)"]
    pairs = [(name, own, share) for share in CAPACITIES[1:] for name, own in (("experts", BASELINE), ("layers", whole))]
    yield from table(figures, pairs)
    yield from ("", "### Predicted beside measured", "")
    yield from predictions(figures, [(name, own, QUARTER) for name, own in SYSTEMS])
    yield from ("", "Claims of these and other systems, each with its verdict: [papers.md](papers.md).")


LAYERS = """\
Users of llama.cpp leave the experts of the first N layers in the slow tier and keep those of all others; `cpu_moe`
without a number finds the least N that fits. Slots are the same in number, so bytes are equal; a layer that does not
fit as a whole leaves its slots unused."""


def _source(seed: str, run: Mapping[str, Any]) -> str:
    changed = " with uncommitted changes" if run["uncommitted"] else ""
    return f"- Seed {seed}: run {run['run']}, commit {str(run['commit'])[:12]}{changed}."
