"""Backend ``column_skip``: what is left out is not read, what is read is counted, and how its kernel is built."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.backends.column_skip import ColumnSkip, ColumnSkipExecutor
from moebench.backends.plugins import ColumnSkip as Params
from moebench.contracts import MoebenchError, SparsitySpec
from moebench.kernels.cpu import build
from moebench.moe.channel_use import dense_work, needed_work
from moebench.moe.channels import LowRank, SiteRule, Sparsity
from moebench.moe.oracle import compare, reference
from moebench.moe.sparsity import site_activations

E, H, F = 6, 32, 32
HAS_CC = ColumnSkip(Params()).availability().available
needs_cc = pytest.mark.skipif(not HAS_CC, reason="column_skip needs a C compiler")

relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def executor(lab, store, dtype="float32", chunk=8, **asked):
    spec = lab.spec(store, dtype)
    if asked:
        spec = dataclasses.replace(spec, sparsity=SparsitySpec(tuple(store.sparsity.sites), **asked))
    return ColumnSkipExecutor(store, spec, chunk)


def counted(run):
    return {event["site"]: event for event in run.events()}


RULES = {
    "threshold": SiteRule(0.4),
    "weighted": SiteRule(0.2, weight=rand(H)),
    "by_expert": SiteRule(0.2, weight=rand(E, H)),
    "top": SiteRule(k=9),
    "weighted_top": SiteRule(k=9, weight=rand(E, H)),
    "fixed": SiteRule(kept=rand(E, H) > 0.5),
    "residual": SiteRule(0.4, residual=LowRank(rand(E, 2 * F, 3) - 0.5, rand(E, 3, H) - 0.5)),
}


# --- what is left out is not read, and what is read is counted --------------------------------------------------------


@needs_cc
@pytest.mark.parametrize("site", ["input", "gate", "hidden"])
@pytest.mark.parametrize("rule", [name for name in RULES if name != "residual"])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_the_kernel_counts_what_the_rules_keep_and_what_chunks_read(lab, site, rule, chunk):
    store = lab.store(3, sparsity=Sparsity({site: RULES[rule]}))
    x_TH, routing = lab.tokens(29), lab.routing("dynamic_k", 29, 1)
    run = executor(lab, store, chunk=chunk)
    assert compare(run(x_TH, *lab.inputs(routing, "topk")), reference(store, routing, x_TH), torch.float32).ok
    masks = [RULES[rule].mask(act, slot) for act, slot in site_activations(store, routing, x_TH, site)]
    read = sum(int(part.any(0).sum()) for mask in masks for part in mask.split(chunk))
    found = counted(run)[site]
    assert (found["kept"], found["channels"]) == (sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks))
    assert found["columns_read"] == read
    assert found["columns"] == sum(len(mask.split(chunk)) * H for mask in masks)
    if chunk == 1:
        assert found["columns_read"] == found["kept"]


@needs_cc
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("site", ["input", "gate", "hidden"])
def test_weights_of_channels_left_out_are_never_read(lab, site, dtype):
    """They are NaN, and nothing of it comes out."""
    kept_I = rand(H) > 0.5
    store = lab.store(3, getattr(torch, dtype), sparsity=Sparsity({site: SiteRule(kept=kept_I)}))
    x_TH, routing = lab.tokens(17, getattr(torch, dtype)), lab.routing("dynamic_k", 17, 1)
    expected = reference(store, routing, x_TH)
    gate_up, down = store.gate_up.clone(), store.down.clone()
    if site == "input":
        gate_up[:, :, ~kept_I] = torch.nan
    elif site == "gate":
        gate_up[:, F:][:, ~kept_I] = torch.nan
    if site != "input":
        down[:, :, ~kept_I] = torch.nan
    poisoned = dataclasses.replace(store, gate_up=gate_up, down=down)
    run = executor(lab, poisoned, dtype, rule="fixed")
    assert compare(run(x_TH, *lab.inputs(routing, "topk")), expected, getattr(torch, dtype)).ok
    everything = dataclasses.replace(poisoned, sparsity=None)
    assert executor(lab, everything, dtype)(x_TH, *lab.inputs(routing, "topk")).isnan().any()


@needs_cc
@relaxed
@given(
    rule=st.sampled_from(sorted(RULES)),
    site=st.sampled_from(["input", "gate", "hidden"]),
    chunk=st.sampled_from([1, 2, 8, 64]),
    count=st.sampled_from([0, 1, 2, 9, 40]),
    archetype=st.sampled_from(["dynamic_k", "empty", "hot", "signed", "dropped"]),
    activation=st.sampled_from(["silu", "gelu", "relu"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_every_rule_at_every_site_agrees_with_the_oracle(
    lab, rule, site, chunk, count, archetype, activation, dtype, seed
):
    if RULES[rule].residual is not None:
        site = "input"
    store = lab.store(seed, dtype, sparsity=Sparsity({site: RULES[rule]}), activation=activation)
    x_TH, routing = lab.tokens(count, dtype, seed), lab.routing(archetype, count, seed)
    run = executor(lab, store, str(dtype).removeprefix("torch."), chunk)
    verdict = compare(run(x_TH, *lab.inputs(routing, "topk")), reference(store, routing, x_TH), dtype)
    assert verdict.ok, verdict


@needs_cc
@pytest.mark.parametrize("sites", [("input", "hidden"), ("gate",), ("gate", "hidden"), ("input", "gate"), ()])
@pytest.mark.parametrize("gated", [True, False])
def test_the_work_that_suites_count_is_what_the_kernel_does(lab, sites, gated):
    if "gate" in sites and not gated:
        return
    store = lab.store(3, sparsity=Sparsity({site: SiteRule(0.15) for site in sites}), gated=gated)
    x_TH, routing = lab.tokens(29), lab.routing("dynamic_k", 29, 1)
    run = executor(lab, store, chunk=64)
    run(x_TH, *lab.inputs(routing, "topk"))
    found = counted(run)
    behind = {"input": F if "gate" in sites or not gated else 2 * F, "gate": H, "hidden": H}
    work = needed_work(store, routing, x_TH)
    assert work.products == sum(found[site]["kept"] * behind[site] for site in found)
    assert work.weights == sum(found[site]["columns_read"] * behind[site] for site in found)
    whole = dense_work(store, routing)
    touched = int((routing.counts_E > 0).sum())
    assert (whole.products, whole.weights) == tuple(
        n * (3 if gated else 2) * H * F for n in (len(routing.token_N), touched)
    )
    assert (work == whole) == (not sites)


@needs_cc
@pytest.mark.parametrize("site", ["input", "hidden"])
def test_rules_that_keep_everything_are_the_dense_kernel_bit_for_bit(lab, site):
    x_TH, routing = lab.tokens(17), lab.routing("signed", 17, 1)
    dense = executor(lab, lab.store(3))
    expected_TH = dense(x_TH, *lab.inputs(routing, "topk"))
    for rule in (SiteRule(0.0), SiteRule(k=H), SiteRule(kept=torch.ones(H, dtype=torch.bool))):
        run = executor(lab, lab.store(3, sparsity=Sparsity({site: rule})))
        assert torch.equal(run(x_TH, *lab.inputs(routing, "topk")), expected_TH)
    entries, kept = len(routing.token_N), {site: event["kept"] for site, event in counted(dense).items()}
    assert kept == {"input": entries * H, "hidden": entries * F}


@needs_cc
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("gated", [True, False])
def test_nan_does_not_vanish_in_an_activation(lab, activation, gated):
    store, x_TH, routing = lab.store(3, activation=activation, gated=gated), lab.tokens(4), lab.routing("hot", 4, 0)
    x_TH[:] = torch.nan
    y_TH = executor(lab, store)(x_TH, *lab.inputs(routing, "topk"))
    assert y_TH[routing.token_N.unique()].isnan().all()


@needs_cc
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_fixed_channels_are_left_out_whatever_they_hold(lab, what):
    kept_I = rand(H) > 0.5
    store = lab.store(3, sparsity=Sparsity({"input": SiteRule(kept=kept_I)}))
    x_TH, routing = lab.tokens(7), lab.routing("dynamic_k", 7, 1)
    expected = reference(store, routing, x_TH)
    x_TH[:, ~kept_I] = what
    assert compare(executor(lab, store, rule="fixed")(x_TH, *lab.inputs(routing, "topk")), expected, torch.float32).ok


def test_a_low_rank_part_where_the_gate_decides_is_refused(lab):
    asked = SparsitySpec(("input", "gate"), per_expert=True, residual=True)
    answer = lab.backend("column_skip").supports(dataclasses.replace(lab.spec(lab.store(3)), sparsity=asked))
    assert answer.reason == "column_skip has no low-rank part where the gate decides; use the eager backend"


@needs_cc
def test_of_equal_scores_the_first_are_kept(lab):
    store = lab.store(3, torch.bfloat16, sparsity=Sparsity({"input": SiteRule(k=5)}))
    x_TH, routing = torch.ones(4, H, dtype=torch.bfloat16), lab.routing("hot", 4, 0)
    x_TH[:, 1] = 0
    y_TH = executor(lab, store, "bfloat16", rule="topk")(x_TH, *lab.inputs(routing, "topk"))
    first_TH = torch.zeros_like(x_TH)
    first_TH[:, [0, 2, 3, 4, 5]] = 1
    assert compare(y_TH, reference(dataclasses.replace(store, sparsity=None), routing, first_TH), torch.bfloat16).ok


@needs_cc
def test_the_gate_reads_up_and_down_of_kept_neurons_and_relu_zeros_cost_no_column(lab):
    store = lab.store(3, sparsity=Sparsity({"gate": SiteRule(0.0)}), activation="relu")
    x_TH, routing = lab.tokens(23), lab.routing("hot", 23, 0)
    run = executor(lab, store)
    run(x_TH, *lab.inputs(routing, "topk"))
    found = counted(run)
    assert found["input"]["kept"] == found["input"]["channels"]
    assert 0.2 < found["gate"]["kept"] / found["gate"]["channels"] < 0.8
    assert found["hidden"]["kept"] == found["gate"]["kept"]


@needs_cc
def test_a_token_may_come_to_one_expert_twice(lab):
    store, x_TH = lab.store(3), lab.tokens(3)
    indices_TK, weights_TK = torch.tensor([[2, 2], [2, 6], [6, 6]]), torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.0, 0.0]])
    y_TH = executor(lab, store)(x_TH, indices_TK, weights_TK)
    once_TH = executor(lab, store)(x_TH, indices_TK[:, :1], torch.tensor([[0.75], [1.0], [0.0]]))
    torch.testing.assert_close(y_TH, once_TH)


@needs_cc
def test_resident_bytes_are_those_of_the_copies_and_events_carry_their_layer(lab):
    rule = SiteRule(0.4, weight=rand(E, H), residual=LowRank(rand(E, 2 * F, 3), rand(E, 3, H)))
    store = lab.store(3, torch.bfloat16, sparsity=Sparsity({"input": rule}))
    spec = lab.spec(store, "bfloat16", "sorted")
    session = lab.backend("column_skip").load({4: store}, {4: spec})
    assert session.resident_bytes() == store.nbytes + 4 * E * H + 2 * E * 3 * (2 * F + H)
    assert list(session.events()) == []
    session.layer(4)(lab.tokens(2, torch.bfloat16), *lab.inputs(lab.routing("hot", 2, 0), "sorted"))
    assert [(event["layer"], event["site"]) for event in session.events()] == [(4, "input"), (4, "hidden")]
    told = session.executed()
    assert (told.weights, told.sparse) == ("dense", "skip")
    assert "-O3" in told.kernels[0]


@needs_cc
def test_layers_of_the_same_weights_share_the_copies_until_these_are_changed(lab):
    store = lab.store(3)
    x_TH, inputs = lab.tokens(5), lab.inputs(lab.routing("hot", 5, 0), "topk")
    first = executor(lab, store)
    other = executor(lab, dataclasses.replace(store, sparsity=Sparsity({"input": SiteRule(0.5)})))
    assert other.columns.form is first.columns.form
    assert executor(lab, store, "bfloat16").columns.form is not first.columns.form
    assert executor(lab, dataclasses.replace(store, sparsity=Sparsity({"gate": SiteRule(0.5)}))).columns.form.up
    before_TH = first(x_TH, *inputs)
    store.down[3] *= 2
    changed = executor(lab, store)
    assert changed.columns.form is not first.columns.form
    torch.testing.assert_close(changed(x_TH, *inputs), 2 * before_TH)
    assert torch.equal(first(x_TH, *inputs), before_TH)


# --- how the kernel is built ------------------------------------------------------------------------------------------


def test_without_a_compiler_it_is_not_available_and_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    answer = ColumnSkip(Params()).availability()
    assert not answer.available
    assert answer.reason == "column_skip needs a C compiler; install gcc or clang, or name one in CC"
    with pytest.raises(MoebenchError, match="kernel column_skip needs a C compiler; install gcc"):
        build.library.__wrapped__("column_skip")


def built(folder):
    return sorted(path.name for path in (folder / "kernels").glob("*"))


@needs_cc
def test_it_is_built_once_and_anew_where_a_flag_differs(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    fresh = build.library.__wrapped__
    told = fresh("column_skip").told
    (first,) = built(tmp_path)
    before = (tmp_path / "kernels" / first).stat().st_mtime_ns
    assert fresh("column_skip").told == told
    assert built(tmp_path) == [first]
    assert (tmp_path / "kernels" / first).stat().st_mtime_ns == before
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    fresh("column_skip")
    assert len(built(tmp_path)) == 2


@needs_cc
def test_a_library_that_others_may_have_written_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    fresh = build.library.__wrapped__
    fresh("column_skip")
    (name,) = built(tmp_path)
    library = tmp_path / "kernels" / name
    library.chmod(0o777)
    with pytest.raises(MoebenchError, match="can be written by everybody and is not loaded; delete it"):
        fresh("column_skip")
    library.chmod(0o755)
    monkeypatch.setattr(os, "getuid", lambda: library.stat().st_uid + 1)
    if library.stat().st_uid:
        with pytest.raises(MoebenchError, match="belongs to user"):
            fresh("column_skip")


@needs_cc
def test_two_processes_may_build_at_once(tmp_path):
    code = "from moebench.kernels.cpu import build; build.library('column_skip')"
    environment = {**os.environ, "MOEBENCH_CACHE": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [one.wait(120) for one in both] == [0, 0]
    (only,) = built(tmp_path)
    assert only.startswith("column_skip-")


def test_a_compiler_that_fails_is_told_in_a_sentence_and_leaves_nothing(monkeypatch, tmp_path):
    fake = tmp_path / "cc"
    fake.write_text('#!/bin/sh\ncase "$*" in *-dM*) exit 0;; *) echo "x.c:1: error: no" >&2; exit 1;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    with pytest.raises(MoebenchError, match=r"failed \(x.c:1: error: no\); name another compiler in CC"):
        build.library.__wrapped__("column_skip")
    assert built(tmp_path) == []


def test_importing_and_asking_builds_nothing(tmp_path):
    code = (
        "import sys, moebench.backends.column_skip as module\n"
        "from moebench.backends.plugins import ColumnSkip\n"
        "from moebench.contracts import LayerSpec\n"
        "backend = module.ColumnSkip(ColumnSkip())\n"
        "backend.availability(), backend.supports(LayerSpec(64, 64, ('ffn',) * 4))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "MOEBENCH_CACHE": str(tmp_path)})
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize("chunk", [0, 257])
def test_a_chunk_has_a_size(lab, chunk):
    with pytest.raises(MoebenchError, match=f"chunk={chunk} must lie between 1 and 256"):
        lab.backend("column_skip", chunk=chunk)
