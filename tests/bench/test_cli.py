"""The command line as people meet it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebench.bench.cli import main

GOLDEN = Path(__file__).parent / "golden"


def run(capsys, *arguments):
    """Return (exit status, standard output, standard error) of a command in this process."""
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_plan_of_the_selftest_is_the_golden_one(capsys):
    status, out, err = run(capsys, "run", "suite=selftest", "--plan")
    assert (status, err) == (0, "")
    assert out == (GOLDEN / "plan.txt").read_text()


def test_a_plan_runs_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_STORE", str(tmp_path / "nothing"))
    run(capsys, "run", "suite=selftest", "--plan")
    assert not (tmp_path / "nothing").exists()


def test_the_shards_of_a_plan_make_the_whole(capsys):
    settings = ("run", "--plan", "suite=selftest", "axes.tokens=[16,32,64]", "axes.residency=warm")
    _, whole, _ = run(capsys, *settings)
    pieces = [run(capsys, *settings, "--shard", f"{n}/2")[1] for n in (1, 2)]

    def groups(text):
        return sorted(line.partition(": ")[2] for line in text.splitlines() if line.startswith("group "))

    assert sorted(groups(pieces[0]) + groups(pieces[1])) == groups(whole)
    assert len(groups(whole)) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "suite=selftest", "--shard", "2/1"), "--shard 2/1 does not exist"),
        (("run", "suite=selftest", "--shard", "x"), "--shard x is not understood"),
        (("run", "suite=selftest", "--shard", "2/2"), "holds no group"),
        (("run", "suite=slftest"), "unknown suite 'slftest': did you mean 'selftest'?"),
        (("list", "bakend"), "unknown plug-in kind 'bakend': did you mean 'backend'?"),
        (("report",), "holds no runs yet"),
        (("models", "fetch"), "name the model to fetch"),
        (("models", "fetch", "smolm2"), "did you mean 'smollm2'"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments, words, capsys):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert words in err
    assert err.startswith("moebench: ")
    assert err.count("\n") == 1


def test_unknown_arguments_of_other_commands_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--fast"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


def test_nothing_asked_is_answered_with_help(capsys):
    status, out, _ = run(capsys)
    assert status == 2
    assert "usage: moebench" in out


def test_an_interrupt_is_told(capsys, monkeypatch):
    from moebench.bench import run as module

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", interrupted)
    status, _, err = run(capsys, "run", "suite=selftest")
    assert status == 130
    assert "finished groups are kept" in err


def test_quiet_is_quiet(finished):
    assert (finished[2].returncode, finished[2].stdout, finished[2].stderr) == (0, "", "")


@pytest.fixture(scope="module")
def unsteady(engine, small, tmp_path_factory):
    """A case that can never be steady, and the same with --strict."""
    settings = (*small, "axes.backend=eager", "engine.steady_tolerance=0", "engine.warmup_seconds=0.001")
    store = tmp_path_factory.mktemp("strict")
    return engine(store, "run", *settings), engine(store, "run", "--strict", *settings)


def test_flags_fail_a_run_only_where_they_are_asked_to(unsteady):
    assert [result.returncode for result in unsteady] == [0, 1]
    assert all("not_steady" in result.stdout for result in unsteady)


def test_a_run_says_how_far_it_is_and_how_it_went(unsteady):
    result = unsteady[0]
    assert "[1/1]" in result.stderr
    assert "engine's own share" in result.stdout
