"""The page ``docs/accuracy.md``: how answers of models are judged, our own tasks, and what rounding weights costs.

Tasks come from the code; results from a store with a run of experiment ``rounding``, and a page keeps them when the
rest is written anew.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..contracts import MoebenchError
from ..dashboards import units
from ..dashboards.data import HOSTS, Case, Run, load_cases, load_runs
from ..dashboards.query import Row, ask
from ..results.gate import Judged
from ..results.query import reading
from ..suites.tasks import grammar, held_out, puzzles
from ..suites.tasks.folder import ITEMS, TASKS, made_items
from .compare_methods import compare_methods, effect

INTRO = """\
Suite `lm_eval` asks a model with changed layers the tasks of lm-eval (`pip install 'moebench[lm-eval]'`), through
lm-eval's own `HFLM`, and keeps what it says to every item. Suite `accuracy` compares it with the dense model token by
token, for less: [measuring.md](measuring.md).

```sh
moebench run suite=lm_eval model=smollm2 "model.layers=[]"
moebench run suite=lm_eval model=smollm2 model.layers=all axes.quantization=int8
moebench run suite=lm_eval model=hf model.path=./model "suite.tasks=[arc_easy,moebench_cloze]" suite.items=100
moebench compare latest
```

- `model.layers=[]` changes no layer: the model as it is, item by item what lm-eval says of it.
- Any task of lm-eval is known by its name where the hub can be reached, groups and tags as the tasks in them; no code
  from the hub is run. Tasks that begin with `moebench_` are our own and need no network.
- A case is estimated by `--plan` and tells what is left; where it was killed, the next run goes on after the last 50
  items that passed the oracle. Requests of a task are built once for all methods of a run.
- The unit of chance is the item: intervals of tasks are bootstrapped over items, and two methods are compared on the
  same items, with McNemar's exact test for right and wrong answers and a paired block bootstrap for all else.
  `moebench compare RUN` shows that for the methods of one run, `moebench compare RUN_A RUN_B` for two runs of them.
- One request is answered at a time (`suite.batch=1`): what a model says then depends on nothing else. Larger batches
  are padded, which changes last digits; each of their sequences is routed by itself all the same.
