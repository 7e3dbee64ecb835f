"""The trials of one layer: rotation, variants, cold copies, shared experts, gradients and counted bytes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from moebench.bench.config import load
from moebench.bench.plan import make_plan
from moebench.bench.worker import _Held
from moebench.contracts import Registry
from moebench.moe.oracle_gradients import reference_gradients
from moebench.suites import layer
from moebench.suites.layer import STEPS, LayerTrial
from moebench.suites.layer_training import TrainingTrial
from moebench.suites.memory import PeakBytes, saved_bytes
from moebench.suites.quality.block import MoEBlock
from moebench.suites.subject import make_batch, prepare_subject

REGISTRY = Registry.load()
CACHE_BYTES = 2.0**20
MEMORY = 2.0**32


def cases(*settings, seed=0):
    config = load([*settings, f"seed={seed}"], REGISTRY, MEMORY, CACHE_BYTES)
    plan = make_plan(config, REGISTRY, MEMORY)
    assert not plan.refused, plan.refused[0].refusal
    return plan.cases


def only_case(*settings, **kwargs):
    (case,) = cases(*settings, **kwargs)
    return case


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def all_ok(trial, turns=2):
    for _ in range(turns):
        trial.begin_turn()
        for step in range(trial.steps):
            check = trial.verify(step, trial.run(step))
            assert check.ok, check.reason
    return True


@pytest.mark.parametrize("boundary", ["topk", "sorted", "logits"])
@pytest.mark.parametrize("backend", ["reference", "eager", "batched", "grouped"])
def test_every_boundary_is_right_on_every_backend(boundary, backend):
    case = only_case(
        "suite=throughput", "model=tiny", "axes.tokens=9", f"axes.boundary={boundary}", f"axes.backend={backend}"
    )
    assert all_ok(LayerTrial(case, REGISTRY))


@pytest.mark.parametrize("model", ["small", "deepseek-v3", "switch-base-8", "qwen1.5-moe-a2.7b"])
def test_presets_run_with_their_own_routing_and_shared_experts(model):
    small = ("model.hidden=64", "model.width=32", "model.experts=16")
    case = only_case("suite=throughput", f"model={model}", *small, "axes.tokens=3", "axes.backend=eager")
    trial = LayerTrial(case, REGISTRY)
    assert all_ok(trial, turns=1)
    shared = trial.subject.layer.shared
    assert (shared is not None) == (model in ("deepseek-v3", "qwen1.5-moe-a2.7b"))


SHARED = {"dit_moe": "none", "time_moe": "sigmoid", "pr_moe": "softmax2", "adamoe_vla": "none"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["reference", "grouped"])
@pytest.mark.parametrize("routing", SHARED)
def test_schemes_run_with_their_shared_experts(routing, backend, dtype):
    model = ("model=tiny", "model.experts=8", "axes.tokens=9", f"axes.backend={backend}", f"axes.dtype={dtype}")
    trial = LayerTrial(only_case("suite=throughput", *model, f"axes.routing={routing}"), REGISTRY)
    assert all_ok(trial, turns=1)
    shared = trial.subject.layer.shared
    assert (shared.gate_H is not None, shared.mix_2H is not None) == (
        SHARED[routing] == "sigmoid",
        SHARED[routing] == "softmax2",
    )
    trial.begin_turn()
    routed_TH = trial.out[0].clone()
    next(trial.executors)(trial.x[0], *trial.inputs[0], out_TH=routed_TH)
    assert not trial.verify(0, routed_TH).ok, "without the shared expert the output passes as well"
    if shared.mix_2H is not None:
        assert not trial.verify(0, routed_TH + shared(trial.x[0])).ok, "the routed factor does not matter"


def test_an_ungated_model_has_an_ungated_residual():
    small = ("model.hidden=64", "model.width=32", "model.experts=8", "axes.tokens=5", "axes.backend=eager")
    trial = LayerTrial(only_case("suite=throughput", "model=switch-base-8", *small, "axes.routing=pr_moe"), REGISTRY)
    assert all_ok(trial, turns=1)
    assert tuple(trial.subject.layer.shared.gate_up.shape) == (32, 64)
    assert not trial.subject.layer.shared.gated


def test_a_model_keeps_its_own_shared_expert():
    case = only_case(
        "suite=throughput",
        "model=tiny",
        "model.shared_width=16",
        "axes.backend=eager",
        "axes.routing=pr_moe",
        "axes.tokens=8",
    )
    trial = LayerTrial(case, REGISTRY)
    assert all_ok(trial, turns=1)
    assert trial.subject.layer.shared.mix_2H is None
    assert trial.subject.layer.shared.down.shape[1] == 16


def test_structures_of_experts_are_right_on_every_backend():
    backends = "axes.backend=[reference,eager,batched,grouped]"
    by = "params.structure.prune.by=[utilisation,random]"
    found = cases(
        "suite=throughput", "model=tiny", "axes.tokens=9", "axes.structure=[none,prune,aggregate]", by, backends
    )
    assert len(found) == 16
    assert len({case.method_key for case in found}) == 4
    experts = {LayerTrial(case, REGISTRY).subject.spec.experts for case in found if all_ok(LayerTrial(case, REGISTRY))}
    assert experts == {4, 8, 16}


@pytest.mark.parametrize("traffic", ["gaussian", "uniform", "balanced", "zipf", "hotspot", "dead", "bursty"])
def test_every_traffic_reaches_the_experts(traffic):
    case = only_case(
        "suite=throughput", "model=tiny", "axes.tokens=16", "axes.backend=eager", f"axes.traffic={traffic}"
    )
    trial = LayerTrial(case, REGISTRY)
    assert all_ok(trial, turns=1)
    names = [series.name for series in trial.facts().series]
    assert ("requested_share" in names) == (traffic != "gaussian")


def test_each_turn_has_other_inputs_in_the_same_buffer():
    trial = LayerTrial(only_case("suite=throughput", "model=tiny", "axes.tokens=8", "axes.backend=eager"), REGISTRY)
    seen = []
    for _ in range(2):
        trial.begin_turn()
        seen.append((trial.x[0].data_ptr(), trial.x[0].clone()))
    assert seen[0][0] == seen[1][0]
    assert not torch.equal(seen[0][1], seen[1][1])


def test_a_remembered_answer_is_wrong():
    trial = LayerTrial(only_case("suite=throughput", "model=tiny", "axes.tokens=8", "axes.backend=eager"), REGISTRY)
    trial.begin_turn()
    remembered = trial.run(0).clone()
    trial.begin_turn()
    assert not trial.verify(0, remembered).ok


def test_an_unwritten_output_is_wrong():
    trial = LayerTrial(only_case("suite=throughput", "model=tiny", "axes.tokens=8", "axes.backend=eager"), REGISTRY)
    trial.begin_turn()
    output = trial.run(0)
    output[3, 5:] = torch.nan
    check = trial.verify(0, output)
    assert not check.ok
    assert "unwritten" in check.reason


def test_cold_weights_rotate_through_copies_that_pass_the_cache():
    case = only_case("suite=throughput", "model=tiny", "axes.tokens=2", "axes.backend=eager", "axes.residency=cold")
    trial = LayerTrial(case, REGISTRY)
    stores = trial._stores()
    assert sum(store.nbytes for store in stores) >= CACHE_BYTES
    assert len({store.gate_up.data_ptr() for store in stores}) == len(stores)
    assert all_ok(trial, turns=1)
    assert trial.cost(0).footprint >= CACHE_BYTES
    fewest = min(batch.routing.counts_E.count_nonzero() for batch in trial.batches) / stores[0].num_experts
    assert (len(stores) - 1) * fewest * stores[0].nbytes >= CACHE_BYTES


def test_cost_counts_distinct_experts_and_two_flops_per_weight():
    case = only_case("suite=throughput", "model=tiny", "axes.tokens=1", "axes.backend=eager", "axes.residency=warm")
    cost = LayerTrial(case, REGISTRY).cost(0)
    assert cost.distinct_experts == cost.assignments == 2
    assert cost.flops == 2 * 2 * 3 * 64 * 32
    assert cost.bytes == 2 * 3 * 64 * 32 * 4 + 2 * 64 * 4


def active_parameters(*settings):
    """(Active parameters per token, the router's own, the subject, all batches) of a layer of the tiny model."""
    trial = LayerTrial(only_case("suite=throughput", "model=tiny", "axes.backend=eager", *settings), REGISTRY)
    metrics = {metric.name: metric.value for metric in trial.facts().metrics}
    return metrics["active_params_per_token"], metrics["router_parameters"], trial.subject, trial.batches


def test_active_parameters_are_those_of_a_tokens_experts_and_of_what_is_always_on():
    expert, router = 3 * 64 * 32, 8 * 64
    assert active_parameters("axes.tokens=16")[:2] == (2 * expert + router, router)
    assert active_parameters("axes.tokens=16", "axes.routing=switch")[0] == expert + router
    assert active_parameters("axes.tokens=16", "model.shared_width=32")[0] == 3 * expert + router


def test_active_parameters_follow_the_routings_that_were_run():
    active, router, subject, batches = active_parameters("axes.tokens=16", "axes.routing=moepp")
    size = {"ffn": 3 * 64 * 32, "constant": 3 * 64, "copy": 0, "zero": 0}
    entries = [e for batch in batches for e in batch.routing.expert_N.tolist()]
    read = sum(size[subject.spec.kinds[expert]] for expert in entries)
    assert active == pytest.approx(read / (16 * len(batches)) + router)
    assert active < 2 * size["ffn"] + router


def test_the_schemes_of_experiment_routing_speed_have_equal_active_parameters():
    """Two experts of width 256 or one of 512, but for the router and the tenth that choices by threshold may be off."""
    seen = set()
    for case in cases("experiment=routing_speed"):
        if case.suite == "throughput" and case.backend.name == "grouped":
            subject = prepare_subject(case, REGISTRY)
            batches = [make_batch(case, REGISTRY, subject, step) for step in range(STEPS)]
            active, router = (metric.value for metric in layer.active_parameters(subject, batches))
            assert active - router == pytest.approx(2 * 3 * 512 * 256, rel=0.1), case.routing
            seen.add(case.routing.name)
    assert len(seen) == 15


@pytest.mark.parametrize("backend", ["eager", "grouped"])
def test_training_steps_are_right_and_their_bytes_are_counted(backend):
    case = only_case("suite=training", "model=tiny", "axes.tokens=12", f"axes.backend={backend}")
    trial = TrainingTrial(case, REGISTRY)
    assert all_ok(trial)
    metrics = {metric.name: metric.value for metric in trial.facts().metrics}
    assert metrics == {metric.name: metric.value for metric in trial.facts().metrics}
    assert 0 < metrics["saved_tensor_bytes"] <= metrics["peak_step_bytes"]


def test_a_wrong_gradient_is_caught():
    trial = TrainingTrial(only_case("suite=training", "model=tiny", "axes.backend=eager"), REGISTRY)
    trial.begin_turn()
    y_TH, gradients = trial.run(0)
    off = dataclasses.replace(gradients, down=gradients.down * 1.01)
    assert trial.verify(0, (y_TH, gradients)).ok
    assert not trial.verify(0, (y_TH, off)).ok


def test_training_through_a_shared_expert_is_right():
    case = only_case("suite=training", "model=tiny", "model.shared_width=32", "axes.backend=eager")
    assert all_ok(TrainingTrial(case, REGISTRY), turns=1)


@pytest.mark.parametrize("routing", ["time_moe", "pr_moe"])
def test_training_through_a_gated_shared_expert_is_right(routing):
    """The gate is a function of x as well, and with softmax2 of what the experts' weights get."""
    case = only_case("suite=training", "model=tiny", f"axes.routing={routing}", "axes.backend=eager", "axes.tokens=12")
    trial = TrainingTrial(case, REGISTRY)
    assert all_ok(trial, turns=1)
    batch = trial.batches[trial._batch_number(0)]
    plain = reference_gradients(trial.subject.layer.store, batch.routing, batch.x_TH, trial.grad_TH)
    same = torch.equal(plain.down, trial.expected[trial._batch_number(0)].down)
    assert same == (routing == "time_moe"), "only softmax2 scales what the experts get"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_of_a_language_model_mixes_its_shared_expert_in(dtype):
    case = only_case(
        "suite=throughput",
        "model=tiny",
        "axes.routing=pr_moe",
        "axes.backend=eager",
        "axes.tokens=8",
        f"axes.dtype={dtype}",
    )
    trial, calls = LayerTrial(case, REGISTRY), []
    subject = trial.subject
    block = MoEBlock(0, subject, trial.session.layer(0), calls, 0, torch.nn.Identity())
    y_BTH = block(torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)))
    assert (y_BTH.shape, y_BTH.dtype) == ((2, 5, 64), torch.float32)
    (call,) = calls
    assert call.y_TH.dtype == call.x_TH.dtype
    assert call.check().ok, call.check().reason
    bare = dataclasses.replace(subject, layer=dataclasses.replace(subject.layer, shared=None))
    unmixed = MoEBlock(0, bare, trial.session.layer(0), [], 0, torch.nn.Identity())
    unmixed(call.x_TH.view(2, 5, 64))
    assert not dataclasses.replace(call, y_TH=unmixed.calls[0].y_TH).check().ok


