"""A layer's trial on another device than the CPU: everything is put there, and checked against the CPU's reference."""

import pytest
import torch

from moebench.backends import rules
from moebench.contracts import Availability, Evidence
from moebench.kernels import devices
from moebench.moe.placement import device_of, placed
from moebench.suites.layer import LayerTrial
from moebench.suites.layer_training import TrainingTrial

TINY = ("suite=throughput", "model=tiny", "axes.tokens=5")


def all_ok(trial):
    for _ in range(2):
        trial.begin_turn()
        for step in range(trial.steps):
            check = trial.verify(step, trial.run(step))
            assert check.ok, check.reason


def trial_there(fake, registry, make_case, *settings, trial=LayerTrial):
    case = make_case(fake.NAME, *TINY, *settings)
    made = trial(case, registry)
    assert {tensor.device.type for tensor in (*made.x, *made.out, *made.inputs[0])} == {fake.NAME}
    return made


@pytest.mark.parametrize(
    ("backend", "boundary"),
    [("reference", "topk"), ("batched", "topk"), ("grouped", "sorted")],
)
def test_every_backend_runs_there_and_is_right(fake, registry, make_case, backend, boundary):
    with fake.Elsewhere() as device:
        trial = trial_there(fake, registry, make_case, f"axes.backend={backend}", f"axes.boundary={boundary}")
        before = device.seen
        all_ok(trial)
        assert device.seen > before  # the calls' operators ran on tensors of the device


