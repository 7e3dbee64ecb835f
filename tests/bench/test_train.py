"""``moebench models train``: a model in the cache, its curves in the store, and what a mistake is told."""

from __future__ import annotations

import json
import random

import pytest

from moebench.bench.cli import main
from moebench.bench.run import planned
from moebench.contracts import Registry

pytest.importorskip("transformers")


@pytest.fixture
def training(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 8))) for _ in range(300)]
    lines = (f"{i} " + " ".join(draw.choices(words, k=14)) for i in range(1700))
    (tmp_path / "own.txt").write_text("\n\n".join(lines))
    return ["models", "train", "tinymoe", "variant=smoke", "data=own.txt"]


def sql(capsys, query):
    capsys.readouterr()
    assert main(["sql", query, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_is_trained_stored_and_judged(training, tmp_path, capsys):
    assert main(training) == 0
    folder = capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "cache") in (tmp_path / folder).parents
    curve = sql(
        capsys,
        "SELECT unnest(s.values) AS value, generate_subscripts(s.values, 1) AS step, c.model, c.elapsed_s "
        "FROM series s JOIN cases c USING (run_id, case_key) WHERE s.name = 'loss' AND c.suite = 'pretraining'",
    )
    assert [row["step"] for row in curve] == list(range(1, 13))
    assert {row["model"] for row in curve} == {"tinymoe"}
    assert curve[0]["elapsed_s"] > 0
    (told,) = sql(capsys, "SELECT value FROM metrics WHERE name = 'bits_per_byte'")
    manifest = json.loads((tmp_path / folder / "manifest.json").read_text())
    assert told["value"] == manifest["figures"]["bits_per_byte"]
    assert sql(capsys, "SELECT count(*) AS n FROM timings")[0]["n"] == 0

    assert main(training) == 0
    assert capsys.readouterr().out.splitlines()[-1] == folder
    assert sql(capsys, "SELECT count(*) AS n FROM runs")[0]["n"] == 1

    own = f"model.data={tmp_path / 'own.txt'}"
    (case,) = planned(
        ["suite=accuracy", "model=tinymoe", "model.variant=smoke", own, "suite.tokens=64", "suite.window=32"],
        Registry.load(),
    )[0].cases
    assert case.weights_sha256 == manifest["weights_sha256"]
    assert case.layers == (1,)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name the model to train, for example `moebench models train tinymoe`"),
        (["smollm2"], "model 'smollm2' is not trained here"),
        (["tinymo"], "did you mean 'tinymoe'"),
        (["tinymoe", "variant=large"], "must be one of standard, short, smoke"),
        (["tinymoe", "varient=short"], "unknown parameter of model 'tinymoe' 'varient': did you mean 'variant'?"),
        (["tinymoe", "short"], "write it as variant=short"),
        (["tinymoe", "variant=smoke", "threads=9999"], "threads do not fit on the"),
        (["tinymoe", "data=nowhere.txt"], "cannot be read as UTF-8 text"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(training, arguments, said, capsys):
    assert main(["models", "train", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_an_absent_model_names_its_command(training, capsys):
    assert main(["run", "suite=accuracy", "model=tinymoe"]) == 2
    assert "run `moebench models train tinymoe`" in capsys.readouterr().err
    assert main(["models", "list"]) == 0
    assert "not available: model 'tinymoe' is not trained here" in capsys.readouterr().out
