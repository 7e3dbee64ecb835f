"""``tinymoe`` in its smallest variant: trained, killed, resumed, judged and used through the code of the others."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebench.contracts import MoebenchError, Registry
from moebench.suites import text
from moebench.suites.base import SuiteConfig
from moebench.suites.models.hf_config import shape_of
from moebench.suites.tiny_plugins import VARIANTS, TinyMoE
from moebench.suites.training import corpus, experts
from moebench.suites.training.checkpoint import latest
from moebench.suites.training.judge import byte_alphabet, text_bytes
from moebench.suites.training.language import bits_per_byte, encode, gates, nll, take_windows
from moebench.suites.training.ngrams import Trigrams
from moebench.suites.training.specialisation import (
    CLASSES,
    information,
    joint_counts,
    mutual_bits,
    routes,
    token_class,
    without,
)

transformers = pytest.importorskip("transformers")

STEPS = VARIANTS["smoke"].training.steps


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A text of its own that repeats no line."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 8))) for _ in range(300)]
    sentences = [" ".join(draw.choices(words, k=draw.randint(8, 25))).capitalize() + "." for _ in range(1400)]
    file = tmp_path_factory.mktemp("data") / "corpus.txt"
    file.write_text("\n\n".join(f"{i}. {sentence}" for i, sentence in enumerate(sentences)))
    return str(file)


def trial(data, device="cpu"):
    registry = Registry.load()
    model = registry.get("model", "tinymoe").choose({"variant": "smoke", "data": data})
    suite = registry.get("suite", "pretraining")
    config = SuiteConfig("pretraining", suite.version, None, {"model": [model], "threads": [1]}, device=device)
    (planned,) = suite.create().cases(config, registry)
    assert planned.refusal is None
    return suite.create().prepare(planned.case, registry)


def trained(data):
    """Train in this process; return (params, facts)."""
    one = trial(data)
    for step in range(one.steps):
        assert one.verify(step, one.run(step)).ok
    facts = one.facts()
    one.close()
    return TinyMoE("smoke", data), facts


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    cache = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBENCH_CACHE", str(cache))
        params, facts = trained(data)
    return cache, params, facts


@pytest.fixture
def smoke(made, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(made[0]))
    return made[1]


def loaded(params):
    model, tokenizer = Registry.load().get("model", "tinymoe").create(vars(params)).language_model()
    return model, tokenizer


# --- training ---------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from moebench.suites.tiny_plugins import TinyMoE
from moebench.suites.training.tinymoe import prepare
from moebench.suites.training.trainer import Trainer
job = prepare(TinyMoE("smoke", sys.argv[1]), "cpu")
batch = job.task.batch
job.task.batch = lambda step: time.sleep(0.15) or batch(step)
Trainer(job.task, job.settings, job.folder / "training" / "checkpoints", job.identity).advance(10**9)
"""


