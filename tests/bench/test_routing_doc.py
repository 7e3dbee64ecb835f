"""The page of the routings: every descriptor with its words, defaults and needs, and costs of a real run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from moebench.bench.claims_in_tests import claims_in_tests
from moebench.bench.routing_doc import Costs, costs_in, costs_of, defaults, needs, routing_page, words
from moebench.contracts import Descriptor, MoebenchError, Registry

ROUTINGS = Registry.load().all("routing")
TESTS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Told:
    """A Scheme (Somebody et al. 2020, arXiv 2001.01234): p = softmax(z | x), as in Eq. 8 of it. The code does
    other than that.

    And ``more`` of it.
    """

    k: int = 2
    score: str = "one"


@dataclass(frozen=True)
class Untold:
    k: int = 2


def test_words_come_from_the_docstring():
    said = words(Descriptor("routing", "told", "a scheme", "nowhere:build", Told))
    assert said.paper == "Somebody et al. 2020, arXiv 2001.01234"
    assert said.rule == "p = softmax(z | x), as in Eq. 8 of it"
    assert said.rest == "The code does other than that.\n\nAnd `more` of it."


def test_a_class_without_words_or_no_class_says_nothing():
    for params in (Untold, None):
        said = words(Descriptor("routing", "untold", "a scheme", "nowhere:build", params))
        assert (said.paper, said.rule, said.rest) == ("", "", "")


def test_defaults_are_shown_as_they_are_set():
    assert defaults(Descriptor("routing", "told", "", "nowhere:build", Told)) == '`k=2`, `score="one"`'


@pytest.mark.parametrize("descriptor", ROUTINGS, ids=lambda descriptor: descriptor.name)
def test_every_routing_has_a_rule_and_can_say_what_it_needs(descriptor):
    assert words(descriptor).rule
    assert isinstance(needs(descriptor), str)


def test_the_page_keeps_costs_and_has_a_row_for_every_routing():
    costs = Costs("in one sitting.", {"topk": "1 (80 µs)", "switch": "1.02 [1.01, 1.03]"})
    page = routing_page(ROUTINGS, costs, TESTS)
    assert costs_in(page) == costs
    assert routing_page(ROUTINGS, costs_in(page), TESTS) == page
    for descriptor in ROUTINGS:
        assert page.count(f"\n| `{descriptor.name}`") == 1
    assert costs_in(routing_page(ROUTINGS, Costs(), TESTS)) == Costs()
    assert costs_in("") == Costs()


FAMILY_TEST = """
@pytest.mark.parametrize("params", [SimilarityAware(k=2)])
def test_one(params):
    '''R14, R2 and R14; not R29, XR3 or R.'''

def test_all():
    '''R7 of the whole family.'''

def helper():
    '''R9 is no test.'''
"""
OTHER_TEST = """
def test_mixtral_is_itself():
    '''R1.'''

def test_by_name():
    '''R6.'''
    build("deepseek_v3")

def test_about_nobody():
    '''R3.'''
"""


def test_claims_belong_to_the_routings_that_a_test_names(tmp_path):
    folder = tmp_path / "moe" / "routers"
    folder.mkdir(parents=True)
    (folder / "test_graph.py").write_text(FAMILY_TEST)
    (tmp_path / "moe" / "test_routers.py").write_text(OTHER_TEST)
    claims = {name: numbers for name, numbers in claims_in_tests(tmp_path, ROUTINGS).items() if numbers}
    assert claims == {
        "got_similarity": ["R2", "R7", "R14"],
        "got_attention": ["R7"],
        "mixtral": ["R1"],
        "deepseek_v3": ["R6"],
    }


def test_claims_on_real_weights_are_linked():
    page = routing_page(ROUTINGS, Costs(), TESTS)
    (row,) = [line for line in page.splitlines() if line.startswith("| `moepp`")]
    assert "[moepp-balance](papers.md#moepp-balance)" in row


def test_costs_are_ratios_within_one_sitting(engine, tmp_path):
    settings = ("model=tiny", "model.experts=16", "suite.phases=[route]", "axes.tokens=32", "engine.seconds=0.02")
    done = engine(tmp_path, "run", "--quiet", "suite=routing", "axes.routing=[switch,topk]", *settings)
    assert done.returncode == 0, done.stderr
    costs = costs_of(tmp_path)
    assert "model tiny, 32 tokens" in costs.about
    assert costs.ratios.keys() == {"topk", "switch"}
    assert costs.ratios["topk"].startswith("1 (")
    assert float(costs.ratios["switch"].split()[0].rstrip(",")) > 0
    assert costs_in(routing_page(ROUTINGS, costs, TESTS)) == costs


def test_a_store_without_the_suite_is_told(finished):
    with pytest.raises(MoebenchError, match="suite=routing"):
        costs_of(finished[0])
