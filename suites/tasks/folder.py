"""Our tasks as lm-eval wants them: one YAML and one file of items each, written into the cache when they are asked for.

The folder can be given to lm-eval itself (`lm_eval --include_path FOLDER --tasks moebench_cloze`). Imports no lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path

from ...contracts import make_key
from ..models import cache_dir
from ..models.cache import make_once
from ..quality import answers
from ..text import calibration_text, evaluation_text
from . import grammar, held_out, puzzles
from .items import Item

ITEMS = 300
"""Items of every task: a share of right answers is known to 6 points then."""

SEED = 2024
"""All models and methods are asked the same."""

TASKS: dict[str, Callable[[int, int], list[Item]]] = {
    "moebench_cloze": lambda count, seed: held_out.cloze(evaluation_text(), calibration_text(), count, seed),
    "moebench_grammar": grammar.grammar,
    "moebench_arithmetic": puzzles.arithmetic,
    "moebench_copying": puzzles.copying,
    "moebench_induction": puzzles.induction,
    "moebench_recall": puzzles.recall,
    "moebench_answers": puzzles.questions,
    "moebench_bits_per_byte": lambda count, seed: held_out.pieces(evaluation_text(), calibration_text(), count, seed),
}
"""What makes the items of each task, from their number and the seed."""

TEMPLATES = {
    "moebench_bits_per_byte": "rolling.yaml",
    "moebench_grammar": "sentences.yaml",
    "moebench_answers": "answers.yaml",
}
CONTINUATION = "continuation.yaml"


def task_folder() -> Path:
    """Return the folder with all our tasks, made where the cache has it not; its name is the hash of its content."""
    made = made_items()
    templates = {name: _template(TEMPLATES.get(name, CONTINUATION)) for name in TASKS}
    judge = Path(answers.__file__).read_text(encoding="utf-8")
    folder = cache_dir() / "tasks" / make_key([made, templates, judge])[:16]

    def write(aside: Path) -> None:
        aside.mkdir()
        (aside / "answers.py").write_text(judge, encoding="utf-8")
        for name, items in made.items():
            lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
            (aside / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            values = {"task": name, "items": folder / f"{name}.jsonl", "cache": folder.parent / "datasets"}
            filled = templates[name].format(**{key: json.dumps(str(value)) for key, value in values.items()})
            (aside / f"{name}.yaml").write_text(filled, encoding="utf-8")

    return make_once(folder, write)


@cache
def made_items() -> dict[str, list[Item]]:
    """Return the items of every task, made once in a process."""
    return {name: make(ITEMS, SEED) for name, make in TASKS.items()}


def _template(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
