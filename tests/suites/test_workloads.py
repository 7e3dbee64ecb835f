"""Workloads: exact identities of their parts, checks that can fail, and each of them once, very small."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.bench.run import planned
from moebench.contracts import Check, Metric, MoebenchError, Registry
from moebench.suites.workload_plugins import DESCRIPTORS, ColorMAE, Delta, DiTMoE, Lemo, SparseD
from moebench.suites.workloads import (
    block_attention,
    colormae,
    delta,
    digits,
    dit_moe,
    elimination,
    masked_diffusion,
    noise,
    samplers,
    sparsed,
    token_elimination,
    training,
)
from moebench.suites.workloads.base import Identity, Report, checked, median_interval
from moebench.suites.workloads.information import normalised_information
from moebench.suites.workloads.transformer import Block, causal, full
from moebench.suites.workloads.trial import WorkloadTrial
from moebench.suites.workloads.widest import WidestResult

REGISTRY = Registry.load()
TINY = {
    "lemo": {"tokens": 64, "block": 8, "segments": 4, "rank": 8, "depth": 2, "hidden": 16, "heads": 2, "width": 16}
    | {"steps": 4, "predictor_steps": 4, "finetune_steps": 2, "pairs": 6},
    "sparsed": {"tokens": 32, "prompt": 8, "block": 4, "prompts": 2, "diffusion_steps": 6, "depth": 2, "hidden": 16}
    | {"heads": 2, "width": 16, "steps": 4},
    "delta": {"frames": 4, "widths": [16], "steps": 6},
    "colormae": {"colours": ["white", "green"], "hidden": 16, "heads": 2, "width": 16, "depth": 1, "steps": 3},
    "dit_moe": {"depth": 2, "hidden": 16, "heads": 2, "width": 16, "steps": 3, "batch": 8, "samples": 100}
    | {"sampler_steps": 6, "traced": 10},
}
every_workload = pytest.mark.parametrize("name", TINY)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def trial_of(name, *words):
    values = [f"suite.{key}={value}" for key, value in TINY[name].items()]
    (case,) = planned([f"suite={name}", *values, *words], REGISTRY)[0].cases
    return WorkloadTrial(case, REGISTRY)


def finished(name, *words):
    trial = trial_of(name, *words)
    checks = [trial.verify(step, trial.run(step)) for step in range(trial.steps)]
    return trial, checks[-1]


# --- each of them ----------------------------------------------------------------------------------------------------


def test_every_workload_is_tested():
    assert {descriptor.name for descriptor in DESCRIPTORS} == set(TINY)


@every_workload
def test_a_workload_has_figures_once_its_identities_hold_and_the_same_ones_again(name, cache):
    trial, check = finished(name)
    assert check.ok, check.reason
    first = {metric.name: metric.value for metric in trial.facts().metrics}
    again, _ = finished(name)
    second = {metric.name: metric.value for metric in again.facts().metrics}
    timed = {"step_time_ratio"}
    assert {k: v for k, v in first.items() if k not in timed} == {k: v for k, v in second.items() if k not in timed}
    assert len(first) == len(trial.facts().metrics) > 3
    assert all(value is not None and math.isfinite(value) for value in first.values())


BROKEN = {
    "lemo": (token_elimination, "tokens_of", lambda blocks, block: blocks),
    "sparsed": (sparsed, "masked_attention", lambda q, k, v, blocks: full(q, k, v)),
    "delta": (delta, "changes", lambda o: o),
    "colormae": (colormae, "spectral_gap", lambda banks: 1.0),
    "dit_moe": (samplers, "MULTISTEP", ((1.1,), (1.5, -0.5), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))),
}


@every_workload
def test_a_broken_part_costs_all_figures(name, cache, monkeypatch):
    monkeypatch.setattr(*BROKEN[name])
    trial = trial_of(name)
    trial.run(0)
    check = trial.verify(1, trial.run(1))
    assert not check.ok
    assert "off by" in check.reason
    assert trial.facts().metrics == ()


def test_a_diverged_training_and_a_figure_that_is_no_number_are_refused(cache):
    trial = trial_of("delta")
    assert trial.facts().metrics == ()
    assert "take another seed" in trial.verify(0, math.nan).reason
    broken = Report(Check(True), (Metric("density", math.nan),))
    assert trial.verify(1, broken).reason == "density: no finite number"


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("suite=lemo suite.kept=0", "kept=0"),
        ("suite=lemo suite.block=48", "must divide tokens"),
        ("suite=lemo suite.segments=0", "segments=0 must be at least 1"),
        ("suite=lemo suite.pairs=0", "pairs=0"),
        ("suite=sparsed suite.depth=0", "depth=0"),
        ("suite=colormae suite.heads=5", "heads=5 must divide hidden=48"),
        ("suite=dit_moe suite.k=5", "k=5 be at most experts"),
        ("suite=delta suite.steps=0", "steps=0"),
        ("suite=delta suite.widths=[]", "at least one layer"),
        ("suite=colormae suite.patterns=-1", "patterns=-1"),
        ("suite=dit_moe suite.batch=0", "batch=0"),
        ("suite=sparsed suite.prompt=30", "must divide tokens"),
        ("suite=sparsed suite.skip=1", "skip=1"),
        ("suite=delta suite.canvas=8", "wider than 8"),
        ("suite=colormae suite.colours=[grene]", "did you mean 'green'"),
        ("suite=dit_moe suite.window=-1", "window=-1"),
        ("suite=dit_moe suite.sampler=ddpm", "must be one of ddim, pndm"),
    ],
)
def test_a_mistaken_parameter_is_told_in_a_sentence(setting, sentence):
    with pytest.raises(MoebenchError, match=sentence):
        planned(setting.split(), REGISTRY)


def test_weights_are_trained_once_for_each_seed(cache, monkeypatch):
    first = trial_of("dit_moe", "seed=5")
    first.run(0)
    other = trial_of("dit_moe", "seed=6")
    other.run(0)
    monkeypatch.setattr(training, "Trainer", None)  # whatever trains now fails
    again = trial_of("dit_moe", "seed=5", "suite.window=7")
    again.run(0)
    weights = [trial.workload.task.model.out.weight for trial in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_weights_are_of_the_sources_that_all_models_are_made_of(monkeypatch):
    before = training.sources([noise])
    for part in ("experts", "registry", "routing"):
        with monkeypatch.context() as patch:
            patch.setattr(training, part, noise)
            assert training.sources([noise]) != before


# --- base ------------------------------------------------------------------------------------------------------------


def test_checks_name_what_does_not_hold():
    assert checked([Identity("a", 0.0), Identity("b", 1e-9, 1e-8)]) == Check(True, 1e-9, 1e-8)
    assert checked([Identity("a", 0.0), Identity("b", 1e-7, 1e-8)]).reason.startswith("b: off by")
    nothing = checked([Identity("a", math.nan, 1.0)])
    assert (nothing.ok, nothing.error) == (False, None)


def test_the_interval_of_a_median_is_that_of_order_statistics():
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    # n = 20: P(X <= 5) = 0.0207, P(X <= 6) = 0.0577 for X ~ Bin(20, 1/2)
    assert median_interval(map(float, range(20))) == (9.5, 5.0, 14.0)


# --- lemo ------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_the_segment_loss_has_the_gradients_of_the_plain_loss(segments, size, seed):
    assert elimination.gradient_gap(segments * size, segments, seed) < 1e-12


def test_segments_must_divide_the_tokens():
    with pytest.raises(ValueError, match="choose a divisor"):
        token_elimination.segment_loss(torch.zeros(7, 2), torch.zeros(3, 2), torch.zeros(7).long(), 2)


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_logits_of_segments_take_an_nth_exactly(segments):
    with WidestResult(11) as widest:
        token_elimination.segment_loss(torch.zeros(16, 2), torch.zeros(11, 2), torch.zeros(16).long(), segments)
    assert widest.bytes * segments == 16 * 11 * 4


def test_eliminated_tokens_pass_by_and_the_others_see_each_other_alone():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(Block(8, 2, 8, 2, 1) for _ in range(2))
    x = torch.randn(1, 12, 8)
    blocks = torch.tensor([0, 2])
    kept = token_elimination.tokens_of(blocks, 4)
    found = token_elimination.through(layers, x, 4, lambda layer, x: blocks)
    middle = x.clone()
    middle[:, kept] = layers[0](x[:, kept], causal)
    assert torch.equal(found, layers[1](middle, causal))
    everything = token_elimination.through(layers, x, 4, lambda layer, x: torch.arange(3))
    assert torch.equal(everything, token_elimination.through(layers, x, 4, None))


def test_block_scores_are_those_of_the_past_and_symmetric():
    q = torch.zeros(1, 1, 4, 2)
    k = torch.zeros(1, 1, 4, 2)
    q[0, 0, 3], k[0, 0, 0] = torch.tensor([2.0, 0.0]), torch.tensor([3.0, 0.0])
    q[0, 0, 0], k[0, 0, 3] = torch.tensor([0.0, 9.0]), torch.tensor([0.0, 9.0])  # the future does not count
    scores = token_elimination.block_scores(q, k, 2)[0]
    assert torch.allclose(scores, torch.tensor([[0.0, 3.0], [3.0, 0.0]]) / math.sqrt(2))
    assert token_elimination.best_blocks(torch.diag(torch.tensor([1.0, 5.0, 3.0])), 2).tolist() == [1, 2]


# --- sparsed ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 4), st.floats(0, 1), st.integers(0, 99))
def test_gathered_blocks_are_masked_attention(heads, blocks, block, share, seed):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, heads, blocks * block, 4, dtype=torch.float64, generator=rng)
    prompt = seed % blocks
    chosen = block_attention.select(block_attention.importance(q, k, block), prompt, share)
    found = block_attention.sparse_attention(q, k, v, chosen)
    assert torch.allclose(found, block_attention.masked_attention(q, k, v, chosen), atol=1e-12, rtol=0)
    mask = block_attention.as_mask(chosen)
    sizes = [size for size in (prompt, blocks - prompt) if size]
    assert (mask.sum(-1) == sum(block_attention.kept(size, share) for size in sizes)).all()


def test_importance_is_a_mean_of_attention_and_selection_is_isolated():
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 12, 4, generator=rng)
    assert torch.allclose(block_attention.importance(q, k, 3).sum(-1) * 3, torch.ones(1, 2, 4))
    scores = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0, 0.0]).expand(1, 1, 6, 6)
    assert block_attention.select(scores, 3, 0.3)[0, 0, 0].tolist() == [0, 4]


def test_jaccard_of_known_masks():
    a, b = torch.tensor([[True, True], [False, False]]), torch.tensor([[True, False], [True, False]])
    assert float(block_attention.jaccard(a, b)) == pytest.approx(1 / 3)
    assert float(block_attention.jaccard(a, a)) == 1


def test_overlap_by_chance_is_that_of_choices_within_prompt_and_rest():
    rng = torch.Generator().manual_seed(0)
    draws = [
        [block_attention.select(torch.rand(64, 4, 16, 16, generator=rng), 1, 0.3) for _ in range(2)] for _ in range(2)
    ]
    mask = [[block_attention.as_mask(layer) for layer in draw] for draw in draws]
    both = sum(int((a & b).sum()) for a, b in zip(*mask, strict=True))
    either = sum(int((a | b).sum()) for a, b in zip(*mask, strict=True))
    density = float(torch.stack(mask[0]).double().mean())
    assert sparsed.chance(*draws) == pytest.approx(both / either, abs=5e-3)
    assert sparsed.chance(*draws) > density / (2 - density) + 0.03  # the one block of the prompt is always shared


def test_turned_queries_and_keys_know_distances_alone():
    x_D, y_D = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    q_TD, k_TD = (masked_diffusion.turned(one.expand(1, 1, 12, 8))[0, 0] for one in (x_D, y_D))
    scores_TT = q_TD @ k_TD.T
    assert torch.allclose(scores_TT[1:, 1:], scores_TT[:-1, :-1], atol=1e-5)
    assert torch.allclose(scores_TT.diagonal(), x_D @ y_D, atol=1e-5)
    assert not torch.allclose(scores_TT[0, 1:], scores_TT[1:, 0], atol=1e-3)


def test_symbols_of_a_generation_are_counted_sequence_by_sequence():
    assert sparsed.symbols_of(torch.tensor([[32, 32, 32], [32, 101, 116]])) == 2


# --- delta -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(0.01, 2))
def test_rounding_gives_multiples_within_half_a_step(seed, step):
    x = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = delta.rounded(x, torch.tensor(-step, dtype=torch.float64))
    assert ((found - x).abs() <= step / 2 + 1e-12).all()
    assert torch.allclose((found / step).round() * step, found)


def test_changes_add_up_and_a_digit_turns_back_at_the_edge():
    o = torch.tensor([1.0, 1.0, 3.0, 0.0])[None, :, None]
    assert delta.changes(o).flatten().tolist() == [1, 0, 2, -3]
    assert delta.reflected(torch.tensor([-1.0, 0.5, 4.5, 8.0]), 4).tolist() == [1.0, 0.5, 3.5, 0.0]
    still = delta.MovingDigits(replace(Delta(), speed=0.0), 0).clips(True, 3, "x")[0]
    assert torch.equal(still, still[:, :1].expand_as(still))
    found = {m.name: m.value for m in delta.densities([torch.tensor([[[1.0, 0.0], [1.0, 2.0]]])] * 2, "")}
    assert found["temporal_density"] == 0.5
    assert found["spatial_density"] == 1.0


# --- colormae --------------------------------------------------------------------------------------------------------


def test_colours_have_their_spectra_and_another_order_is_noticed():
    banks = {colour: noise.bank(colour, 64, 32, 0) for colour in ("white", "red", "green", "blue", "purple")}
    assert noise.spectral_gap(banks) == 0
    assert noise.spectral_gap({**banks, "red": banks["blue"], "blue": banks["red"]}) > 0
    assert noise.spectral_gap({**banks, "green": banks["white"]}) > 0


@pytest.mark.parametrize("colour", ["white", "red", "green", "blue", "purple"])
def test_a_mask_knows_how_many_images_there_are_and_nothing_of_them(colour):
    mask = noise.ColourMask(colour, 8, 8, 16, 0)
    images = torch.rand(5, 8, 8)
    assert torch.equal(mask(images, 1), mask(torch.zeros_like(images), 1))
    assert not torch.equal(mask(images, 1), mask(images, 2))
    visible = mask(images, 1)
    assert visible.shape == (5, 16)
    assert all(len(set(row)) == 16 for row in visible.tolist())


def test_a_mask_that_looks_at_images_fails_the_check(monkeypatch):
    def looking(self, images, step):
        return images.flatten(1).topk(self.visible).indices

    monkeypatch.setattr(noise.ColourMask, "__call__", looking)
    workload = colormae.ColorMAEWorkload(replace(ColorMAE(), colours=("white",)), 0)
    assert checked(workload._identities()).reason.startswith("patches that are visible for one image alone")


def test_lonely_patches_are_counted():
    assert noise.lonely_share(torch.tensor([[4]]), 3) == pytest.approx(4 / 8)


def test_patches_of_a_doubled_digit_keep_its_mean():
    images = torch.rand(2, 8, 8)
    found = colormae.patches(images)
    assert found.shape == (2, 64, 4)
    assert torch.allclose(found.mean((1, 2)), images.mean((1, 2)), atol=1e-6)


# --- dit_moe ---------------------------------------------------------------------------------------------------------


def test_multistep_weights_integrate_polynomials():
    for order in range(len(samplers.MULTISTEP)):
        for power in range(order + 1):
            past = [
                torch.tensor(float(-i) ** power if i or power else 1.0, dtype=torch.float64) for i in range(order + 1)
            ]
            assert float(samplers.combined(past)) == pytest.approx(1 / (power + 1))


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 30), st.booleans(), st.integers(0, 99))
def test_a_sampler_told_the_true_noise_ends_at_the_image(steps, multistep, seed):
    image, told = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    share = samplers.signal_shares(torch.float64)[samplers.times(steps)[0]]
    start = share.sqrt() * image + (1 - share).sqrt() * told
    found, _ = samplers.sample(lambda x, time: told, start, steps, multistep)
    assert torch.allclose(found, image, atol=1e-8)


def test_a_shift_finds_the_step_that_fits_the_variance():
    share = samplers.signal_shares(torch.float64)
    x = torch.randn(4, 4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) * (1 - share[510]).sqrt()
    assert samplers.TimeShift(40, 200).shifted(x, 500, share).tolist() == [510] * 4
    assert samplers.TimeShift(10, 200).shifted(x, 500, share).tolist() == [505] * 4
    assert samplers.TimeShift(40, 500).shifted(x, 500, share).tolist() == [500] * 4
    corrected = x * ((1 - share[490] + share[490] * 0.5) / (1 - share[510])).sqrt()
    assert samplers.TimeShift(40, 200, 0.5).shifted(corrected, 500, share).tolist() == [490] * 4


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.floats(0.1, 3))
def test_the_distance_of_scaled_images_is_known(seed, scale):
    x = torch.randn(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = (1 - scale) ** 2 * float(x.mean(0).square().sum() + torch.trace(torch.cov(x.T)))
    assert digits.fd_pixel(x, scale * x) == pytest.approx(expected, abs=1e-6)


def test_information_is_one_for_equal_labels_and_nothing_for_a_constant():
    label = torch.arange(300) % 3
    assert normalised_information(label, label, 4) == pytest.approx(1)
    assert normalised_information(torch.zeros(300).long(), label, 4) == 0
    assert normalised_information(torch.arange(300) // 100, label, 4) == pytest.approx(0, abs=1e-3)


def test_parameters_of_every_workload_have_defaults_that_hold():
    for params in (Lemo, SparseD, Delta, ColorMAE, DiTMoE):
        assert params() == params()
    assert dit_moe.moved_share([torch.tensor([time]) for time in samplers.times(4)]) == 0
