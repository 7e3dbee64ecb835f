"""Write docs/gate-selftest.md from the calls that ``collect.py`` made: what was reached, whatever it is.

    python tests/gate_selftest/report.py --folder FOLDER

Keeps the records under docs/gate-selftest/ first; without ``--folder`` the page is made from what is kept there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from records import KEPT, Calls, keep, load_calls, load_turns
from simulate import discoveries, regressed_share

from moebench.results.parts import write_json_atomic
from moebench.results.statistics import Interval, clustered_proportion
from moebench.results.verdict import Verdict

PAGE = KEPT.with_suffix(".md")

POOLS = {"idle": ("idle",), "busy": ("busy",), "load that comes and goes": ("idle", "busy")}
BUDGETS = {10: (5, 1), 30: (15, 3)}
"""Process pairs at most and looks, by the seconds that a case may take."""

EFFECTS = (0.0, 0.02, 0.05, 0.10)
TRIALS = 200


def share(calls: Sequence[dict[str, Any]], wanted: Verdict) -> Interval:
    """Return the share of verdicts that are ``wanted``, with the interval for verdicts clustered by call."""
    said = [[one["verdict"] for one in call["judged"]] for call in calls]
    return clustered_proportion([verdicts.count(wanted) for verdicts in said], [len(verdicts) for verdicts in said])


def naive_share(calls: Sequence[dict[str, Any]], rule: str) -> Interval:
    """Return the share of cases that another tool's rule calls slower."""
    asked = [call["naive"][rule] for call in calls if call["naive"][rule]]
    return clustered_proportion([sum(one) for one in asked], [len(one) for one in asked])


def shown(interval: Interval) -> str:
    """Return a share with its interval in per cent."""
    if interval.value is None or interval.lo is None or interval.hi is None:
        return "-"
    return f"{interval.value:.1%} [{interval.lo:.1%}, {interval.hi:.1%}] of {interval.n}"


def measured_lines(calls: Calls) -> Iterator[str]:
    """Yield the table of what was really called."""
    yield "| injected, load | calls | gate: regressed | no slow-down of 5 % | inconclusive | `mean:5%` | asv | call |"
    yield "|---|--:|---|--:|--:|---|---|--:|"
    for (percent, load), found in calls.items():
        if not found:
            continue
        said = [one["verdict"] for call in found for one in call["judged"]]
        fine = said.count(Verdict.EQUIVALENT) + said.count(Verdict.IMPROVED)
        shares = [f"{count / len(said):.1%}" for count in (fine, said.count(Verdict.INCONCLUSIVE))]
        naive = [shown(naive_share(found, rule)) for rule in ("mean", "asv")]
        seconds = float(np.median([call["seconds"] for call in found]))
        hit = sum(any(one["verdict"] == Verdict.REGRESSED for one in call["judged"]) for call in found)
        regressed = f"{shown(share(found, Verdict.REGRESSED))}, in {hit} calls"
        cells = [f"+{percent} %, {load}", str(len(found)), regressed, *shares, *naive]
        yield f"| {' | '.join(cells)} | {seconds:.0f} s |"


def noise_lines(calls: Calls) -> Iterator[str]:
    """Yield what the gate said of the machine in each cell."""
    yield "| injected, load | tau measured (median, largest) | detectable at 80 % power (median) | too noisy |"
    yield "|---|---|--:|--:|"
    for (percent, load), found in calls.items():
        noises = [call["noise"] for call in found if call["noise"]]
        if not noises:
            continue
        tau = [noise["measured"] for noise in noises]
        detectable = float(np.median([noise["detectable"] for noise in noises]))
        refused = sum(noise["detectable"] > noise["asked"] for noise in noises)
        cells = [f"{np.median(tau):.2%}, {max(tau):.2%}", f"{detectable:.1%}", f"{refused} of {len(noises)} calls"]
        yield f"| +{percent} %, {load} | {' | '.join(cells)} |"


def simulated(task: tuple[str, int]) -> dict[str, Any]:
    """Return the rates of a pool of turns at a budget."""
    pool, seconds = task
    turns = load_turns(KEPT, POOLS[pool])
    pairs, looks = BUDGETS[seconds]
    fdr, power = discoveries(turns, pairs, looks, TRIALS)
    return {
        "pool": pool,
        "recorded_pairs": len(turns),
        "seconds": seconds,
        "regressed": [regressed_share(turns, pairs, looks, effect, TRIALS) for effect in EFFECTS],
        "fdr": fdr,
        "power": power,
    }


def simulated_lines(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what simulation from recorded turns says."""
    heads = [f"+{effect:.0%}".replace("%", " %") for effect in EFFECTS]
    yield f"| turns of | case | regressed at {' | '.join(heads)} | 60 cases: false discovery rate | power |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for one in found:
        shares = [f"{value:.1%}" for value in one["regressed"]]
        shares += [f"{mean:.1%} ± {error:.1%}" for mean, error in (one["fdr"], one["power"])]
        yield f"| {one['pool']} ({one['recorded_pairs']} pairs) | {one['seconds']} s | {' | '.join(shares)} |"


def page(kept: Path) -> str:
    """Return the page; ``notes.md`` says what else happened while the records were taken."""
    calls, facts = load_calls(kept), json.loads((kept / "host.json").read_text())
    host = facts["stable"]
    lines = [
        "<!-- generated by `nox -s gate_selftest`; do not edit -->",
        "# Self-test of the gate",
        "",
        "A plain torch MoE layer is judged against itself, with real work injected into the candidate or none. A call",
        "judges 8 cases; all turns of a case may take 10 s, over 5 fresh process pairs. Busy means one process that",
        "multiplies matrices beside it. Records: `docs/gate-selftest/`.",
        "",
        f"Host: {host['cpu']}, {host['cores']} cores, {', '.join(host['isa'])}.",
        "",
        "## Called",
        "",
        *measured_lines(calls),
        "",
        *(kept / "notes.md").read_text(encoding="utf-8").splitlines(),
        "",
        "`mean:5%` is pytest-benchmark's rule, asv the one of `asv compare` (factor 1.1, Mann-Whitney p < 0.002); both",
        "got one launch of each side, one after the other, 1 s per case, right after every second call under the same",
        "load. Intervals are exact (Clopper-Pearson), on as many verdicts as those that come 8 to a call are worth;",
        "where none or all agree that cannot be seen, and the number of calls with a `regressed` is the strict count.",
        "The last column is the median wall time of a call.",
        "",
        *noise_lines(calls),
        "",
        "## Simulated from recorded turns",
        "",
        "Process pairs of all calls without injected work, drawn with replacement, with random sign; the effect is",
        f"added. The rule was fixed before they were taken. {TRIALS} calls a figure: 8 cases of the same effect, or 60",
        "cases of which 4 are 5 % slower. A case of 10 s has 5 process pairs, one of 30 s up to 15 with 3 looks; ± is",
        "the Monte-Carlo standard error.",
        "",
        *simulated_lines(json.loads((kept / "simulated.json").read_text())),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Keep the records of a folder, simulate from them, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.folder is not None:
        keep(options.folder, KEPT)
        with ProcessPoolExecutor() as pool:
            found = list(pool.map(simulated, [(name, seconds) for name in POOLS for seconds in BUDGETS]))
        write_json_atomic(KEPT / "simulated.json", found)
    PAGE.write_text(page(KEPT), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
