"""Suite ``distillation``: every recipe on the smallest models, sizes by arithmetic, and an oracle that can fail."""

from __future__ import annotations

import copy

import pytest
import torch

from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.suites.digest import sha256_of
from moebench.suites.distillation_plugins import RECIPES, SLIMMING, Distillation
from moebench.suites.tiny_plugins import TinyDense, TinyMoE
from moebench.suites.training.dense2moe import GROUP, BlockTask, K, enter, split_model, used_parameters
from moebench.suites.training.distill import Text, held_out_divergence
from moebench.suites.training.distillation_trial import DistillationTrial, exact_bits_per_byte, exact_divergence
from moebench.suites.training.language import Windows, bits_per_byte
from moebench.suites.training.recipes import Setup, recipe
from moebench.suites.training.settings import Settings
from moebench.suites.training.tinymoe import new_model

pytest.importorskip("transformers")

MOE, DENSE = TinyMoE("smoke"), TinyDense("smoke")
SETTINGS = Settings(6, 1e-3, warmup=1)


@pytest.fixture(scope="module")
def text():
    ids_N = torch.randint(1, 512, (3000,), generator=torch.Generator().manual_seed(1))
    return Text(ids_N[:2500], Windows(ids_N[2500:2820].view(8, 40), 320.0), (2, 24), 0, calibration=2)


def teacher_of(name):
    """Untrained, with FFNs large enough to matter."""
    model = new_model(MOE if name in SLIMMING else DENSE).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.mlp.parameters():
                parameter.mul_(5)
    return model


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_ends_at_its_size_and_leaves_its_teacher_alone(name, text, tmp_path):
    teacher = teacher_of(name)
    before = copy.deepcopy(teacher.state_dict())
    one = recipe(name, Setup(teacher, text, SETTINGS, tmp_path, "test"), 6)
    trainers = [one.run(number) for number in range(one.stages)]
    assert sum(trainer.step for trainer in trainers) == 6
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    sizes = (MOE if name in SLIMMING else DENSE).sizes
    expert = 3 * sizes.hidden * sizes.width
    whole = 3 * sizes.hidden * DENSE.width
    wanted = {
        **dict.fromkeys(("two-stage", "one-stage", "text"), sizes.k * expert / 2),
        "fewer-experts": sizes.k * expert,
        **dict.fromkeys(("dense2moe", "pruned-dense"), whole * 6 / 16),
        "mixture-of-blocks": whole * 6 / 16 / GROUP,
    }[name]
    assert one.active() == sizes.depth * wanted
    if name == "pruned-dense":
        routed = sizes.depth * whole * (16 - 6) / 16
        gates = sizes.depth * one.student.model.layers[0].mlp.router_EH.numel()
        assert used_parameters(one.student) == sum(p.numel() for p in one.student.parameters()) - routed - gates
        assert used_parameters(one.student) == sum(p.numel() for p in teacher.parameters()) - routed
    found = held_out_divergence(one.student, teacher, text.held_out, "cpu")
    assert found == pytest.approx(exact_divergence(one.student, teacher, text.held_out), rel=1e-3, abs=1e-6)
    assert trainers[-1].evaluations["kl"][-1] == pytest.approx(found, rel=1e-5)
    assert held_out_divergence(one.begun().eval(), teacher, text.held_out, "cpu") > 0


def test_an_ffn_with_all_experts_on_is_the_ffn(text):
    teacher = teacher_of("dense2moe")
    student = split_model(teacher, text, 4, 0)
    enter(student, "experts")
    for layer in student.model.layers:
        layer.mlp.k = layer.mlp.num_experts
        with torch.no_grad():
            layer.mlp.router_EH.zero_()  # then every weight is k / k
    ids_BT = text.held_out.ids_BT
    with torch.no_grad():
        torch.testing.assert_close(student(ids_BT).logits, teacher(ids_BT).logits, rtol=1e-4, atol=1e-4)


def test_each_phase_trains_what_it_says(text):
    student = split_model(teacher_of("dense2moe"), text, 4, 0)
    wanted = {"shared": {"shared_gate_up", "shared_down"}, "experts": {"gate_up_proj", "down_proj", "router_EH"}}
    wanted["blocks"] = {*wanted["shared"], *wanted["experts"], "rows_MH"}
    for phase, names in wanted.items():
        enter(student, phase)
        trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        assert {name.rpartition(".")[2] for name in trained} == names


