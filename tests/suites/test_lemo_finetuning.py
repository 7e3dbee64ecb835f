"""Token elimination in pretrained models: positions, masks and scores, and the workload, very small."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.suites.finetuning_plugins import LemoFinetuning
from moebench.suites.models.tiny_hub import byte_tokenizer
from moebench.suites.workloads import token_elimination
from moebench.suites.workloads.lemo_finetuning import LemoFinetuningWorkload, PlacedPredictor
from moebench.suites.workloads.pretrained import PretrainedModel, run
from moebench.suites.workloads.trial import WorkloadTrial
from moebench.suites.workloads.widest import WidestResult

REGISTRY = Registry.load()
TINY = {"tokens": 32, "block": 4, "segments": 4, "rank": 4, "fitted": 2, "predictor_steps": 2, "judged": 2} | {
    "finetune_steps": 1,
    "pairs": 2,
}
VOCABULARY, HIDDEN, DEPTH = 256, 32, 3
WORDS = ["suite=lemo_finetuning", *(f"suite.{name}={value}" for name, value in TINY.items())]


@pytest.fixture(scope="module")
def llama():
    """A Llama with two queries to a head of keys and one matrix for embedding and head, as SmolLM2 has them."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def workload(llama):
    return LemoFinetuningWorkload(LemoFinetuning(**TINY), 0, llama, byte_tokenizer())


# --- the model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_elimination_it_is_transformers_own_forward(llama):
    ids = torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))
    model = PretrainedModel(llama)
    assert float(model.loss(ids, 4)) == pytest.approx(float(model.own_loss(ids)), rel=1e-6)
    assert torch.equal(model.loss(ids, 4, lambda layer, x: torch.arange(4)), model.loss(ids, 4))


@torch.no_grad()
def test_kept_tokens_keep_their_positions_and_attend_to_kept_ones(llama):
    """The same layer over all tokens, with a mask that hides eliminated keys, says the same of kept tokens."""
    model = PretrainedModel(llama)
    x = torch.randn(1, 16, HIDDEN, generator=torch.Generator().manual_seed(2))
    angles = model.angles(x)
    kept = token_elimination.tokens_of(torch.tensor([1, 3]), 4)
    seen = torch.zeros(16, 16, dtype=torch.bool)
    seen[:, kept] = True
    mask = torch.full((16, 16), -1e9).masked_fill(seen.tril(), 0.0)
    expected = llama.model.layers[0](x, attention_mask=mask[None, None], position_embeddings=angles)[:, kept]
    found = run(model.layers[0], x[:, kept], (angles[0][:, kept], angles[1][:, kept]))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(run(model.layers[0], x[:, kept], (angles[0][:, :8], angles[1][:, :8])), found, atol=1e-3)


@torch.no_grad()
def test_the_loss_computes_kept_tokens_at_their_places(llama, monkeypatch):
    """Through the whole model: an elimination by hand, layer by layer, has the same loss."""
    model, blocks = PretrainedModel(llama), torch.tensor([0, 2])
    ids = torch.randint(VOCABULARY, (1, 17), generator=torch.Generator().manual_seed(3))
    kept = token_elimination.tokens_of(blocks, 4)
    x = model.embedded(ids[:, :-1])
    cos, sin = model.angles(x)
    for layer in model.layers[:-1]:
        x = x.clone()
        x[:, kept] = run(layer, x[:, kept], (cos[:, kept], sin[:, kept]))
    logits = llama.lm_head(llama.model.norm(run(model.layers[-1], x, (cos, sin))))
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])
    assert float(model.loss(ids, 4, lambda layer, x: blocks)) == pytest.approx(float(expected), rel=1e-6)