def test_saved_and_peak_bytes_of_a_known_graph():
    x = torch.ones(1024, requires_grad=True)

    def step():
        return (x.exp() * 2).sum()

    assert saved_bytes(step, [x]) == 4096  # exp keeps its result; doubling and adding up keep nothing
    with PeakBytes([x]) as peak:
        step()
    assert peak.peak == 2 * 4096 + 4


def test_inputs_are_the_same_for_all_backends_of_a_group():
    found = {
        LayerTrial(case, REGISTRY).input_sha256
        for case in cases("suite=throughput", "model=tiny", "axes.tokens=8", "axes.backend=[eager,grouped,reference]")
    }
    assert len(found) == 1
    other = only_case("suite=throughput", "model=tiny", "axes.tokens=8", "axes.backend=eager", seed=1)
    assert LayerTrial(other, REGISTRY).input_sha256 not in found


def test_steps_are_distinct_inputs():
    trial = LayerTrial(only_case("suite=throughput", "model=tiny", "axes.tokens=8", "axes.backend=eager"), REGISTRY)
    trial.begin_turn()
    assert len({tuple(x.flatten().tolist()) for x in trial.x}) == STEPS


@pytest.mark.parametrize("boundary", ["topk", "sorted", "logits"])
def test_inputs_are_exchanged_where_they_lie(boundary):
    case = only_case(
        "suite=throughput", "model=tiny", "axes.tokens=8", "axes.backend=eager", f"axes.boundary={boundary}"
    )
    trial = LayerTrial(case, REGISTRY)
    trial.begin_turn()
    places = [(t.data_ptr(), t.tolist()) for inputs in trial.inputs for t in inputs]
    trial.begin_turn()
    exchanged = [(t.data_ptr(), t.tolist()) for inputs in trial.inputs for t in inputs]
    assert [pointer for pointer, _ in places] == [pointer for pointer, _ in exchanged]
    assert [values for _, values in places] != [values for _, values in exchanged]


