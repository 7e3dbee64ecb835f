"""Layers that leave activations out: what a skipping execution must do and read, its figures, and its cold copies."""

from __future__ import annotations

import pytest

from moebench.backends.column_skip import ColumnSkip
from moebench.backends.plugins import ColumnSkip as Params
from moebench.bench.config import load
from moebench.bench.plan import make_plan
from moebench.contracts import LayerSpec, Planned, Registry, SparsitySpec
from moebench.moe.channel_use import needed_work
from moebench.suites import layer
from moebench.suites.base import SuiteConfig
from moebench.suites.cold import kept_share
from moebench.suites.layer import LayerTrial
from moebench.suites.leaving_out import counted

REGISTRY = Registry.load()
MEMORY, CACHE_BYTES = 2.0**32, 2.0**20
SMALL = ("suite=latency", "model=tiny", "model.hidden=64", "model.width=48", "model.experts=4")

pytestmark = pytest.mark.skipif(
    not ColumnSkip(Params()).availability().available, reason="column_skip needs a C compiler"
)


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))
    monkeypatch.setattr(layer, "_COPIES", {})


def trial(*settings, backend="column_skip", level=0.5):
    chosen = ("axes.sparsity=teal", f"params.sparsity.teal.level={level}", f"axes.backend={backend}")
    plan = make_plan(load([*SMALL, *chosen, *settings], REGISTRY, MEMORY, CACHE_BYTES), REGISTRY, MEMORY)
    (case,) = plan.cases
    return LayerTrial(case, REGISTRY)


def run_all(made):
    made.begin_turn()
    for step in range(made.steps):
        check = made.verify(step, made.run(step))
        assert check.ok, check.reason
    return made


def metrics(made):
    return {metric.name: metric.value for metric in made.facts().metrics}


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_skipping_execution_counts_the_work_that_is_left_and_a_mask_all_of_it(tokens):
    settings = (f"axes.tokens={tokens}", "axes.residency=warm")
    skip, mask = trial(*settings), trial(*settings, backend="eager")
    store, batch = skip.subject.layer.store, skip.batches[0]
    work = needed_work(store, batch.routing, batch.x_TH)
    assert skip.cost(0).flops == 2.0 * work.products
    assert skip.cost(0).bytes == 4.0 * work.weights + 2 * batch.x_TH.nbytes
    dense = 3 * 64 * 48 * skip.cost(0).assignments
    assert mask.cost(0).flops == 2.0 * dense
    assert skip.cost(0).flops < 0.7 * mask.cost(0).flops
    assert skip.cost(0).bytes < mask.cost(0).bytes


def test_figures_tell_what_tokens_leave_out_alone_and_together_and_what_the_kernel_read():
    made = run_all(trial("axes.tokens=10", "axes.residency=warm"))
    found = metrics(made)
    for site in ("input", "hidden"):
        assert 0 <= found[f"cls_8_{site}"] <= found[f"tls_{site}"]
        assert 1 - found[f"union_density_{site}"] <= found[f"cls_8_{site}"] + 1e-12
        assert 0 < found[f"kernel_density_{site}"] < found[f"kernel_union_density_{site}"] <= 1
        assert found[f"kernel_density_{site}"] == pytest.approx(found[f"density_{site}"], abs=0.1)
    assert 0 < found["weight_density"] < 1
    assert made.facts().executed.sparse == "skip"


def test_a_mask_has_the_figures_of_the_method_and_counts_of_no_kernel():
    masked = metrics(run_all(trial("axes.tokens=8", "axes.residency=warm", backend="eager")))
    skipped = metrics(run_all(trial("axes.tokens=8", "axes.residency=warm")))
    method = [name for name in skipped if name.startswith(("tls", "cls", "union", "weight_density"))]
    assert len(method) == 7
    assert {name: masked[name] for name in method} == {name: skipped[name] for name in method}
    assert not [name for name in masked if name.startswith("kernel_")]


def test_a_dense_layer_has_none_of_them():
    plan = make_plan(load([*SMALL, "axes.backend=column_skip"], REGISTRY, MEMORY, CACHE_BYTES), REGISTRY, MEMORY)
    found = metrics(LayerTrial(plan.cases[0], REGISTRY))
    assert not [name for name in found if name.startswith(("tls", "cls", "union", "weight_density", "kernel_"))]