@torch.no_grad()
def test_scores_are_those_of_rotated_queries_and_shared_keys(llama):
    model = PretrainedModel(llama)
    x = torch.randn(1, 6, HIDDEN, generator=torch.Generator().manual_seed(4))
    attention, normed = llama.model.layers[1].self_attn, llama.model.layers[1].input_layernorm(x)[0]
    cos, sin = (part[0] for part in model.angles(x))

    def rotated(x_TD):
        first, second = x_TD.chunk(2, -1)
        return x_TD * cos + torch.cat([-second, first], -1) * sin

    expected = torch.zeros(6, 6)
    for head in range(4):
        q = rotated(attention.q_proj(normed)[:, 8 * head : 8 * head + 8])
        k = rotated(attention.k_proj(normed)[:, 8 * (head // 2) : 8 * (head // 2) + 8])
        expected += (q @ k.T / math.sqrt(8)).clamp_min(0).tril()
    assert torch.allclose(model.scores(1, x, 1)[0], (expected + expected.T) / 2, atol=1e-5)


def test_attention_of_another_kind_is_refused():
    config = transformers.OlmoeConfig(
        vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_experts=2
    )
    with pytest.raises(MoebenchError, match="OlmoeAttention scores keys in a way of its own"):
        PretrainedModel(transformers.OlmoeForCausalLM(config))


# --- the workload ----------------------------------------------------------------------------------------------------


def test_texts_to_judge_and_to_learn_from_differ_and_seeds_have_their_own(workload, llama):
    judged = workload.texts(True, 2, "judged")
    assert judged.shape == (2, 33)
    assert torch.equal(judged[0, -1:], judged[1, :1])
    other = LemoFinetuningWorkload(workload.params, 1, llama, byte_tokenizer())
    for another in (workload.texts(False, 2, "judged"), other.texts(True, 2, "judged")):
        assert not torch.equal(judged, another)


def test_a_predictor_begins_with_what_is_expected_of_places():
    expected = torch.randn(3, 3)
    predictor = PlacedPredictor(4, 2, 5, expected)
    assert torch.equal(predictor(torch.randn(2, 6, 4)), expected.expand(2, 3, 3))


def test_the_loss_alone_keeps_its_own_gradients_and_the_model_is_left_as_it_was(workload, llama):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    report = workload.measure()
    assert report.check.ok, report.check.reason
    found = {metric.name: metric.value for metric in report.metrics}
    assert found["saved_loss"] == 4 * HIDDEN * (VOCABULARY + TINY["tokens"])
    layers = {name: found[f"saved_{name}_segments"] - found["saved_loss"] for name in ("kept", "dense")}
    assert layers["kept"] / layers["dense"] == pytest.approx(found["kept_tokens_of_layers"], rel=0.1)
    assert found["logits_whole"] == 4 * VOCABULARY * TINY["tokens"] == 4 * found["logits_segments"]
    assert found["loss_dense"] != found["loss_start"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


def test_a_broken_elimination_costs_all_figures(workload, monkeypatch):
    monkeypatch.setattr(token_elimination, "tokens_of", lambda blocks, block: blocks)
    check = workload.measure().check
    assert not check.ok
    assert "loss with every block kept: off by" in check.reason


def test_a_mask_that_is_not_causal_is_noticed(workload, llama, monkeypatch):
    monkeypatch.setattr(llama.config, "_attn_implementation", "eager")  # without a mask it looks at later tokens
    assert "transformers' own forward: off by" in workload.measure().check.reason


# --- the suite -------------------------------------------------------------------------------------------------------


def test_the_suite_takes_models_that_have_text():
    (case,) = planned(["suite=lemo_finetuning"], REGISTRY)[0].cases
    assert (case.model.name, case.tokens, case.pass_) == ("smollm2", 512, "forward_backward")
    plan, _ = planned(["suite=lemo_finetuning", "axes.model=[tiny-mixtral,small]"], REGISTRY)
    assert [case.model.name for case in plan.cases] == ["tiny-mixtral"]
    assert "model 'small' has no text" in plan.refused[0].refusal
    with pytest.raises(MoebenchError, match=r"lr=0\.0 must be above 0"):
        planned(["suite=lemo_finetuning", "suite.lr=0"], REGISTRY)


def test_a_trial_of_a_model_with_experts_has_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    sizes = ["model.hidden=16", "model.width=8", "model.experts=2", "model.k=1", "model.depth=2"]
    (case,) = planned([*WORDS, "model=tiny-mixtral", *sizes], REGISTRY)[0].cases
    trial = WorkloadTrial(case, REGISTRY)
    checks = [trial.verify(step, trial.run(step)) for step in range(trial.steps)]
    assert all(check.ok for check in checks), checks
    names = {metric.name for metric in trial.facts().metrics}
    assert {"loss_forward_oracle", "loss_forward_random", "step_time_ratio_oracle", "predictor_recall"} <= names


def test_a_view_of_the_head_is_no_tensor_of_logits():
    with WidestResult(11) as widest:
        token_elimination.segment_loss(torch.zeros(4, 9), torch.zeros(11, 9), torch.zeros(4).long(), 4)
    assert widest.bytes == 11 * 4