"""

TASKS_INTRO = f"""\
Every task has {ITEMS} items, the same for all models: made from a fixed seed, or from the evaluation text, on which
nothing is calibrated and no model of ours is trained. They are ordinary tasks of lm-eval in
`$MOEBENCH_CACHE/tasks/<hash>`, for its `--include_path`. `moebench_answers` is written by the model, word by word, and
judged by exact match and by the F1 of common words, as SQuAD has them.
"""

CHOICE = """\
The tasks that a case is asked where none are named were chosen by a pilot of 60 items: SmolLM2 as it is had more right
answers than with all weights rounded to 2 bits, by .47 of the items of copying, .37 of grammar, .35 of arithmetic, .32
of induction, .27 of cloze and .22 of recall. Induction asks for what copying asks for, so cloze, the one on real text,
stands in its place. With bits per byte a model is made to read some 30 thousand tokens.
"""

RESULTS = "## What rounding weights costs"

PACKAGES = ("torch", "transformers", "lm-eval")

METRICS = (".acc", ".bits_per_byte")

INTEGERS = re.compile(r"int\d")
"""Quantizations whose name is their width."""


def accuracy_page(results: str) -> str:
    """Return the page, with the section of results as ``results_of`` or ``results_in`` give it."""
    head = "| task | what is asked | an item, the right answer first |"
    lines = ["# Accuracy on tasks", "", INTRO, "## Our own tasks", "", TASKS_INTRO, head, "|---|---|---|"]
    return "\n".join([*lines, *map(_task, TASKS), "", CHOICE, RESULTS, "", results.strip()]) + "\n"


def _task(name: str) -> str:
    makers = {"moebench_cloze": held_out.cloze, "moebench_bits_per_byte": held_out.pieces, **_seeded()}
    what = inspect.cleandoc(makers[name].__doc__ or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`")
    return f"| `{name}` | {what} | {_example(name)} |"


def _seeded() -> dict[str, object]:
    made = (puzzles.arithmetic, puzzles.copying, puzzles.induction, puzzles.recall, grammar.grammar)
    return {**{f"moebench_{maker.__name__}": maker for maker in made}, "moebench_answers": puzzles.questions}


def _example(name: str) -> str:
    # of seeded tasks alone: the text differs between versions of Python
    item = made_items()[name][0]
    if "text" in item or name == "moebench_cloze":
        return "-"
    if "answers" in item:
        return f"{json.dumps(item['context'])} {json.dumps(item['answers'][0])}"
    right, wrong = item["options"][item["right"]], item["options"][1 - item["right"]]
    return (
        f"{json.dumps(item['context'])} {json.dumps(right)}, {json.dumps(wrong)}"
        if item["context"]
        else f"{right} / {wrong}"
    )


def results_in(page: str) -> str:
    """Return the results that a written page shows."""
    return page.partition(RESULTS)[2].strip() or "Not measured yet."


def results_of(store: Path) -> str:
    """Return the results of the latest run of suite ``lm_eval`` that has the model as it is and quantized ones."""
    with reading(store) as connection:
        for run in load_runs(connection):
            cases = [
                case for case in load_cases(connection, run.run_id)[0] if case.row["suite"] == "lm_eval" and case.ok
            ]
            base = next((case for case in cases if not case.row["layers"]), None)
            others = [case for case in cases if case is not base]
            if base is None or not others or not all(INTEGERS.fullmatch(case.row["quantization"]) for case in others):
                continue
            found = (one.judged for one in compare_methods(connection, run.run_id) if one.base.key == base.key)
            judged = next(found, ())
            if {one.case_key for one in judged} != {case.key for case in others}:
                continue
            host = next(iter(ask(connection, HOSTS, run_id=run.run_id).rows), {})
            cases = sorted(cases, key=lambda case: (case is not base, -_bits(case)))
            return "\n".join([_about(run, cases, str(host.get("cpu"))), "", *_tables(cases, judged)])
    raise MoebenchError("the store has no run of it; run `moebench run experiment=rounding` first.")


def _bits(case: Case) -> float:
    return float(str(case.row["quantization"]).removeprefix("int").replace("none", "16"))


def _about(run: Run, cases: Sequence[Case], cpu: str) -> str:
    row = cases[-1].row
    seconds = ", ".join(f"{_name(case)} {float(case.row['elapsed_s']):.0f} s" for case in cases)
    tokens = next(metric["value"] for metric in cases[0].metrics if metric["name"] == "tokens_read")
    versions = ", ".join(f"{name} {run.packages[name]}" for name in PACKAGES if name in run.packages)
    return (
        f"`moebench run experiment=rounding`: {row['model']}, structure `{row['structure']}` in all layers with all "
        f"experts active, weights rounded to nearest in groups of 64, {row['dtype']} around them. *As it is*: nothing "
        f"was done to the model; its file is in 4 bits already (Q4_1). Each was made to read {tokens:.0f} tokens "
        f"({seconds}), with threads={row['threads']} on {cpu}. {versions}, commit "
        f"{str(run.row['git_sha'] or 'unknown')[:12]}, run {run.run_id}."
    )


def _name(case: Case) -> str:
    return str(case.row["quantization"]) if case.row["layers"] else "as it is"


def _tables(cases: Sequence[Case], judged: Sequence[Judged]) -> Iterator[str]:
    names = [metric["name"] for metric in cases[0].metrics if str(metric["name"]).endswith(METRICS)]
    yield "| task | items | chance | " + " | ".join(map(_name, cases)) + " |"
    yield "|---|---|---|" + "---|" * len(cases)
    for name in names:
        of_case = [{metric["name"]: metric for metric in case.metrics} for case in cases]
        task, _, kind = str(name).rpartition(".")
        chance = of_case[0].get(f"{task}.chance")
        shown = units.DASH if chance is None else f"{chance['value']:.2f}"
        row = " | ".join(_value(of_one[name]) for of_one in of_case)
        yield f"| `{task}`, {kind} | {of_case[0][name]['n']} | {shown} | {row} |"
    yield ""
    yield "Differences to the model as it is, on the same items; p is McNemar's, exact, of right and wrong answers:"
    yield ""
    yield "| task | " + " | ".join(map(_name, cases[1:])) + " |"
    yield "|---|" + "---|" * (len(cases) - 1)
    by_case = {(one.case_key, one.metric): one for one in judged}
    for name in names:
        task, _, kind = str(name).rpartition(".")
        found = [by_case[case.key, f"{kind} ({task})"] for case in cases[1:]]
        yield f"| `{task}`, {kind} | " + " | ".join(map(_difference, found)) + " |"


def _value(metric: Row) -> str:
    interval = "" if metric["lo"] is None else f" [{metric['lo']:.3f}, {metric['hi']:.3f}]"
    return f"{metric['value']:.3f}{interval}"


def _difference(one: Judged) -> str:
    difference, p = effect(one)
    return difference if one.p is None else f"{difference}, p = {p}"