def test_cold_copies_are_as_many_as_what_is_kept_needs_and_share_their_weights():
    half, little = run_all(trial("axes.tokens=1")), run_all(trial("axes.tokens=1", level=0.8))
    assert half.case.residency == little.case.residency == "cold"
    assert little._copies > 2 * half._copies
    between = (little._copies - 1) * half.subject.layer.store.nbytes * half.subject.spec.max_k / 4
    assert between * kept_share(little.subject.spec) >= 1.2 * CACHE_BYTES * (1 - 1e-9)
    (copies,) = layer._COPIES.values()
    assert len(copies) == little._copies
    for made in (half, little):
        stores = made._stores()
        assert len({store.gate_up.data_ptr() for store in stores}) == made._copies
        assert all(store.gate_up is copy.gate_up for store, copy in zip(stores, copies, strict=False))
        assert {id(store.sparsity) for store in stores} == {id(made.subject.layer.store.sparsity)}
    forms = [[executor.columns.form for executor in made.session._executors.values()] for made in (half, little)]
    assert all(first is second for first, second in zip(*forms, strict=False))
    activations = 2 * little.batches[0].x_TH.nbytes  # which no copy has
    assert little.cost(0).footprint == little._copies * (little.cost(0).bytes - activations)


@pytest.mark.parametrize(
    ("sites", "gated", "share"),
    [
        (("input", "hidden"), True, 0.25),
        (("input",), True, (0.25 + 0.25 + 1) / 3),
        (("hidden",), True, (1 + 1 + 0.25) / 3),
        (("gate",), True, (1 + 0.25 + 0.25) / 3),
        (("input", "hidden"), False, 0.25),
        (("hidden",), False, (1 + 0.25) / 2),
        ((), True, 1.0),
    ],
)
def test_the_share_of_weights_that_a_level_keeps(sites, gated, share):
    spec = LayerSpec(64, 48, ("ffn",) * 4, gated=gated, sparsity=SparsitySpec(sites, level=0.75))
    assert kept_share(spec) == pytest.approx(share)


def planned(*settings) -> list[Planned]:
    config: SuiteConfig = load([*SMALL, *settings], REGISTRY, MEMORY, CACHE_BYTES).blocks[0]
    return list(REGISTRY.get("suite", "latency").create().cases(config, REGISTRY))


def test_a_plan_counts_shared_copies_and_shared_forms_once():
    levels = ("axes.tokens=1", "axes.sparsity=[none,teal]", "params.sparsity.teal.level=[0.5,0.8]")
    items = planned(*levels, "axes.backend=[column_skip,eager]")
    assert len({item.copies_key for item in items}) == 1
    layer_bytes = 4 * 3 * 64 * 48 * 4
    for item in items:
        copies = item.copies_bytes / layer_bytes
        assert copies == round(copies) >= 2
        assert item.own_bytes == (item.copies_bytes if item.case.backend.name == "column_skip" else 0)
        assert item.bytes_alone == item.method_bytes + item.copies_bytes + item.own_bytes
    sparse = [item for item in items if item.case.sparsity.name == "teal"]
    assert len({item.own_key for item in items if item.case.backend.name == "column_skip"}) == 1
    assert {item.own_key for item in items if item.case.backend.name == "eager"} == {""}
    total = 3 * items[0].method_bytes + 2 * max(item.copies_bytes for item in sparse)
    for memory, groups in ((total * 1.01, 1), (total * 0.99, 2)):
        settings = [*SMALL, *levels, "axes.backend=[column_skip,eager]"]
        assert len(make_plan(load(settings, REGISTRY, MEMORY, CACHE_BYTES), REGISTRY, memory).groups) == groups


def test_events_of_several_layers_are_put_together():
    events = [
        {
            "event": "channels",
            "layer": place,
            "site": "input",
            "kept": kept,
            "channels": 10,
            "columns_read": 5,
            "columns": 5,
        }
        for place, kept in enumerate((4, 2))
    ]
    assert {metric.name: metric.value for metric in counted([*events, {"event": "miss"}])} == {
        "kernel_density_input": 0.3,
        "kernel_union_density_input": 1.0,
    }
    assert list(counted([])) == []