def test_calls_take_the_copies_of_cold_weights_in_turn():
    case = only_case("suite=throughput", "model=tiny", "axes.tokens=2", "axes.backend=eager", "axes.residency=cold")
    trial = LayerTrial(case, REGISTRY)
    used = []
    trial.executors = itertools.cycle([lambda *a, n=n, out_TH: used.append(n) for n in range(trial._copies)])
    for call in range(2 * trial._copies):
        trial.run(call % trial.steps)
    assert used == [*range(trial._copies)] * 2


def test_experts_that_are_never_chosen_do_not_count_as_cold():
    settings = ("suite=throughput", "model=small", "axes.tokens=1", "axes.backend=eager", "axes.residency=cold")
    trial = LayerTrial(only_case(*settings), REGISTRY)
    chosen = {expert for batch in trial.batches for expert in batch.inputs[0].flatten().tolist()}
    store = trial.subject.layer.store
    assert len(chosen) < store.num_experts
    assert trial.cost(0).footprint == trial._copies * store.nbytes * len(chosen) / store.num_experts


# --- experts that are no FFNs of the model ---------------------------------------------------------------------------

SMALL = ("suite=throughput", "model=tiny", "axes.tokens=17")
OWN_EXPERTS = {
    "peer": ("axes.structure=neurons", "params.routing.peer.key_width=16"),
    "ultramem": ("axes.structure=neurons", "params.routing.ultramem.key_width=16"),
    "bam": ("axes.structure=attention",),
}