NEURONS = ("axes.structure=neurons", "params.routing.peer.key_width=16", "axes.residency=warm")
LAYERS = {
    "folded": ("axes.backend=grouped", "axes.routing=moepp"),
    "kinds": ("axes.backend=reference", "axes.routing=moepp"),
    "gather": ("axes.backend=reference", "axes.routing=peer", *NEURONS),
    "attention": ("axes.backend=reference", "axes.routing=bam", "axes.structure=attention"),
    "packed": ("axes.backend=eager", "axes.quantization=int4", "params.quantization.int4.group=32"),
    "sparse": ("axes.backend=reference", "axes.sparsity=teal"),
    "logits": ("axes.backend=eager", "axes.boundary=logits"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_is_put_there_whole(fake, registry, make_case, name):
    with fake.Elsewhere():
        all_ok(trial_there(fake, registry, make_case, *LAYERS[name]))


def test_a_training_step_runs_there_and_its_gradients_are_right(fake, registry, make_case):
    with fake.Elsewhere():
        settings = ("axes.pass=forward_backward", "axes.backend=eager", "axes.routing=time_moe")
        all_ok(trial_there(fake, registry, make_case, *settings, trial=TrainingTrial))


def test_a_wrong_answer_of_the_device_is_wrong(fake, registry, make_case):
    with fake.Elsewhere():
        trial = trial_there(fake, registry, make_case, "axes.backend=eager")
        trial.begin_turn()
        out = trial.run(0)
        out[0, 0] += 1.0
        assert not trial.verify(0, out).ok


def test_weights_lie_on_a_device_once_cold_or_not(fake, registry, make_case):
    with fake.Elsewhere():
        cold = trial_there(fake, registry, make_case, "axes.backend=eager", "axes.residency=cold")
        warm = trial_there(fake, registry, make_case, "axes.backend=grouped", "axes.residency=warm")
        (one,), (other,) = cold._stores(), warm._stores()
        assert one.gate_up is other.gate_up
        assert device_of(one).type == fake.NAME


def test_placed_keeps_what_lies_there_already():
    x = torch.ones(2)
    found = placed({"a": (x, [x, 3]), "b": None}, "cpu")
    assert found["a"][0] is x
    assert found["a"][1][1] == 3
    assert device_of((1, {"x": x.to("meta")})).type == "meta"
    assert device_of("nothing").type == "cpu"


# ---------------------------------------------------------------------------------------------------------------------
# In the plan


@pytest.fixture
def gpu_here(monkeypatch):
    """Pretend that the driver counts a device and that torch is built for it."""
    monkeypatch.setattr(devices, "missing", lambda *platforms: "")
    monkeypatch.setattr("moebench.suites.device.metadata.version", lambda name: "2.13.0")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(devices, "missing", lambda *platforms: "no CUDA device: its driver counts none")


def refusals(plan):
    return {planned.refusal for planned in plan.refused}


def test_a_device_that_is_not_here_is_refused_in_one_sentence(no_gpu, plan_of):
    plan = plan_of(*TINY, "device=cuda", "axes.backend=[eager,grouped]")
    assert not plan.cases
    (sentence,) = refusals(plan)
    assert sentence == (
        "device=cuda is not here (no CUDA device: its driver counts none); leave it out to measure on the CPU."
    )
    assert {planned.case.evidence for planned in plan.refused} == {Evidence.MEASURED_GPU}


def test_a_training_is_refused_before_it_starts(no_gpu, plan_of):
    plan = plan_of("suite=pretraining", "model=tinymoe", "device=cuda")
    assert not plan.cases
    assert all("is not here" in sentence for sentence in refusals(plan))


def test_a_torch_without_gpus_is_refused(monkeypatch, plan_of):
    monkeypatch.setattr(devices, "missing", lambda *platforms: "")
    monkeypatch.setattr("moebench.suites.device.metadata.version", lambda name: "2.13.0+cpu")
    (sentence,) = refusals(plan_of(*TINY, "device=cuda"))
    assert sentence.startswith("torch 2.13.0+cpu is built without GPUs; install")


def test_an_unknown_device_is_refused(plan_of):
    (sentence,) = refusals(plan_of(*TINY, "device=cuba"))
    assert sentence == "unknown device 'cuba': did you mean 'cuda' or 'cpu'?"


def test_the_layer_suites_plan_for_a_gpu(gpu_here, plan_of):
    plan = plan_of(*TINY, "device=cuda", "axes.backend=[reference,eager,grouped]", "axes.residency=[cold,warm]")
    assert not plan.refused
    assert {case.evidence for case in plan.cases} == {Evidence.MEASURED_GPU}
    policy = {case.residency: case.workload["l2"] for case in plan.cases}
    assert policy == {"cold": "flushed", "warm": "kept"}


def test_what_stays_on_the_cpu_is_refused_on_a_gpu(gpu_here, plan_of):
    assert "'packed' does not run on cuda" in "".join(refusals(plan_of(*TINY, "device=cuda", "axes.backend=packed")))
    for suite in ("roofline", "routing"):
        plan = plan_of(f"suite={suite}", "device=cuda")
        assert not plan.cases
        assert any(f"suite '{suite}' runs on cpu alone" in sentence for sentence in refusals(plan))


def test_a_graph_needs_a_gpu_and_warm_calls_of_one_shape(gpu_here, plan_of):
    (on_cpu,) = refusals(plan_of(*TINY, "cuda_graph=true"))
    assert "needs a GPU" in on_cpu
    graph = (*TINY, "device=cuda", "cuda_graph=true", "axes.backend=grouped")
    assert "warm L2" in "".join(refusals(plan_of(*graph, "axes.residency=cold")))
    assert "boundary of one shape" in "".join(refusals(plan_of(*graph, "axes.residency=warm", "axes.boundary=sorted")))
    (case,) = plan_of(*graph, "axes.residency=warm").cases
    (plain,) = plan_of(*TINY, "device=cuda", "axes.backend=grouped", "axes.residency=warm").cases
    assert case.workload["cuda_graph"] is True
    assert case.group_key != plain.group_key


def test_backends_of_torch_are_measured_where_they_run(gpu_here):
    found = rules.wherever_torch_runs()
    assert found.evidence_on("cpu") == Evidence.MEASURED_CPU
    assert found.evidence_on("cuda") == Evidence.MEASURED_GPU


def test_without_a_gpu_they_say_the_cpu_alone(no_gpu):
    assert rules.wherever_torch_runs() == Availability(True)


@pytest.mark.parametrize(
    ("evidence", "device", "expected"),
    [
        ((Evidence.INTERPRETED, Evidence.MEASURED_GPU), "cpu", Evidence.INTERPRETED),
        ((Evidence.INTERPRETED, Evidence.MEASURED_GPU), "cuda", Evidence.MEASURED_GPU),
        ((Evidence.MEASURED_GPU, Evidence.MEASURED_CPU), "cpu", Evidence.MEASURED_CPU),
        ((Evidence.HOST_EXECUTED, Evidence.STATIC_COMPILE), "cpu", Evidence.HOST_EXECUTED),
    ],
)
def test_evidence_is_that_of_the_device(evidence, device, expected):
    assert Availability(True, evidence=evidence).evidence_on(device) == expected
