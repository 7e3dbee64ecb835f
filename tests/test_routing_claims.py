"""Every checkable claim about routing is tested by its number, and what released code does otherwise is an option."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from moebench.contracts import Registry
from moebench.moe.balance.registry import LOSSES

TESTS = Path(__file__).resolve().parent
CLAIM = re.compile(r"\bR\d+\b")
CLAIMS = {
    "R1": "renormalised top-k of softmax is softmax of the selected logits: 1.2e-7, the same experts",
    "R2": "AdaMoE has K n / (n + m) true experts: 2.0 and 2.2857",
    "R3": "AdaMoE's bucket ignores how null mass is split, to 1e-6; plain switch does not",
    "R4": "MoE++'s loss is least at the FFN share tau N_F / (tau N_F + N_Z): 0.3333 and 0.6",
    "R5": "MoE++'s capacities add up to gamma T, so that Eq. 8 needs K T: 1.0",
    "R6": "DeepSeek-V3's bias flattens the load: 4.38 to 1.08 in 400 updates",
    "R7": "MoE-X's erf predicts how often neurons fire: correlation 0.9955",
    "R8": "MoE-X's layer is one gated wide MLP: 7e-7",
    "R9": "BlockFFN's CLS loss is the expected union of a chunk: 0.8002 and 0.7987",
    "R10": "random token selection has no bias of position: 0 and 21.6 % to 10.0 and 11.6 %",
    "R11": "expert choice has exact loads (512), starves 1.4 % of tokens and looks ahead",
    "R12": "the product-key search is exact: error 0",
    "R13": "recall of the Tucker search: 1.0, 0.998 and 0.515 with positive scores, 0.49 with signed ones",
    "R14": "Graph of Tokens halves flips where tokens cluster well alone: .227 to .110, .188 to .184, .273 to .287",
    "R15": "DSelect-2 may have more than 2 experts: mean 2.77, at most 4 seen",
    "R16": "Read-ME's masked layer is its slices: 2.5e-7",
    "R17": "all slices of UoE, all groups of MoHD, equal experts of BAM are the dense layer: 2.7e-7, 0, 6e-8",
    "R18": "MoFME's maps may be mixed before or after: 2.5e-7",
    "R19": "SCMoE is greedy at beta = 0, weak = strong and alpha = 1",
    "R20": "MixER's least squares recover the clusters: 1.0",
    "R21": "PR-MoE has 30.5 B expert parameters where MoE-128 has 51.5 B",
    "R22": "effective experts fall with the temperature: 15.9 to 1.03",
    "R23": "the released MoFME without dropout has weights of zero: 1.5e-8",
    "R24": "the temperature's equation survives ReLU (3e-15) and no sigmoid, tanh or GELU (0.6 to 2.0)",
    "R25": "equal experts under renormalised weights are the dense FFN: 1.2e-7",
    "R26": "AoE of a model with itself halves the top probability: 0.5",
    "R27": "sorted apply is dense apply for every router: 5e-7",
    "R28": "one renormalised expert gives the router no gradient",
}
"""What is claimed, with the figure of the prototype; the docstring of a test says what is measured where it differs."""


def claims_in(folder):
    """Return the tests by the claims that their docstrings name, as {claim: [file::test]}."""
    found = {}
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for claim in set(CLAIM.findall(ast.get_docstring(node) or "")):
                    found.setdefault(claim, []).append(f"{path.name}::{node.name}")
    return found


TESTED = {claim: tests for part in ("moe", "suites") for claim, tests in claims_in(TESTS / part).items()}


@pytest.mark.parametrize("claim", CLAIMS)
def test_every_claim_is_tested_by_its_number(claim):
    assert TESTED.get(claim), f"no test in tests/moe or tests/suites says that it shows {claim}: {CLAIMS[claim]}"


def test_no_test_names_a_claim_that_is_none():
    assert set(TESTED) <= set(CLAIMS) == {f"R{number}" for number in range(1, 29)}


def test_a_number_in_a_comment_is_no_test(tmp_path):
    source = '''"""R1"""\n# R2\ndef test_a():\n    """R3 and R4."""\n\ndef helper():\n    """R5"""\n'''
    (tmp_path / "test_a.py").write_text(source)
    assert claims_in(tmp_path) == {"R3": ["test_a.py::test_a"], "R4": ["test_a.py::test_a"]}


# --- released code ---------------------------------------------------------------------------------------------------


def released_options():
    """Yield (owner, option, default, documentation) of every option that does what released code does."""
    for descriptor in Registry.load().all("routing"):
        for option in dataclasses.fields(descriptor.params):
            if option.name.startswith("released"):
                yield descriptor.params.__name__, option.name, option.default, descriptor.params.__doc__
    for loss in LOSSES.values():
        for name, option in inspect.signature(loss.function).parameters.items():
            if name.startswith("released"):
                yield loss.function.__name__, name, option.default, loss.function.__doc__


OPTIONS = list(released_options())


@pytest.mark.parametrize(
    ("owner", "option", "default", "said"), OPTIONS, ids=[f"{one}.{two}" for one, two, *_ in OPTIONS]
)
def test_what_released_code_does_is_off_documented_and_tested(owner, option, default, said):
    assert default is False
    assert f"``{option}``" in said
    sources = [path.read_text(encoding="utf-8") for path in sorted((TESTS / "moe").rglob("test_*.py"))]
    assert any(owner in text and f"{option}=" in text for text in sources)


def test_the_options_of_released_code_are_found():
    named = {(owner, option) for owner, option, *_ in OPTIONS}
    assert {("DiTMoE", "released_width"), ("MoIIE", "released_ids"), ("modality_kl", "released")} <= named
