"""Our tasks: the same from the same seed, right where they say so, and no easier than they look."""

from __future__ import annotations

import json
import re

import pytest

from moebench.contracts import MoebenchError
from moebench.suites.tasks import grammar, held_out, puzzles
from moebench.suites.tasks.folder import ITEMS, TASKS, task_folder
from moebench.suites.tasks.items import different, two_options
from moebench.suites.text import calibration_text, evaluation_text

OPTIONS = [name for name in TASKS if name not in ("moebench_bits_per_byte", "moebench_answers")]


def answers(items):
    """(context, right, wrong) of each item."""
    return [(one["context"], one["options"][one["right"]], one["options"][1 - one["right"]]) for one in items]


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_decides_all_items_and_no_two_are_alike(name):
    items = TASKS[name](40, 7)
    assert items == TASKS[name](40, 7)
    assert items != TASKS[name](40, 8)
    assert len({json.dumps(item, sort_keys=True) for item in items}) == 40


@pytest.mark.parametrize("name", OPTIONS)
def test_the_right_option_stands_in_either_place_alike(name):
    items = TASKS[name](ITEMS, 1)
    assert 0.4 < sum(item["right"] for item in items) / ITEMS < 0.6
    assert all(len(set(item["options"])) == 2 for item in items)


def test_items_that_cannot_be_found_are_told():
    with pytest.raises(MoebenchError, match="only 1 different items were found where 2 are wanted"):
        different(2, lambda: {"context": "a", "options": ["b", "c"], "right": 0})


def test_the_order_of_options_makes_no_new_item():
    class Chance:
        def __init__(self):
            self.place = 0

        def randrange(self, _):
            self.place = 1 - self.place
            return self.place

    rng = Chance()
    with pytest.raises(MoebenchError, match="only 1"):
        different(2, lambda: two_options("a", "b", "c", rng))


def test_sums_are_right_and_wrong_ones_are_not():
    for context, right, wrong in answers(puzzles.arithmetic(100, 0)):
        *shown, question = context.splitlines()
        for line in [*shown, question + right]:
            left, _, result = line.partition(" = ")
            assert eval(left) == int(result)
        assert eval(question.rstrip(" =")) != int(wrong)
        assert len(right) == len(wrong)


def test_copied_words_continue_the_list_and_wrong_ones_are_of_it():
    for context, right, wrong in answers(puzzles.copying(100, 0)):
        words = context.split()
        whole, again = words[:6], words[6:]
        assert whole[: len(again) + 1] == [*again, right.strip()]
        assert wrong.strip() in whole
        assert words[-1] != wrong.strip()


def test_induction_asks_for_what_followed():
    for context, right, wrong in answers(puzzles.induction(100, 0)):
        *words, asked = context.split()
        assert words[words.index(asked) + 1] == right.strip()
        assert wrong.strip() in words
        assert wrong.strip() != asked


def test_recall_asks_for_the_thing_of_the_one_that_is_named():
    for context, right, wrong in answers(puzzles.recall(100, 0)):
        told = dict(re.findall(r"(\w+) has the (\w+)\.", context))
        asked = context.split()[-3]
        assert told[asked] == right.strip()
        assert wrong.strip() in set(told.values()) - {told[asked]}


def test_questions_are_about_another_one_than_the_example():
    for item in puzzles.questions(100, 0):
        told = dict(re.findall(r"(\w+) has the (\w+)\.", item["context"]))
        shown, asked = re.findall(r"What does (\w+) have", item["context"])
        assert shown != asked
        assert f"Answer: the {told[shown]}\n" in item["context"]
        assert item["answers"] == [f"the {told[asked]}"]


def test_pairs_differ_in_what_their_paradigm_is_about():
    items = grammar.grammar(ITEMS, 3)
    assert all(item["context"] == "" for item in items)
    pairs = [(right, wrong) for _, right, wrong in answers(items)]
    split = [(set(right.split()), set(wrong.split())) for right, wrong in pairs]
    words = [(right - wrong, wrong - right) for right, wrong in split]
    assert all(len(more) <= 2 and len(less) <= 2 for more, less in words)
    assert not {right for right, _ in pairs} & {wrong for _, wrong in pairs}


def test_the_parts_of_grammar_are_equal():
    right = [right for _, right, _ in answers(grammar.grammar(80, 5))]
    marks = (" ever ", r"\?", "sel", " near the [a-z]+ (is|are) ")
    assert [sum(bool(re.search(mark, sentence)) for sentence in right) for mark in marks] == [10, 10, 10, 10]


def test_cloze_asks_for_the_word_of_the_held_out_text_and_for_no_other():
    whole = " ".join(evaluation_text().content.split())
    other = " ".join(calibration_text().content.split())
    items = answers(held_out.cloze(evaluation_text(), calibration_text(), 60, 0))
    assert all(context + right in whole for context, right, _ in items)
    assert sum(context in other for context, _, _ in items) == 0
    assert sum(context + wrong in whole for context, _, wrong in items) <= 3


def test_pieces_are_of_the_held_out_text():
    whole = " ".join(evaluation_text().content.split())
    pieces = [item["text"] for item in held_out.pieces(evaluation_text(), calibration_text(), 60, 0)]
    assert all(held_out.PIECE <= len(piece) < 2 * held_out.PIECE for piece in pieces)
    other = " ".join(calibration_text().content.split())
    assert not any(piece in other for piece in pieces)
    assert sum(piece in whole for piece in pieces) > 40  # code between two sentences is left out


def test_the_folder_holds_every_task_as_lm_eval_wants_it(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))
    folder = task_folder()
    assert folder == task_folder()
    for name in TASKS:
        assert len((folder / f"{name}.jsonl").read_text().splitlines()) == ITEMS
        text = (folder / f"{name}.yaml").read_text()
        assert f'task: "{name}"' in text
        assert str(folder / f"{name}.jsonl") in text
