"""``moebench trace`` as people meet it: what it prints, what it refuses, and a model of the user's own."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moebench.backends.offload.access import Access, Layout
from moebench.bench.cli import main
from moebench.bench.run import planned
from moebench.contracts import Registry, load_file
from moebench.suites.trace import facts_of, save_trace, sha256_of_file
from moebench.suites.traces.figures import guesses, hit_rates, popularity, reuse
from moebench.suites.traces.files import hints_file, read_trace, write_trace

GOLDEN = Path(__file__).parent / "golden" / "trace.txt"


@pytest.fixture(autouse=True)
def _here(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def run(capsys, *arguments):
    """Return (exit status, standard output, standard error) of a command in this process."""
    status = main(["trace", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# --- figures, by hand ------------------------------------------------------------------------------------------------


def accesses(*asked, layers=1, hints=()):
    """Accesses of one token: the sets of experts that the layers ask for in turn."""
    told = dict(hints)
    return [
        Access(
            place // layers, place % layers, experts, (1,) * len(experts), (1.0,) * len(experts), told.get(place, ())
        )
        for place, experts in enumerate(asked)
    ]


def test_popularity_by_hand():
    found = popularity(accesses((0, 1), (0, 2), (0, 1), (0, 3)), Layout((0,), 4))
    assert (found.requests, found.asked, found.busiest, found.busiest_share) == (8, 4, 1, 0.5)
    assert found.entropy == (0.5 * 1 + 0.25 * 2 + 2 * 0.125 * 3) / 2


def test_equal_load_has_all_the_entropy():
    assert popularity(accesses((0,), (1,), (2,), (3,)), Layout((0,), 4)).entropy == 1.0
    assert popularity(accesses((0,), (0,)), Layout((0,), 4)).entropy == 0.0


def test_reuse_by_hand():
    found = reuse(accesses((0, 1), (0, 2), (1, 2)))
    assert found.kept == 0.5
    assert found.first == 3 / 6
    assert found.distances == (1, 1, 2)  # 0 after 1; 1 after 0 and 2; 2 after 1
    assert (found.quantile(0.5), found.quantile(0.99)) == (1, 2)
    once = reuse(accesses((0, 1)))
    assert (once.kept, once.distances, once.quantile(0.5)) == (None, (), None)


@pytest.mark.parametrize("slots", range(1, 9))
def test_reuse_distances_tell_what_an_lru_hits(slots):
    """Mattson's stack: of single requests an LRU hits those whose distance is less than its slots."""
    trace = accesses(*[((place * place + place // 3) % 8,) for place in range(200)])
    found = reuse(trace)
    hits = sum(distance < slots for distance in found.distances)
    assert hit_rates(trace, Layout((0,), 8), slots).lru == hits / 200


def test_nobody_beats_belady_here():
    trace = accesses(*[(place % 5,) for place in range(100)])
    found = hit_rates(trace, Layout((0,), 5), 4)
    assert found.lru == 0.0  # a loop that is one longer than the cache
    assert found.belady > 0.7


def test_guesses_by_hand():
    hints = {0: (((1, 4), 0.5), ((1, 5), 0.25)), 2: (((1, 7), 1.0),)}
    found = guesses(accesses((0,), (4, 6), (0,), (7,), (0,), (3,), layers=2, hints=hints.items()))
    assert (found.recall, found.precision, found.accesses) == (2 / 3, 2 / 3, 2)
    assert guesses(accesses((0,), (1,))) is None


# --- what is printed -------------------------------------------------------------------------------------------------


def written(path="a.parquet"):
    """A trace of two layers with hints: a prompt of three tokens and two steps after it."""
    asked = {(0, 1): [(0, 1), (1, 2), (1, 5)], (0, 3): [(0, 2), (2, 3), (2, 4)]}
    asked |= {(1, 1): [(1, 2)], (1, 3): [(2, 6)], (2, 1): [(1, 3)], (2, 3): [(2, 4)]}
    rows = [
        (step, layer, token, expert, 0.5, len(tokens))
        for (step, layer), tokens in asked.items()
        for token, experts in enumerate(tokens)
        for expert in experts
    ]
    columns = dict(zip(("step", "layer", "token", "expert", "weight", "tokens"), zip(*rows, strict=True), strict=True))
    expected = {"step": [0, 0, 1, 2], "layer": [3] * 4, "token": [0] * 4, "expert": [2, 5, 2, 4], "weight": [1.0] * 4}
    choice = {"name": "none"}
    facts = {"made": "recorded", "mode": "greedy", "model": {"name": "mine"}, "structure": {"name": "split"}}
    return write_trace(
        path, columns, {**facts, "experts": 8, "routing": {"name": "topk"}, "quantization": choice}, expected
    )


def test_an_inspection_is_the_golden_one(capsys):
    sha256 = written()
    status, out, err = run(capsys, "inspect", "a.parquet", "--capacity", "0.25", "--capacity", "0.5")
    assert (status, err) == (0, "")
    assert out.replace(sha256, "SHA256") == GOLDEN.read_text()


def test_a_trace_without_facts_and_hints_says_less(capsys):
    path = "b.jsonl"
    save_trace(path, {"step": [0, 0], "layer": [0, 0], "token": [0, 0], "expert": [0, 2], "weight": [0.5, 0.5]})
    status, out, _ = run(capsys, "inspect", path)
    labels = [line[:32].strip() for line in out.splitlines()]
    assert status == 0
    assert "hits at 0.25 (0 experts)" in labels
    assert not {"made", "hints", "kept from the step before", "experts between two requests"} & set(labels)
    assert sha256_of_file(path) in out


def test_the_replay_line_can_be_planned(capsys):
    for path, make in (("a.parquet", written), ("b.parquet", lambda path: uniform(capsys, path))):
        make(path)
        out = run(capsys, "inspect", path)[1]
        words = shlex.split(out.splitlines()[-1])
        assert words[:2] == ["moebench", "run"]
        plan, _ = planned(words[2:], Registry.load())
        assert plan.cases, plan.refused[0].refusal
        fit = plan.cases[0].traffic.params["fit"]
        assert fit == ("projected" if path == "a.parquet" else "exact")


@pytest.mark.parametrize(
    "facts",
    [
        {"made": "recorded"},
        {"made": "recorded", "model": 3},
        {"made": "recorded", "model": {}, "routing": "x"},
        {"made": "x", "parameters": [1]},
        {"made": "\x1b[31mred\nsha256 fake"},
    ],
)
def test_facts_of_others_break_nothing(facts, capsys):
    save_trace("f.parquet", {"step": [0], "layer": [0], "token": [0], "expert": [2], "weight": [0.5]}, facts)
    status, out, err = run(capsys, "inspect", "f.parquet")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert sum(line.startswith("sha256") for line in out.splitlines()) == 1


def test_hints_that_a_trace_of_ours_does_not_name_are_not_its_own():
    written("a.parquet")
    hints_file("a.parquet").rename("h.parquet")
    columns = {"step": [0, 1, 2], "layer": [1] * 3, "token": [0] * 3, "expert": [1] * 3, "weight": [1] * 3}
    write_trace("a.parquet", columns, {"made": "made up: zipf"})
    Path("h.parquet").rename(hints_file("a.parquet"))  # as if the process had ended between the two files
    assert read_trace("a.parquet").hints is None


def uniform(capsys, path):
    small = ("steps=8", "layers=2", "experts=8", "k=2")
    return run(capsys, "synthesize", "zipf", *small, "-o", path, "alpha=0")


def test_made_up_traces_are_made_the_same_again(capsys):
    assert uniform(capsys, "a.parquet")[0] == 0
    assert uniform(capsys, "b.parquet")[0] == 0
    assert Path("a.parquet").read_bytes() == Path("b.parquet").read_bytes()
    assert facts_of("a.parquet")["parameters"]["alpha"] == 0
    domains = ("domains", "steps=9", "layers=1", "experts=8", "k=1", "period=3", "disjoint=true", "share=1")
    assert run(capsys, "synthesize", *domains, "-o", "c.parquet")[0] == 0
    assert len(set(facts_of("c.parquet")["tasks"])) > 1


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("record", "tny-olmoe", "-o", "n.parquet"), "did you mean 'tiny-olmoe'"),
        (("record", "tiny", "-o", "n.parquet"), "model 'tiny' has no language model with a tokenizer"),
        (("record", "hf", "-o", "n.parquet"), "model 'hf' needs a folder or a name of the hub"),
        (
            ("record", "hf", "model.path=owner/name", "-o", "n.parquet"),
            "moebench models fetch hf model.path=owner/name",
        ),
        (("record", "tiny-olmoe", "-o", "n.csv"), "end it in .parquet"),
        (("record", "tiny-olmoe", "-o", "there.parquet"), "there.parquet is there already"),
        (("record", "tiny-olmoe", "-o", "no/n.parquet"), "no is no folder"),
        (("record", "tiny-olmoe", "-o", "n.parquet", "--tokens", "0"), "--tokens 0 records nothing"),
        (("record", "tiny-olmoe", "-o", "n.parquet", "--text", "none.txt"), "none.txt cannot be read"),
        (("record", "tiny-olmoe", "-o", "n.parquet", "--text", "there.parquet"), "it is no UTF-8 text"),
        (("record", "tiny-olmoe", "-o", "n.parquet", "--fast"), "unknown option '--fast'"),
        (("record", "tiny-olmoe", "-o", "n.parquet", "axes.sparsity=teal"), "leave out axes.sparsity"),
        (("record", "tiny-olmoe", "-o", "n.parquet", "axes.routing=[topk,adamoe]"), "describe 2 methods"),
        (("record", "tiny-olmoe", "-o", "n.parquet", "axes.routing=expert_choice"), "looks at later tokens"),
        (("synthesize", "zipf", "-o", "n.parquet", "alpha=much"), "'alpha' must be of type float"),
        (("synthesize", "zipf", "-o", "n.parquet", "alfa=1"), "did you mean 'alpha'?"),
        (("synthesize", "zipf", "-o", "n.parquet", "alpha"), "write it as steps=512"),
        (("synthesize", "zipf", "-o", "n.parquet", "experts=3000000000", "k=1", "steps=1"), "choose fewer experts"),
        (("synthesize", "sticky", "-o", "n.parquet", "k=40"), "at least twice k=40"),
        (("synthesize", "zipf", "-o", "there.parquet"), "there.parquet is there already"),
        (("inspect", "none.parquet"), "none.parquet' cannot be read"),
        (("inspect", "there.parquet"), "cannot be parsed"),
        (("inspect", "there.parquet", "steps=3"), "leave it out"),
        (("inspect", "there.parquet", "--capacity", "1.5"), "--capacity 1.5 is no share"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments, words, capsys):
    Path("there.parquet").write_bytes(b"\xff\xfe\x00not a trace")
    status, out, err = run(capsys, *arguments)
    assert status == 2, out
    assert words in err
    assert err.startswith("moebench: ")
    assert err.count("\n") == 1
    assert [file.name for file in Path.cwd().iterdir()] == ["there.parquet"]


# --- a model of the user's own ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as transformers writes it: a tiny Mixtral with a tokenizer of bytes."""
    pytest.importorskip("transformers")
    from moebench.suites.models.tiny_hub import byte_tokenizer

    target = tmp_path_factory.mktemp("mine")
    models = load_file(Path(__file__).parent.parent / "tiny_models.py")
    models.build("Mixtral", vocab_size=256).save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    return target


def test_a_models_own_folder_is_recorded(folder, capfd):
    settings = ["trace", "record", "hf", "-o", "mine.parquet", f"model.path={folder}", "--tokens", "5"]
    assert main([*settings, "--prompt", "Once upon a time"]) == 0
    out, err = capfd.readouterr()
    assert "recorded 5 of 5 steps" in err
    assert "recorded from hf, generating" in out
    found = read_trace("mine.parquet")
    assert (found.trace.steps, found.trace.layers, found.layout.experts) == (6, (0, 1), 8)
    assert [found.trace.at(step, 0).tokens for step in range(6)] == [16, 1, 1, 1, 1, 1]
    assert found.hints is not None
    assert facts_of("mine.parquet")["model"]["params"]["path"] == str(folder)
    before = sha256_of_file("mine.parquet")
    assert main(settings) == 2  # it is there
    assert sha256_of_file("mine.parquet") == before
    assert hints_file("mine.parquet").exists()


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("print('the prompt has no token; give some text.'); sys.exit(1)", "recorded: the prompt has no token; give"),
        ("print('half'); sys.stdout.flush(); os.kill(os.getpid(), 9)", "ended with code -9 after 'half'; free some"),
    ],
)
def test_how_a_recording_process_ends_is_told(ending, told, capsys, monkeypatch):
    Path("ends.py").write_text(f"import os, sys\n{ending}\n")
    monkeypatch.setattr("moebench.bench.trace_command.JOB", "ends")
    status, _, err = run(capsys, "record", "tiny-olmoe", "-o", "n.parquet")
    assert status == 2
    assert told in err.splitlines()[-1]
    assert not Path("n.parquet").exists()


def test_the_command_imports_no_torch():
    code = (
        "import sys\nfrom moebench.bench.cli import main\n"
        "main(['trace', 'synthesize', 'zipf', '-o', 'a.parquet', 'steps=4'])\n"
        "main(['trace', 'inspect', 'a.parquet'])\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
