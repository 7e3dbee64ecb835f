"""Compressing a small MoE language model, and distilling it in stages: exact where nothing is lost, and repeatable."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from moebench.contracts import MoebenchError
from moebench.moe.transforms.slim import chances, slim
from moebench.suites.tiny_plugins import TinyMoE
from moebench.suites.training.compressing import (
    changed_model,
    distillation_loss,
    evidence,
    layer_weights,
    log_probabilities,
)
from moebench.suites.training.distill import Stage, Text, change, compressed, distilled
from moebench.suites.training.language import Windows
from moebench.suites.training.settings import Settings
from moebench.suites.training.tinymoe import new_model

pytest.importorskip("transformers")

PARAMS = TinyMoE("smoke")
WIDTH, EXPERTS = PARAMS.sizes.width, PARAMS.sizes.experts
SETTINGS = Settings(10, 3e-3, warmup=2, evaluate_every=5, checkpoint_every=5)


def random_model(experts, embedding):
    """Weights as they are drawn, those of experts and of the embeddings larger."""
    model = new_model(PARAMS).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(embedding)
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj.mul_(experts)
            layer.mlp.experts.down_proj.mul_(experts)
    return model


@pytest.fixture(scope="module")
def teacher():
    """The experts are large enough to matter and not to drown all else."""
    return random_model(3, 1)


@pytest.fixture(scope="module")
def text():
    ids_N = torch.randint(1, 512, (3000,), generator=torch.Generator().manual_seed(1))
    return Text(ids_N[:2500], Windows(ids_N[2500:2820].view(8, 40), 320.0), (2, 24), 0, calibration=2)


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@torch.no_grad()
def divergence(student, teacher, text):
    return float(distillation_loss(student, teacher, text.held_out.ids_BT))


def test_a_model_that_is_not_changed_is_a_copy_bit_by_bit(teacher, text):
    copied = changed_model(teacher, lambda layer, weights: weights)
    assert same(copied, teacher)
    assert all(
        not torch.equal(p, p + 1) and p.data_ptr() != q.data_ptr()
        for p, q in zip(copied.parameters(), teacher.parameters(), strict=True)
    )
    assert divergence(copied, teacher, text) == pytest.approx(0, abs=1e-6)


def test_a_slimmed_model_is_the_model_with_the_other_channels_zero(teacher, text):
    kept = {
        layer: chances(weights, layer).argsort(dim=1)[:, :5].sort().values
        for layer, weights in layer_weights(teacher).items()
    }
    slimmer = changed_model(teacher, lambda layer, weights: slim(weights, kept[layer])).eval()
    masked = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer, kept_EC in kept.items():
            mask_EF = torch.zeros(EXPERTS, WIDTH).scatter(1, kept_EC, 1.0)
            masked.model.layers[layer].mlp.experts.down_proj.mul_(mask_EF[:, None])
    ids_BT = text.held_out.ids_BT
    torch.testing.assert_close(
        log_probabilities(slimmer, ids_BT), log_probabilities(masked, ids_BT), rtol=1e-4, atol=1e-5
    )
    assert slimmer.config.moe_intermediate_size == 5
    saved = EXPERTS * 3 * (WIDTH - 5) * PARAMS.sizes.hidden * PARAMS.sizes.depth
    count = [sum(p.numel() for p in model.parameters()) for model in (teacher, slimmer)]
    assert count[0] - count[1] == saved


def test_the_loss_is_the_divergence_and_its_teacher_gets_no_gradient(teacher, text):
    student, ids_BT = new_model(TinyMoE("smoke", seed=3)), text.held_out.ids_BT[:2]
    found = distillation_loss(student, teacher, ids_BT)
    found.backward()
    log_p, log_q = (log_probabilities(model, ids_BT).double() for model in (teacher, student))
    wanted = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in student.parameters())


def test_terms_are_the_derivative_by_a_factor_of_each_channel_where_experts_count_half(teacher, text):
    ids_BT = text.held_out.ids_BT[:3]
    found = evidence(teacher, teacher, [ids_BT])
    half, factors = copy.deepcopy(teacher), {}
    for layer in layer_weights(teacher):
        module = half.model.layers[layer].mlp.experts
        factors[layer] = torch.full((EXPERTS, WIDTH), 0.5, requires_grad=True)
        scaled = module.down_proj.detach() * factors[layer][:, None]
        del module.down_proj
        module.down_proj = scaled
    loss = distillation_loss(half, teacher, ids_BT)
    for layer, wanted_EF in zip(factors, torch.autograd.grad(loss, list(factors.values())), strict=True):
        torch.testing.assert_close(
            found.terms_EF[layer].float(), wanted_EF, rtol=1e-3, atol=1e-3 * float(wanted_EF.abs().max())
        )
        assert int(found.load_E[layer].sum()) == 3 * 39 * PARAMS.sizes.k
    whole = copy.deepcopy(teacher)  # at the teacher itself every gradient is zero, which is why it is not taken there
    slopes = torch.autograd.grad(distillation_loss(whole, teacher, ids_BT), whole.model.layers[0].mlp.experts.down_proj)
    assert float(slopes[0].abs().max()) < 1e-6
    gone = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in gone.model.layers:
            layer.mlp.experts.down_proj.zero_()
        harm = float(distillation_loss(gone, teacher, ids_BT))
    taken_away = -sum(float(terms_EF.sum()) for terms_EF in found.terms_EF.values())
    assert taken_away == pytest.approx(harm, rel=0.2)  # the midpoint rule


@pytest.mark.parametrize("by", ["taylor", "magnitude", "random"])
def test_a_stage_makes_the_sizes_that_it_says(teacher, text, by):
    found = evidence(teacher, teacher, [text.held_out.ids_BT])
    made = changed_model(teacher, change(Stage(1, width=6, experts=3, by=by), found, 0))
    assert all(weights.down.shape[::2] == (3, 6) for weights in layer_weights(made).values())
    one = changed_model(teacher, change(Stage(1, experts=1, by=by), found, 0))
    assert one.config.num_experts_per_tok == 1
    if by != "random":
        kept = layer_weights(teacher)[0].router_EH[int(found.load_E[0].argmax())]
        assert torch.equal(layer_weights(one)[0].router_EH[0], kept)


def test_channels_that_the_loss_does_not_see_go_first(teacher, text):
    dead = copy.deepcopy(teacher)
    with torch.no_grad():
        for layer in dead.model.layers:
            layer.mlp.experts.down_proj[:, :, ::2] = 0
    made, other = (
        divergence(compressed(dead, dead, Stage(1, width=WIDTH // 2, by=by), text, 0).eval(), dead, text)
        for by in ("taylor", "random")
    )
    assert abs(made) < 1e-6 < 1e-4 < other


def distil(teacher, text, stages, folder, identity="test"):
    """The student after all stages, and the training of each."""
    student, trainers = teacher, []
    for number in range(1, len(stages) + 1):
        student, trainer = distilled(student, teacher, text, stages[:number], SETTINGS, folder, identity)
        trainers.append(trainer)
    return SimpleNamespace(student=student, trainers=trainers)


def test_stages_are_repeatable_lower_the_divergence_and_end_at_their_size(text, tmp_path):
    teacher = random_model(8, 10)  # sure of its next token, so that there is something to distil
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    stages = [Stage(20, width=8), Stage(20, width=4)]
    runs = [distil(teacher, text, stages, tmp_path / name) for name in "ab"]
    assert same(runs[0].student, runs[1].student)
    assert [trainer.step for trainer in runs[0].trainers] == [20, 20]
    assert runs[0].student.config.moe_intermediate_size == 4
    for trainer in runs[0].trainers:
        assert trainer.evaluations["kl"][-1] < trainer.evaluations["kl"][0]
    again = distil(teacher, text, stages, tmp_path / "a")
    assert same(again.student, runs[0].student)
    single = distil(teacher, text, [Stage(40, width=4)], tmp_path / "c")
    assert single.trainers[0].step == sum(trainer.step for trainer in runs[0].trainers)
    assert single.student.config.moe_intermediate_size == 4
    assert not same(single.student, runs[0].student)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    with pytest.raises(MoebenchError, match="another training"):
        distil(teacher, text, stages, tmp_path / "a", "another text")


def test_mistakes_are_told(teacher):
    with pytest.raises(ValueError, match="steps=0"):
        Stage(0)
    with pytest.raises(ValueError, match="as many experts, as wide"):
        changed_model(teacher, lambda layer, weights: slim(weights, torch.arange(layer + 1).expand(EXPERTS, -1)))
