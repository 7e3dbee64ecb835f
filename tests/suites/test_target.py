"""Suite ``target``: what is missing on a side, and what is broken there."""

import sys

import pytest

from moebench.bench.gate.cases import target_case
from moebench.contracts import MoebenchError
from moebench.suites.target import TargetSuite


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose second module imports what nobody has."""
    folder = tmp_path / "sidepackage"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "good.py").write_text("def make(): return lambda: 1\n")
    (folder / "bad.py").write_text("import sidepackage.gone\ndef make(): return lambda: 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("sidepackage")]:
        del sys.modules[name]


def prepare(target):
    return TargetSuite().prepare(target_case(target), None)


def test_a_target_that_is_there(package):
    assert prepare("sidepackage.good:make").run(0) == 1


@pytest.mark.parametrize("target", ["sidepackage.none:make", "nopackage.x:make", "sidepackage.good:other"])
def test_a_target_that_is_not_there_is_unknown(package, target):
    with pytest.raises(MoebenchError, match=r"^unknown "):
        prepare(target)


def test_a_target_that_misses_something_itself_is_broken(package):
    with pytest.raises(ModuleNotFoundError, match="gone"):
        prepare("sidepackage.bad:make")
