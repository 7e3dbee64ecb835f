"""The trainer on a task of a few numbers: the same bits each time, whatever interrupts it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moebench.contracts import MoebenchError
from moebench.suites.models import substream
from moebench.suites.training import checkpoint
from moebench.suites.training.checkpoint import Checkpoint
from moebench.suites.training.settings import Settings
from moebench.suites.training.trainer import Trainer

SETTINGS = Settings(9, 1e-2, warmup=3, evaluate_every=4, checkpoint_every=2, seed=5)


class Regression:
    """Dropout draws from the global generator, and batch norm keeps buffers: both must come back."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    def batch(self, step):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(substream(1, "batch", step)))
        return x, x.sum(1, keepdim=True)

    def loss(self, batch):
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        return loss, {"loss": loss}

    def evaluate(self):
        return {"error": float(self.loss(self.batch(10**6))[0])}


def trained(folder, until=SETTINGS.steps, settings=SETTINGS, identity="regression"):
    trainer = Trainer(Regression(), settings, folder, identity)
    trainer.advance(until)
    return trainer


def state(trainer):
    tensors = {**trainer.task.model.state_dict()}
    for name, parameter in trainer.parameters.items():
        tensors |= {f"{key}.{name}": value for key, value in trainer.optimizer.state[parameter].items()}
    return tensors


def same(one, other):
    assert (one.step, one.curves, one.evaluated, one.evaluations) == (
        other.step,
        other.curves,
        other.evaluated,
        other.evaluations,
    )
    mine, theirs = state(one), state(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_same_start_gives_the_same_bits(tmp_path):
    same(trained(tmp_path / "a"), trained(tmp_path / "b"))


def test_another_seed_gives_other_bits(tmp_path):
    other = Settings(9, 1e-2, warmup=3, evaluate_every=4, checkpoint_every=2, seed=6)
    assert trained(tmp_path / "a").curves["loss"] != trained(tmp_path / "b", settings=other).curves["loss"]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, SETTINGS.steps - 1), max_size=3))
def test_interruptions_leave_no_trace(tmp_path_factory, stops):
    """After each stop nothing but the folder is left: steps since the newest checkpoint are made again."""
    whole, torn = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("torn")
    for stop in stops:
        trained(torn, stop)
        torch.randn(7)  # a generator that went elsewhere must not matter
    same(trained(whole), trained(torn))


def test_the_curves_say_what_happened(tmp_path):
    trainer = trained(tmp_path)
    assert trainer.curves["lr"] == [SETTINGS.lr_at(step) for step in range(9)]
    assert all(len(values) == 9 for values in trainer.curves.values())
    assert trainer.evaluated == [4, 8, 9]
    assert [path.name for path in sorted(tmp_path.glob("0*"))] == ["000000009"]


def test_training_lowers_the_error(tmp_path):
    settings = Settings(300, 1e-2, evaluate_every=1000, checkpoint_every=1000)
    trainer = trained(tmp_path, 300, settings)
    assert trainer.evaluations["error"][0] < 0.2 * trained(tmp_path / "new", 1).curves["loss"][0]


def test_gradients_are_clipped_and_weights_stay_float32(tmp_path):
    settings = Settings(3, 1e-2, clip=1e-6, weight_decay=0.0, dtype="bfloat16")
    before = {name: value.clone() for name, value in Regression().model.named_parameters()}
    trainer = trained(tmp_path, 3, settings)
    for parameter in trainer.parameters.values():
        assert parameter.dtype == torch.float32
        moment = trainer.optimizer.state[parameter]["exp_avg"]
        assert moment.dtype == torch.float32
        assert moment.norm() <= 1e-6
    assert not torch.equal(trainer.parameters["3.weight"], before["3.weight"])


def test_only_matrices_decay(tmp_path):
    trainer = Trainer(Regression(), SETTINGS, tmp_path, "regression")
    for group in trainer.optimizer.param_groups:
        assert group["weight_decay"] == (SETTINGS.weight_decay if group["params"][0].dim() >= 2 else 0)
        assert len({p.dim() >= 2 for p in group["params"]}) == 1


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    trained(tmp_path, 4)
    with pytest.raises(MoebenchError, match="another training; delete it"):
        trained(tmp_path, identity="other")


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_told_in_a_sentence(tmp_path, name):
    trained(tmp_path, 4)
    file = tmp_path / "000000004" / name
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(MoebenchError, match="delete it and run again"):
        trained(tmp_path)


def test_what_a_killed_writer_left_aside_is_no_checkpoint(tmp_path):
    trained(tmp_path, 4)
    left = tmp_path / ".aside-000000006-x" / "000000006"
    left.mkdir(parents=True)
    (left / "state.json").write_text("{")
    assert trained(tmp_path, 4).step == 4


def test_the_older_checkpoint_goes_when_the_newer_is_there(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, Checkpoint(step, {"a": torch.ones(2)}, {"x": math.inf}))
    found = checkpoint.latest(tmp_path)
    assert (found.step, found.state, found.tensors["a"].tolist()) == (2, {"x": math.inf}, [1.0, 1.0])
    assert len(list(tmp_path.glob("0*"))) == 1
    assert json.loads((tmp_path / "000000002" / "state.json").read_text()) == {"x": math.inf}


@given(st.integers(1, 500), st.integers(0, 500), st.floats(0, 1))
def test_the_learning_rate_rises_then_falls(steps, warmup, final):
    if warmup > steps:
        with pytest.raises(ValueError, match="warmup"):
            Settings(steps, 1.0, warmup)
        return
    rates = [Settings(steps, 1.0, warmup, final).lr_at(step) for step in range(steps)]
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert warmup < 1 or rates[warmup - 1] == 1
    assert steps - warmup < 2 or rates[-1] == pytest.approx(final)


def test_the_core_is_small():
    folder = Path(checkpoint.__file__).parent
    core = ("settings", "task", "trainer", "checkpoint", "job", "trial")
    assert sum(len((folder / f"{name}.py").read_text().splitlines()) for name in core) <= 400