def planned(*settings):
    return make_plan(load(list(settings), REGISTRY, MEMORY, CACHE_BYTES), REGISTRY, MEMORY)


@pytest.mark.parametrize("boundary", ["topk", "sorted"])
@pytest.mark.parametrize("routing", OWN_EXPERTS)
def test_layers_of_neurons_and_of_attentions_are_right(routing, boundary):
    wanted = (f"axes.routing={routing}", *OWN_EXPERTS[routing], f"axes.boundary={boundary}")
    case = only_case(*SMALL, *wanted, "axes.backend=reference")
    trial = LayerTrial(case, REGISTRY)
    assert all_ok(trial)
    facts = {metric.name: metric.value for metric in trial.facts().metrics}
    batch, store = trial.batches[0], trial.subject.layer.store
    assert facts["ffn_k_mean"] == facts["k_mean"] == len(batch.routing.token_N) / 17
    distinct = int((batch.routing.counts_E > 0).sum())
    assert trial.cost(0).distinct_experts == distinct
    assert trial.cost(0).bytes == distinct * store.nbytes / len(store.kinds) + 2 * batch.x_TH.nbytes


def test_an_attention_costs_its_weights_and_the_pairs_that_it_looks_at():
    case = only_case(*SMALL, "axes.routing=bam", *OWN_EXPERTS["bam"], "axes.backend=reference")
    pairs = 17 * 18 // 2
    assert LayerTrial(case, REGISTRY).cost(0).flops == 4 * (2 * 17 * 4 * 64 * 64 + 4 * 64 * pairs)