def test_after_kill_9_it_ends_as_if_nothing_had_happened(data, made, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    folder = TinyMoE("smoke", data).home() / "training" / "checkpoints"
    process = subprocess.Popen([sys.executable, "-c", SLOW, data], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while latest(folder) is None:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    begun = latest(folder)
    assert 0 < begun.step < STEPS
    params, facts = trained(data)
    assert facts.notes["reason"] == f"went on from step {begun.step}"
    whole = made[2]
    assert facts.series == whole.series
    assert facts.metrics == whole.metrics
    mine, theirs = ((cache / "model" / "model.safetensors").read_bytes() for cache in (params.home(), _home(made)))
    assert mine == theirs
    assert not folder.exists()


def test_a_device_that_is_not_here_is_told(data):
    if torch.cuda.is_available():
        pytest.skip("there is such a device here")
    with pytest.raises(MoebenchError, match="device=cuda is not here"):
        trial(data, "cuda")


def _home(made):
    return next((made[0] / "models" / "tinymoe").iterdir())


def test_the_curves_are_kept(made):
    series = {one.name: one.values for one in made[2].series if one.layer is None}
    assert {"loss", "balance", "lr", "gradient_norm"} <= series.keys()
    assert all(len(series[name]) == STEPS for name in ("loss", "balance", "lr", "gradient_norm"))
    assert series["held_out_step"] == (6, 12)
    assert len(series["held_out_bits_per_byte"]) == 2


def test_the_last_evaluation_is_that_of_the_saved_model(smoke, made):
    model, tokenizer = loaded(smoke)
    from moebench.suites.quality.passage import token_bytes

    ids = encode(tokenizer, corpus.load(smoke.data).held_out.content)
    held_out = take_windows(ids, token_bytes(tokenizer, ids), smoke.sizes.judged, smoke.sizes.window)
    told = {metric.name: metric.value for metric in made[2].metrics}["bits_per_byte"]
    assert bits_per_byte(model, held_out) == pytest.approx(told, abs=1e-5)
    assert smoke.manifest()["figures"]["bits_per_byte"] == told


def test_batches_follow_from_the_step_alone(smoke):
    from moebench.suites.training.tinymoe import prepare

    task = prepare(smoke, "cpu").task
    forward = [task.batch(step) for step in range(4)]
    assert all(torch.equal(task.batch(step), forward[step]) for step in (3, 1, 0, 2))
    assert not torch.equal(forward[0], forward[1])
    assert all((ids[::2, 0] == task.end).all() and not (ids[:, 1:] == task.end).any() for ids in forward)


def test_the_loss_is_cross_entropy_and_balance(smoke):
    from moebench.suites.training.tinymoe import prepare

    task = prepare(smoke, "cpu").task
    ids = task.batch(0)
    loss, shown = task.loss(ids)
    theirs = task.model(input_ids=ids[:, :-1], labels=None).logits
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(shown["loss"], expected, rtol=1e-5)
    assert torch.allclose(loss, expected + 0.01 * shown["balance"], rtol=1e-5)
    assert 0.9 < shown["balance"].item() < smoke.sizes.experts


def test_the_experts_of_training_are_those_of_transformers():
    config = transformers.Qwen2MoeConfig(
        hidden_size=16, moe_intermediate_size=8, num_experts=5, num_experts_per_tok=2, hidden_act="silu"
    )
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    torch.manual_seed(0)
    module = Qwen2MoeExperts(config).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    x_TH = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    indices_TK = torch.randn(7, 4).argsort(-1)[:, :2]  # expert 4 gets nothing
    weights_TK = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    leaves = [x_TH, weights_TK, *module.parameters()]
    ours, theirs = experts.forward(module, x_TH, indices_TK, weights_TK), module(x_TH, indices_TK, weights_TK)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    upstream = torch.randn_like(ours)
    pairs = zip(torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True)
    assert all(torch.allclose(mine, other, rtol=1e-12) for mine, other in pairs)


# --- the model --------------------------------------------------------------------------------------------------------


def test_any_tool_loads_it(smoke):
    folder = smoke.folder()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    sample = "In the beginning, Abcd efgh\n\n  (1 + 2) caf\u00e9 \u2014 9.\n"
    assert tokenizer.decode(tokenizer(sample).input_ids) == sample
    from moebench.suites.training import tokenizer as own

    fresh = own.train(corpus.load(smoke.data).training, smoke.sizes.vocabulary)
    assert tokenizer(sample).input_ids == encode(fresh, sample).tolist()
    assert len(tokenizer) == smoke.sizes.vocabulary
    said = json.loads((folder / "config.json").read_text())
    assert shape_of(said) == smoke.shape()
    assert {key: said[key] for key in smoke.config()} == smoke.config()


def test_the_manifest_names_what_it_was_made_of(smoke):
    manifest, texts = smoke.manifest(), corpus.load(smoke.data)
    assert manifest["weights_sha256"] == smoke.weights_sha256()
    assert manifest["texts"]["training"]["sha256"] == texts.training.sha256
    assert manifest["texts"]["held_out"]["sha256"] == texts.held_out.sha256
    assert manifest["steps"] == STEPS
    assert {"torch", "transformers", "tokenizers"} == manifest["versions"].keys()


def test_layers_are_those_of_the_whole_model(smoke):
    source = Registry.load().get("model", "tinymoe").create(vars(smoke))
    model, _ = loaded(smoke)
    for index in range(smoke.sizes.depth):
        layer, block = source.layer(index), model.model.layers[index].mlp
        assert torch.equal(layer.gate_up, block.experts.gate_up_proj)
        assert torch.equal(layer.down, block.experts.down_proj)
        assert torch.equal(layer.router_EH, block.gate.weight)
        assert layer.shared.gate_H is not None


def test_an_untrained_one_is_told_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    for params, command in ((TinyMoE(), "train tinymoe`"), (TinyMoE("short", seed=2), "tinymoe variant=short seed=2`")):
        assert command in params.missing()
        with pytest.raises(MoebenchError, match=r"is not trained here; run `moebench models train tinymoe"):
            params.weights_sha256()


def test_every_choice_is_another_model(data):
    models = [TinyMoE(), TinyMoE("short"), TinyMoE("smoke"), TinyMoE(seed=1), TinyMoE("smoke", data)]
    assert len({params.identity() for params in models}) == len(models)


# --- text -------------------------------------------------------------------------------------------------------------


def test_the_shipped_evaluation_text_is_held_out():
    found = corpus.load("")
    assert found.training.sha256 == text.calibration_text().sha256
    assert found.held_out.sha256 == text.evaluation_text().sha256


def test_a_text_of_ones_own_is_split_without_the_evaluation_text(data, tmp_path):
    with open(data, encoding="utf-8") as stream:
        own = stream.read()
    taken = [p for p in text.evaluation_text().content.split("\n\n") if len(p) > 60][:200]
    file = tmp_path / "mixed.txt"
    file.write_text("\n\n".join([*taken, own, *own.split("\n\n")[:50]]))
    mixed, alone = corpus.load(str(file)), corpus.load(data)
    assert mixed.training.content == alone.training.content
    paragraphs = [set(t.content.split("\n\n")) for t in (alone.training, alone.held_out)]
    assert not {p for p in paragraphs[0] & paragraphs[1] if len(p) >= text.LONG}
    assert 0.03 < len(alone.held_out.content) / len(alone.training.content) < 0.08


@pytest.mark.parametrize(
    ("content", "reason"), [(b"\xff\xfe", "cannot be read as UTF-8"), (b"short", "give more text")]
)
def test_a_text_that_cannot_serve_is_told(tmp_path, content, reason):
    file = tmp_path / "corpus.txt"
    file.write_bytes(content)
    with pytest.raises(MoebenchError, match=reason):
        corpus.load(str(file))
    with pytest.raises(MoebenchError, match="cannot be read"):
        corpus.load(str(tmp_path / "absent.txt"))


# --- 3-grams ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), max_size=60), st.lists(st.integers(0, 4), max_size=3))
def test_probabilities_sum_to_one(symbols, context):
    model = Trigrams(symbols, 5)
    found = [model.probability(symbol, context) for symbol in range(5)]
    assert sum(found) == pytest.approx(1)
    assert min(found) > 0 or symbols


def test_a_trigram_by_hand():
    """0 1 0 1 0 0: the trigrams are 010 twice, 101 and 100 once each."""
    model = Trigrams([0, 1, 0, 1, 0, 0], 2)
    # Order 1 counts kinds of contexts: 0 follows 0 and 1, 1 follows 0 alone; n1 = n2 = 1, so the discount is 1/3.
    unigram = (2 - 1 / 3 + 1 / 3 * 2 * 1 / 2) / 3
    assert model.probability(0, []) == pytest.approx(unigram)
    # Order 2 counts the kinds of trigrams that end so: 10 once (010), 01 once (101), 00 once (100): the discount is 1.
    assert model.probability(0, [0]) == pytest.approx((0 + 1 * 2 * unigram) / 2)
    assert model.probability(0, [1]) == pytest.approx(unigram)
    # Order 3: n1 = 2, n2 = 1, so the discount is 1/2.
    assert model.probability(0, [0, 1]) == pytest.approx((2 - 1 / 2 + 1 / 2 * model.probability(0, [1])) / 2)
    assert model.probability(0, [1, 1]) == model.probability(0, [1])


@given(st.lists(st.integers(0, 3), min_size=4, max_size=40))
def test_bits_are_those_of_the_probabilities(symbols):
    model = Trigrams(symbols, 4)
    expected = [model.probability(symbols[i], symbols[:i]) for i in range(1, len(symbols))]
    assert model.bits(symbols) == pytest.approx(-sum(map(math.log2, expected)))


def test_the_bytes_of_tokens_are_those_of_the_text(smoke):
    tokenizers = pytest.importorskip("tokenizers")
    assert set(byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    _, tokenizer = loaded(smoke)
    sample = "caf\u00e9 \U0001f600\tx\x00\n" + "".join(map(chr, range(32, 300)))
    assert text_bytes(tokenizer, encode(tokenizer, sample)) == sample.encode()


# --- specialisation ---------------------------------------------------------------------------------------------------


def test_information_is_exact_where_it_can_be():
    class_T = torch.arange(len(CLASSES)).repeat(10)
    assert mutual_bits(joint_counts(class_T[:, None], class_T, 8)) == pytest.approx(math.log2(len(CLASSES)))
    assert mutual_bits(joint_counts(torch.zeros_like(class_T)[:, None], class_T, 8)) == pytest.approx(0, abs=1e-12)
    found = information(class_T[:, None], class_T, 8, 0)
    assert found.bits > found.shuffled_max >= found.shuffled_mean > 0


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (" word", "begins a word"),
        (" Name", "begins a name"),
        ("Ing", "inside a word"),
        (" 7", "number"),
        ("\n", "space"),
        ("  ", "space"),
        (" (", "punctuation"),
    ],
)
def test_tokens_have_classes(token, name):
    assert CLASSES[token_class(token)] == name


def test_pruned_experts_are_never_chosen(smoke):
    model, tokenizer = loaded(smoke)
    ids = encode(tokenizer, corpus.load(smoke.data).held_out.content)
    held_out = take_windows(ids, torch.ones(len(ids)), 4, 32)
    whole = bits_per_byte(model, held_out)
    none = {layer: [] for layer in gates(model)}
    assert without(model, none, held_out) == pytest.approx(whole, rel=1e-6)
    seen = []
    gone = {layer: [0, 3] for layer in gates(model)}
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[1]))
    assert without(model, gone, held_out) != whole
    hook.remove()
    assert set(torch.cat(seen).unique().tolist()) == {1, 2}
    assert bits_per_byte(model, held_out) == whole


def test_routes_are_what_the_layers_get(smoke):
    model, tokenizer = loaded(smoke)
    ids_BT = encode(tokenizer, "Abcd efgh abc. 12 abcd efg habc de fgh ab")[:16].view(2, 8)
    seen = []
    hook = model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[1]))
    found = routes(model, ids_BT)
    hook.remove()
    assert torch.equal(found[1], torch.cat(seen))
    assert nll(model, ids_BT).shape == (14,)