def test_features_and_balance_reach_routers_and_gates(text):
    teacher = teacher_of("dense2moe")
    student = split_model(teacher, text, 4, 0)
    task = BlockTask(student, teacher, text, 0, features=True)
    assert set(task.loss(task.batch(0))[1]) == {"loss", "kl", "feature"}
    enter(student, "experts")
    enter(student, "blocks")
    loss, terms = BlockTask(student, teacher, text, 0, features=True).loss(task.batch(0))
    assert set(terms) == {"loss", "kl", "feature", "balance"}
    assert float(loss.detach()) == pytest.approx(
        sum(float(terms[name].detach()) for name in ("kl", "feature", "balance"))
    )
    loss.backward()
    grads = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    for name in ("router_EH", "rows_MH"):
        assert any(key.endswith(name) and grad is not None and bool(grad.any()) for key, grad in grads.items())
    assert student.model.layers[0].mlp.k == K


def test_one_token_changes_by_one_block_of_a_group(text):
    student = split_model(teacher_of("dense2moe"), text, 4, 0)
    enter(student, "blocks")
    with torch.no_grad():
        student(text.held_out.ids_BT)
    gate = student.model.layers[0].gate_of_group
    assert bool(((gate.weights_BTM > 0).sum(-1) == 1).all())
    torch.testing.assert_close(gate.weights_BTM.sum(-1), torch.ones(8, 40))  # equal at first: M times 1 / M


def test_the_oracle_sees_another_student(text):
    teacher, other = teacher_of("dense2moe"), new_model(TinyDense("smoke", seed=5)).eval()
    assert exact_divergence(teacher, teacher, text.held_out) == pytest.approx(0, abs=1e-9)
    assert exact_divergence(other, teacher, text.held_out) > 0.01
    assert exact_bits_per_byte(other, text.held_out) == pytest.approx(bits_per_byte(other, text.held_out), rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ("at_start", "the untrained divergence"),
        ("teacher_bits", "the teacher's bits per byte"),
        ("evaluation", "bits per byte"),
        ("output", "the divergence"),
        ("", ""),
    ],
)
def test_every_figure_is_held_against_its_definition(changed, name, text, tmp_path):
    teacher = teacher_of("dense2moe")
    trial = object.__new__(DistillationTrial)
    trial.teacher, trial.held_out, trial.trainers = teacher, text.held_out, []
    trial.before = sha256_of(*teacher.state_dict().values())
    trial.teacher_bits = bits_per_byte(teacher, text.held_out)
    trial.recipe = recipe("dense2moe", Setup(teacher, text, SETTINGS, tmp_path, "test"), 6)
    output = trial.run(0)
    if changed == "evaluation":
        trial.trainers[0].evaluations["bits_per_byte"][-1] *= 1.01
    elif changed in ("at_start", "teacher_bits"):
        setattr(trial, changed, 1.01 * getattr(trial, changed))
    check = trial.verify(0, 1.01 * output if changed == "output" else output)
    assert check.ok == (not changed)
    assert check.reason == (f"{name} differs from its definition" if changed else "")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model=smollm2"], "brings no text to be distilled on; use tinymoe or tinydense"),
        (["model=tinymoe"], "model 'tinymoe' is not trained here; run `moebench models train tinymoe`"),
    ],
)
def test_models_that_cannot_be_distilled_are_refused(settings, said, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    plan, _ = planned(["suite=distillation", *settings], Registry.load())
    assert len(plan.refused) == 2
    assert said in plan.refused[0].refusal


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="did you mean 'two-stage'"):
        Distillation(recipe=("two-stages",))
    with pytest.raises(ValueError, match="names, each once"):
        Distillation(recipe=("text", "text"))
    with pytest.raises(ValueError, match="steps must be at least 6"):
        Distillation(steps=2)
    with pytest.raises(MoebenchError, match="unknown recipe"):
        Registry.load().get("suite", "distillation").params_from({"recipe": ["x"]})
