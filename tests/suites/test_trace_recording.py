"""Recordings against the models themselves: greedy decoding, teacher forcing, guesses of the next gate."""

from __future__ import annotations

import dataclasses
import functools
import json
import os

import numpy as np
import pytest
import torch

from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.suites.models.smollm2_jobs import ffn_of
from moebench.suites.trace import trace_of
from moebench.suites.traces.accesses import accesses_of
from moebench.suites.traces.files import read_trace
from moebench.suites.traces.record_job import Job, main, run
from moebench.suites.traces.recording import record, runs_as_it_is
from moebench.suites.traces.watch import exchanged_layers, own_layers

transformers = pytest.importorskip("transformers")

REGISTRY = Registry.load()
USERS_CACHE = os.environ.get("MOEBENCH_CACHE")
PROMPT, STEPS = 5, 6


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


@functools.cache
def case_of(*settings):
    plan, _ = planned(
        ["suite=accuracy", *settings, *([] if "layers" in str(settings) else ["model.layers=moe"])], REGISTRY
    )
    assert not plan.refused, plan.refused[0].refusal
    (case,) = plan.cases
    return case


@functools.cache
def loaded(name):
    case = case_of(f"model={name}")
    return REGISTRY.get("model", case.model.name).create(case.model.params).language_model()[0]


PROMPT_S = torch.tensor([104, 101, 108, 108, 111])
TEXT_S = torch.tensor([32, 119, 111, 114, 108, 100])


def recorded(case, watching=own_layers, text_S=None, model=None):
    model = loaded(case.model.name) if model is None else model
    with watching(model, case, REGISTRY) as watch:
        return record(model, watch, PROMPT_S, STEPS, text_S)


def rows(columns):
    """The experts of (step, layer, token)."""
    found = {}
    for place in zip(*(columns[name] for name in ("step", "layer", "token", "expert")), strict=True):
        found.setdefault(place[:3], set()).add(place[3])
    return found


def positions(places):
    """The same by (layer, position in the sequence): step 0 has the prompt."""
    return {(layer, token if step == 0 else PROMPT + step - 1): e for (step, layer, token), e in places.items()}


MODELS = ("tiny-olmoe", "tiny-deepseek-v3")