@pytest.mark.parametrize("routing", ["uoe", "mohd"])
@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_slices_of_a_layer_run_anywhere(routing, backend):
    case = only_case(*SMALL, f"axes.routing={routing}", f"axes.backend={backend}")
    assert all_ok(LayerTrial(case, REGISTRY))


def test_training_reaches_the_rows_that_are_gathered():
    fixed = ("suite=training", "model=tiny", "axes.tokens=12", "axes.backend=reference")
    case = only_case(*fixed, "axes.routing=peer", *OWN_EXPERTS["peer"])
    assert all_ok(TrainingTrial(case, REGISTRY), turns=1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("axes.routing=peer", "axes.backend=reference"), "use axes.structure=neurons."),
        (("axes.routing=ultramem", "axes.backend=reference"), "use axes.structure=neurons."),
        (("axes.routing=bam", "axes.backend=reference"), "use axes.structure=attention."),
        (("axes.routing=peer", "axes.structure=neurons", "axes.backend=grouped"), "no 'gather' experts; use the ref"),
        (("axes.routing=bam", "axes.structure=attention", "axes.backend=batched"), "no 'sequence' experts; use the"),
        (("axes.routing=topk", "axes.structure=attention", "axes.backend=eager"), "use axes.routing=bam"),
        (("axes.routing=bam", "axes.structure=attention", "axes.sparsity=teal"), "attentions have no activations"),
        (("axes.routing=bam", "axes.structure=attention", "axes.pass=forward_backward"), "through sequence experts"),
        (("axes.structure=attention", "params.structure.attention.heads=5"), "heads=5 do not divide"),
    ],
)
def test_what_does_not_fit_is_skipped_with_a_reason(settings, sentence):
    plan = planned(*SMALL, *settings)
    assert not plan.cases
    assert sentence in plan.refused[0].refusal


def test_a_shared_expert_beside_packed_ones_is_no_falling_back():
    """It runs dense, outside the backend, which is still watched: its own plain products are seen."""
    packed = ("axes.backend=packed", "axes.quantization=int8", "axes.dtype=bfloat16", "axes.residency=warm")
    case = only_case("suite=throughput", "model=tiny", "model.shared_width=32", *packed, "axes.tokens=16")
    trial = LayerTrial(case, REGISTRY)
    assert trial.subject.layer.shared is not None
    assert _Held(trial, case).excluded_operators() == []
    trial.begin_turn()
    assert trial.verify(0, trial.run(0)).ok
    dense = only_case("suite=throughput", "model=tiny", "axes.backend=eager", "axes.tokens=16", "axes.residency=warm")
    excluding = dataclasses.replace(
        dense, execution=dataclasses.replace(dense.execution, excludes=("aten.mm.default",))
    )
    assert _Held(LayerTrial(excluding, REGISTRY), excluding).excluded_operators() == ["aten.mm.default"]