@pytest.fixture(scope="module", params=MODELS)
def own(request, cache):
    """A case, its model, what its gates read and chose in one pass over the greedy sequence, and the recording."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBENCH_CACHE", str(cache))
        case = case_of(f"model={request.param}")
        model = loaded(case.model.name)
        made = recorded(case, model=model)
    read, chosen = {}, {}

    def hook(index):
        def note(gate, args, answer):
            read[index], chosen[index] = args[0].flatten(0, -2), answer[2]

        return note

    hooks = [ffn_of(model.model.layers[i]).gate.register_forward_hook(hook(i)) for i in case.layers]
    with torch.no_grad():
        model(made.ids_S[None], use_cache=False)
    for handle in hooks:
        handle.remove()
    return case, model, read, chosen, made


def test_generation_is_that_of_transformers(own):
    _, model, *_, made = own
    expected = model.generate(
        PROMPT_S[None], attention_mask=torch.ones(1, PROMPT), do_sample=False, max_new_tokens=STEPS, eos_token_id=None
    )
    assert torch.equal(made.ids_S, expected[0])


def test_who_went_where_is_what_the_models_gates_say(own):
    case, _, _, chosen, made = own
    found = positions(rows(made.columns))
    assert found == {(layer, t): set(chosen[layer][t].tolist()) for layer in case.layers for t in range(PROMPT + STEPS)}
    assert made.facts["experts"] == 8


def test_hints_are_what_the_next_gate_says_of_this_layers_input(own):
    case, model, read, _, made = own
    expected = {}
    with torch.no_grad():
        for before, layer in zip(case.layers, case.layers[1:], strict=False):
            _, _, indices_TK = ffn_of(model.model.layers[layer]).gate(read[before])
            expected |= {(layer, t): set(indices_TK[t].tolist()) for t in range(PROMPT + STEPS)}
    assert positions(rows(made.hints)) == expected
    carried = [access for access in accesses_of(trace_of(made.columns), hints=trace_of(made.hints)) if access.hints]
    assert len(carried) == (STEPS + 1) * (len(case.layers) - 1)


def test_the_model_is_left_as_it_was(own):
    case, model, *_, made = own
    again = recorded(case, model=model)
    assert again.columns == made.columns
    assert again.hints == made.hints


def test_layers_that_were_exchanged_for_their_equals_do_the_same(own):
    case, _, _, _, made = own
    other = recorded(case, exchanged_layers)
    assert torch.equal(other.ids_S, made.ids_S)
    assert rows(other.columns) == rows(made.columns)
    assert rows(other.hints) == rows(made.hints)
    np.testing.assert_allclose(sorted(other.columns["weight"]), sorted(made.columns["weight"]), atol=1e-4)


def test_a_text_is_read_as_it_is():
    made = recorded(case_of("model=tiny-olmoe"), text_S=TEXT_S)
    assert torch.equal(made.ids_S, torch.cat([PROMPT_S, TEXT_S]))
    assert made.facts["mode"] == "text"


def test_a_layer_alone_has_no_hints():
    made = recorded(case_of("model=tiny-olmoe", "model.layers=[2]"))
    assert set(made.columns["layer"]) == {2}
    assert made.hints is None


def test_experts_without_weights_are_asked_for_by_nobody():
    made = recorded(case_of("model=tiny-olmoe", "axes.routing=adamoe", "params.routing.adamoe.k=4"))
    assert made.facts["experts"] == 8
    assert max(made.columns["expert"]) < 8
    per_token = {len(experts) for experts in rows(made.columns).values()}
    assert len(per_token) > 1  # null experts took some of the slots
    assert max(per_token) <= 4


def test_weights_are_copied_only_where_experts_change():
    case = case_of("model=tiny-olmoe")
    int8 = REGISTRY.get("quantization", "int8").choose()
    assert runs_as_it_is(case, REGISTRY)
    assert not runs_as_it_is(dataclasses.replace(case, quantization=int8), REGISTRY)
    dense = REGISTRY.get("model", "smollm2").choose()
    assert not runs_as_it_is(dataclasses.replace(case, model=dense), REGISTRY)


@pytest.mark.parametrize(
    ("routing", "told"), [("expert_choice", "whole sequence"), ("m3vit", "needs the Context's 'task'")]
)
def test_routings_that_want_more_than_a_token_are_refused(routing, told):
    case = case_of("model=tiny-olmoe")
    case = dataclasses.replace(case, routing=REGISTRY.get("routing", routing).choose())
    with pytest.raises(MoebenchError, match=told):
        recorded(case)


def test_more_tokens_than_positions_are_refused():
    case = case_of("model=tiny-olmoe")
    model = loaded(case.model.name)
    with own_layers(model, case, REGISTRY) as watch:
        with pytest.raises(MoebenchError, match="more than the model's 4096 positions; lower --tokens"):
            record(model, watch, PROMPT_S, 4092)
        with pytest.raises(MoebenchError, match="no token"):
            record(model, watch, PROMPT_S[:0], 1)


# --- the job ---------------------------------------------------------------------------------------------------------


def job(path, **changes):
    return Job(case_of("model=tiny-olmoe").to_json(), [], str(path), **{"tokens": STEPS, **changes})


def test_a_job_writes_the_same_file_twice(tmp_path, capsys):
    for name in ("a.parquet", "b.parquet"):
        run(job(tmp_path / name, prompt="hello"))
    first, second = (tmp_path / name for name in ("a.parquet", "b.parquet"))
    assert first.read_bytes() == second.read_bytes()
    found = read_trace(str(first))
    assert found.hints is not None
    assert found.facts["model"]["name"] == "tiny-olmoe"
    assert (found.trace.steps, found.facts["prompt_tokens"]) == (STEPS + 1, 5)
    assert "generated: " in capsys.readouterr().out


def test_a_text_that_is_too_short_is_told(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("x" * 35)
    status = main([json.dumps(job(tmp_path / "a.parquet", text=str(tmp_path / "text.txt")).__dict__)])
    assert status == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("has 35 tokens where 38 are read; give a longer text or lower --tokens.")
    assert not (tmp_path / "a.parquet").exists()


def test_smollm2_split_into_experts_is_recorded(monkeypatch):
    from moebench.suites.model_plugins import SmolLM2

    pytest.importorskip("gguf")
    monkeypatch.setenv("MOEBENCH_CACHE", USERS_CACHE or "")
    if not (SmolLM2().folder() / "language_model").is_dir():
        pytest.skip("no SmolLM2 in the cache")
    made = recorded(case_of("model=smollm2", "model.layers=[3,4]"), exchanged_layers)
    assert trace_of(made.columns).layers == (3, 4)
    assert {len(experts) for experts in rows(made.columns).values()} == {2}
    assert set(made.hints["layer"]) == {4}
