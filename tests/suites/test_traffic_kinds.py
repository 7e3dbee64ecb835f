"""Traffic that changes with time, fits ranks, or was recorded; and every way in which a trace file can be bad."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moebench.contracts import MoebenchError, canonical_json
from moebench.suites.model_plugins import PRESETS
from moebench.suites.trace import COLUMNS, TraceError, load_trace, save_trace, sha256_of_file
from moebench.suites.traffic import DrawnTraffic
from moebench.suites.traffic_kinds import DomainsTraffic, RankBalancedTraffic, ReplayTraffic, StickyTraffic
from moebench.suites.traffic_params import DESCRIPTORS, Domains, RankBalanced, Replay, Rotating, Sticky

DRAWN = {descriptor.name: descriptor for descriptor in DESCRIPTORS if descriptor.name != "replay"}
sizes = st.tuples(st.integers(0, 40), st.integers(1, 24), st.integers(1, 24)).filter(lambda s: s[2] <= s[1])
relaxed = settings(deadline=None, max_examples=40)


def routing_of(name, tokens, experts, k, step=0, seed=0, **params):
    return DRAWN[name].create(params).routing(tokens, experts, k, step, seed)


def possible(name, experts, k):
    try:
        DRAWN[name].params_from().check(experts, k)
    except ValueError:
        return False
    return True


# --- what is promised of every forced routing ------------------------------------------------------------------------


@relaxed
@given(name=st.sampled_from(sorted(DRAWN)), size=sizes, step=st.integers(0, 9), seed=st.integers(0, 2**40))
def test_every_token_gets_k_distinct_experts_of_equal_weight(name, size, step, seed):
    tokens, experts, k = size
    assume(possible(name, experts, k))
    routing = routing_of(name, tokens, experts, k, step, seed)
    assert routing.shape == (tokens, experts)
    assert routing.k_T.tolist() == [k] * tokens
    assert len(set(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))) == tokens * k
    assert set(routing.weight_N.tolist()) <= {torch.tensor(1 / k).item()}
    assert torch.equal(routing.expert_N, routing_of(name, tokens, experts, k, step, seed).expert_N)


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_seeds_differ(name):
    assert not torch.equal(routing_of(name, 64, 16, 2, 0, 0).expert_N, routing_of(name, 64, 16, 2, 0, 1).expert_N)


@pytest.mark.parametrize(
    ("traffic", "step"),
    [
        (StickyTraffic(Sticky(alpha=1.0, stay=0.5)), 3),
        (StickyTraffic(Sticky(alpha=0.7, stay=0.5, along="tokens")), 1),
        (RankBalancedTraffic(RankBalanced(alpha=1.2, ranks=2)), 0),
        (RankBalancedTraffic(RankBalanced(alpha=1.2, ranks=4)), 0),
        (DrawnTraffic(Rotating(0.6, 2)), 3),
    ],
)
@pytest.mark.parametrize("k", [1, 3])
def test_realised_shares_meet_the_requested_ones(traffic, step, k):
    tokens, experts = 20_000, 8
    realised = traffic.routing(tokens, experts, k, step, 7).counts_E / (tokens * k)
    requested = torch.tensor(traffic.requested(experts, k, step))
    assert requested.sum() == pytest.approx(1)
    independent = tokens / 4 if isinstance(traffic, StickyTraffic) and traffic.params.along == "tokens" else tokens
    sigma = (k * requested * (1 - k * requested).clamp(min=0) / independent).sqrt() / k
    assert ((realised - requested).abs() <= 6 * sigma + 1e-6).all()


def test_hidden_states_are_gaussian():
    source = next(descriptor for descriptor in PRESETS if descriptor.name == "tiny").create()
    states = [descriptor.create().hidden(source, 0, 4, 1, 2) for descriptor in DESCRIPTORS]
    assert all(torch.equal(states[0], other) for other in states)
    assert states[0].shape == (4, source.shape.hidden)


def test_parameters_import_no_torch():
    code = (
        "import sys\nfrom moebench.suites.traffic_params import DESCRIPTORS\n"
        "[one.params_from() for one in DESCRIPTORS]\nprint('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# --- correlated in time ----------------------------------------------------------------------------------------------


def slots(routing):
    return routing.padded()[0]


@pytest.mark.parametrize("stay", [0.0, 0.5, 0.9])
def test_a_place_keeps_its_experts_from_step_to_step_as_often_as_asked(stay):
    tokens, experts = 4000, 32
    traffic = StickyTraffic(Sticky(stay=stay))
    steps = [slots(traffic.routing(tokens, experts, 2, step, 5)) for step in range(4)]
    by_chance = 2 / (experts * (experts - 1))  # a new draw may be the old one, in either order
    for before, after in itertools.pairwise(steps):
        kept = float((before.sort(1).values == after.sort(1).values).all(1).float().mean())
        assert kept == pytest.approx(stay + (1 - stay) * by_chance, abs=6 * (0.25 / tokens) ** 0.5)


def test_correlation_falls_with_the_distance_in_steps():
    traffic = StickyTraffic(Sticky(stay=0.8))
    first = slots(traffic.routing(4000, 32, 1, 4, 0))
    for distance in (1, 2, 3):
        later = slots(traffic.routing(4000, 32, 1, 4 + distance, 0))
        chance = 0.8**distance + (1 - 0.8**distance) / 32
        assert float((first == later).float().mean()) == pytest.approx(chance, abs=6 * (0.25 / 4000) ** 0.5)


def test_along_tokens_neighbours_agree_and_steps_join():
    traffic = StickyTraffic(Sticky(stay=0.9, along="tokens"))
    steps = torch.cat([slots(traffic.routing(500, 32, 2, step, 3)) for step in range(8)])
    same = (steps[1:] == steps[:-1]).all(1)
    assert float(same.float().mean()) == pytest.approx(0.9, abs=0.03)
    joints = [bool(same[500 * step - 1]) for step in range(1, 8)]
    assert sum(joints) >= 4, "the first token of a step follows the last of the step before"


def test_a_single_token_may_look_back_many_steps():
    traffic = StickyTraffic(Sticky(stay=0.95, along="tokens"))
    chain = [tuple(slots(traffic.routing(1, 64, 2, step, 1))[0].tolist()) for step in range(60)]
    changes = sum(before != after for before, after in itertools.pairwise(chain))
    assert 0 < changes < 15
    assert len(set(chain)) == changes + 1


def test_steps_can_be_had_in_any_order():
    traffic = StickyTraffic(Sticky())
    late = slots(traffic.routing(16, 8, 2, 5, 0))
    traffic.routing(16, 8, 2, 0, 0)
    assert torch.equal(late, slots(traffic.routing(16, 8, 2, 5, 0)))


# --- rotating --------------------------------------------------------------------------------------------------------


def test_the_hotspot_moves_on_and_comes_round():
    rotating = Rotating(share=0.8, experts=2, period=3)
    hot = [[e for e, share in enumerate(rotating.popularity(6, step)) if share > 0.3] for step in range(0, 12, 3)]
    assert hot == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert rotating.popularity(6, 0) == rotating.popularity(6, 2) != rotating.popularity(6, 3)


@given(st.integers(3, 12), st.integers(1, 2), st.integers(1, 4), st.integers(0, 50))
def test_a_rotation_keeps_all_shares(experts, hot, period, step):
    rotating = Rotating(share=0.6, experts=hot, period=period)
    assert sorted(rotating.popularity(experts, step)) == sorted(rotating.popularity(experts, 0))


# --- domains that change ---------------------------------------------------------------------------------------------


def popular(traffic, experts, step, layer, few):
    shares = traffic.requested(experts, 2, step, layer)
    return frozenset(sorted(range(experts), key=lambda expert: -shares[expert])[:few])


@relaxed
@given(
    experts=st.integers(4, 24),
    few=st.integers(1, 2),
    period=st.integers(1, 5),
    step=st.integers(0, 40),
    layer=st.none() | st.integers(0, 30),
    share=st.sampled_from([0.7, 0.9]),
)
def test_the_same_experts_are_popular_for_a_period(experts, few, period, step, layer, share):
    traffic = DomainsTraffic(Domains(share=share, experts=few, period=period))
    shares = traffic.requested(experts, 2, step, layer)
    assert sum(shares) == pytest.approx(1.0)
    assert len(shares) == experts
    first = step // period * period
    assert traffic.requested(experts, 2, first, layer) == traffic.requested(experts, 2, first + period - 1, layer)
    assert popular(traffic, experts, step, layer, few) != popular(traffic, experts, first + period, layer, few)


def test_layers_have_popular_experts_of_their_own_whatever_the_seed():
    traffic = DomainsTraffic(Domains(share=0.9, experts=2, period=4))
    found = [popular(traffic, 32, 0, layer, 2) for layer in range(12)]
    assert len(set(found)) > 9
    drawn = [traffic.routing(400, 32, 2, 0, seed, layer=3).counts_E for seed in (0, 1)]
    assert [frozenset(counts_E.topk(2).indices.tolist()) for counts_E in drawn] == [found[3]] * 2
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("step", [0, 5])
def test_domains_draw_what_they_say(step):
    traffic = DomainsTraffic(Domains(share=0.8, experts=3, period=5))
    counts_E = traffic.routing(4000, 12, 2, step, 7, layer=2).counts_E
    wanted = torch.tensor(traffic.requested(12, 2, step, 2))
    assert (counts_E / counts_E.sum() - wanted).abs().max() < 0.02


# --- balanced per rank -----------------------------------------------------------------------------------------------


@relaxed
@given(
    ranks=st.integers(1, 8),
    width=st.integers(1, 6),
    tokens=st.integers(0, 60),
    alpha=st.floats(0, 3),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_ranks_differ_by_at_most_one_assignment(ranks, width, tokens, alpha, seed, data):
    k = data.draw(st.integers(1, ranks * width))
    traffic = RankBalancedTraffic(RankBalanced(alpha=alpha, ranks=ranks))
    routing = traffic.routing(tokens, ranks * width, k, 0, seed)
    load_R = routing.counts_E.reshape(ranks, width).sum(1)
    assert load_R.sum() == tokens * k
    assert load_R.max() - load_R.min() <= 1
    assert routing.k_T.tolist() == [k] * tokens


def test_ranks_are_balanced_at_the_size_that_once_left_half_idle_while_experts_are_not():
    # sglang#37741: 16 ranks, 256 experts, top-8
    routing = routing_of("rank_balanced", 512, 256, 8, alpha=1.0, ranks=16)
    assert routing.counts_E.reshape(16, 16).sum(1).tolist() == [256] * 16
    assert routing.counts_E.max() > 2 * routing.counts_E.float().mean()


def test_ranks_that_do_not_divide_the_experts_are_refused():
    with pytest.raises(ValueError, match="10 experts cannot be cut into ranks=4"):
        RankBalanced().check(10, 2)
    with pytest.raises(ValueError, match="k=9 must lie between 1 and the 8 experts"):
        RankBalanced().check(8, 9)


@pytest.mark.parametrize(
    ("params", "wrong"), [(Sticky, {"stay": 1.0}), (Rotating, {"period": 0}), (RankBalanced, {"ranks": 0})]
)
def test_impossible_parameters_are_refused(params, wrong):
    with pytest.raises(ValueError, match="must"):
        params(**wrong)


# --- replay ----------------------------------------------------------------------------------------------------------


def rows(*entries):
    """Columns of (step, layer, token, expert, weight) rows."""
    return dict(zip(COLUMNS, zip(*entries, strict=True), strict=True))


TWO_STEPS = rows(
    (0, 4, 0, 3, 0.75), (0, 4, 0, 1, 0.25), (0, 4, 1, 5, -0.5), (0, 9, 2, 0, 1.0),
    (7, 4, 1, 2, 0.5), (7, 4, 0, 2, 1.0), (7, 9, 0, 0, 1.0),
)  # fmt: skip


@pytest.fixture
def recorded(tmp_path):
    """A function that saves columns (``TWO_STEPS`` by default) and returns the traffic that replays them."""

    def make(columns=TWO_STEPS, suffix=".parquet", **params):
        path = str(tmp_path / f"trace{suffix}")
        return ReplayTraffic(Replay(path=path, sha256=save_trace(path, columns), **params))

    return make


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".ndjson"])
def test_an_exact_replay_has_every_assignment_as_recorded(recorded, suffix):
    traffic = recorded(suffix=suffix)
    first = traffic.routing(3, 6, 2, 0, 0, layer=4)
    assert (first.token_N.tolist(), first.expert_N.tolist()) == ([0, 0, 1], [3, 1, 5])
    assert first.weight_N.tolist() == [0.75, 0.25, -0.5]
    assert first.shape == (3, 6)
    assert traffic.audit(3, 6, 2, 0, layer=4).status == "exact"
    second = traffic.routing(2, 6, 2, 1, 0, layer=4)
    assert (second.token_N.tolist(), second.expert_N.tolist()) == ([0, 1], [2, 2])
    assert torch.equal(traffic.routing(3, 6, 2, 2, 0, layer=4).weight_N, first.weight_N), "it begins anew"


@relaxed
@given(
    data=st.dictionaries(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 5), st.integers(0, 7)),
        st.floats(-4, 4, width=32),
        min_size=1,
        max_size=40,
    ),
    suffix=st.sampled_from([".parquet", ".jsonl"]),
)
def test_traces_round_trip(data, suffix, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("trace") / f"trace{suffix}")
    sha256 = save_trace(path, rows(*((*key, weight) for key, weight in data.items())))
    trace = load_trace(path, sha256)
    found = {
        (sorted({key[0] for key in data})[step], layer, token, expert): weight
        for (step, layer), part in trace.by_place.items()
        for token, expert, weight in zip(
            part.token_N.tolist(), part.expert_N.tolist(), part.weight_N.tolist(), strict=True
        )
    }
    assert found == data
    assert trace.layers == tuple(sorted({key[1] for key in data}))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((4, 6, 2), "3 tokens where the case has 4"),
        ((3, 5, 2), "6 experts where the case has 5"),
        ((3, 6, 1), "2 experts per token where the case has 1"),
        ((2, 5, 1), "3 tokens where the case has 2 and 6 experts where the case has 5 and 2 experts per token"),
    ],
)
def test_what_does_not_fit_is_refused_or_projected_and_said(recorded, sizes, words):
    with pytest.raises(TraceError, match=words) as caught:
        recorded().routing(*sizes, 0, 0, layer=4)
    assert isinstance(caught.value, MoebenchError)
    assert isinstance(caught.value, ValueError)
    audit = recorded(fit="projected").audit(*sizes, 0, layer=4)
    assert audit.status == "projected"
    assert words in audit.reason
    routing = recorded(fit="projected").routing(*sizes, 0, 0, layer=4)
    assert routing.shape == sizes[:2]
    assert routing.k_T.max() <= sizes[2]


def test_a_projection_repeats_tokens_folds_experts_and_keeps_the_heaviest(recorded):
    columns = rows((0, 0, 0, 0, 0.25), (0, 0, 0, 4, 0.5), (0, 0, 0, 1, 0.5), (0, 0, 1, 6, -0.75), (0, 0, 1, 7, 0.5))
    traffic = recorded(columns, fit="projected")
    gate_TE = torch.zeros(3, 4)
    gate_TE[0, 0], gate_TE[1, 2], gate_TE[2, 0] = 0.75, -0.75, 0.75
    torch.testing.assert_close(traffic.routing(3, 4, 1, 0, 0).to_dense(), gate_TE)
    assert traffic.routing(1, 4, 2, 0, 0).to_dense().tolist() == [[0.75, 0.5, 0.0, 0.0]]


@settings(relaxed, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=sizes)
def test_any_size_can_be_projected(recorded, size):
    tokens, experts, k = size
    routing = recorded(fit="projected").routing(tokens, experts, k, 0, 0, layer=4)
    assert routing.shape == (tokens, experts)
    assert (routing.k_T <= k).all()
    pairs = set(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))
    assert len(pairs) == len(routing.token_N)


def test_what_fits_is_exact_though_projection_is_allowed(recorded):
    assert recorded(fit="projected").audit(3, 6, 2, 0, layer=4).status == "exact"
    exact, allowed = (recorded(fit=fit).routing(3, 6, 2, 0, 0, layer=4) for fit in ("exact", "projected"))
    assert torch.equal(exact.to_dense(), allowed.to_dense())


def test_forced_draws_by_the_recorded_load(recorded):
    load = (5, 1, 0, 2)
    columns = rows(*((0, 0, token, expert, 1.0) for token, expert in enumerate(np.repeat(range(4), load).tolist())))
    traffic = recorded(columns, fit="forced")
    assert traffic.audit(8, 4, 1, 0).status == "forced"
    assert traffic.requested(4, 1) == pytest.approx([5 / 8, 1 / 8, 0, 2 / 8])
    routing = traffic.routing(20_000, 4, 1, 0, 3)
    assert (routing.counts_E / 20_000).tolist() == pytest.approx([5 / 8, 1 / 8, 0, 2 / 8], abs=0.02)
    assert routing.weight_N.unique().tolist() == [1.0]
    with pytest.raises(ValueError, match="the 3 experts that the trace uses"):
        traffic.params.check(4, 4)


def test_requested_is_the_recorded_share(recorded):
    assert recorded().requested(6, 2, 0, layer=4) == pytest.approx([0, 1 / 3, 0, 1 / 3, 0, 1 / 3])
    assert recorded().requested(6, 2, 1, layer=4) == (0, 0, 1, 0, 0, 0)


def test_the_layer_is_the_cases_own_or_named_or_the_only_one(recorded):
    assert recorded().routing(3, 6, 2, 0, 0, layer=9).expert_N.tolist() == [0]
    assert recorded(layer=9).routing(3, 6, 2, 0, 0, layer=4).expert_N.tolist() == [0]
    alone = recorded(rows((0, 5, 0, 1, 1.0)))
    assert alone.routing(1, 2, 1, 0, 0, layer=3).expert_N.tolist() == [1]
    for traffic, layer in ((recorded(), None), (recorded(), 3), (recorded(layer=3), 4)):
        with pytest.raises(TraceError, match="the trace has the layers 4, 9; choose one of them"):
            traffic.routing(3, 6, 2, 0, 0, layer=layer)


def test_planning_checks_the_trace(recorded):
    recorded().params.check(6, 2)
    with pytest.raises(ValueError, match=r"the trace has 6 experts, 2 per token, where the layer has 4, 2 per token"):
        recorded().params.check(4, 2)
    recorded(fit="projected").params.check(4, 1)
    with pytest.raises(ValueError, match="the layers 4, 9"):
        recorded(layer=1).params.check(6, 2)


def test_parameters_are_plain(recorded):
    params = recorded().params
    assert json.loads(canonical_json(params)) == {
        "path": params.path, "sha256": params.sha256, "fit": "exact", "layer": None,
    }  # fmt: skip


# --- bad files -------------------------------------------------------------------------------------------------------


GOOD = {"step": [0], "layer": [0], "token": [0], "expert": [0], "weight": [1.0]}


def parquet(**columns):
    def write(path):
        pq.write_table(pa.table({**GOOD, **columns}), path)

    return write


def lines(text):
    return lambda path: path.write_text(text)


def line(**fields):
    return lines(json.dumps({**{name: column[0] for name, column in GOOD.items()}, **fields}) + "\n")


BAD = {
    "nothing.parquet": (None, "cannot be read (No such file or directory); check the path"),
    "trace.csv": (lines("a,b"), "is no trace by its name; give a file ending in .parquet, .jsonl, .ndjson"),
    "text.parquet": (lines("this is no parquet"), "cannot be parsed"),
    "empty.parquet": (lines(""), "cannot be parsed"),
    "cut.parquet": (lambda path: (parquet()(path), path.write_bytes(path.read_bytes()[:-9])), "cannot be parsed"),
    "rows.parquet": (parquet(**{name: pa.array([], pa.int64()) for name in GOOD}), "has no rows; write step, layer"),
    "column.parquet": (lambda path: pq.write_table(pa.table({"step": [0]}), path), "needs one column 'layer'"),
    "text_column.parquet": (parquet(expert=["a"]), "column 'expert' of trace"),
    "real.parquet": (parquet(token=[0.5]), "is of type double; write whole numbers"),
    "truth.parquet": (parquet(step=[True]), "is of type bool; write whole numbers"),
    "null.parquet": (parquet(weight=pa.array([None], pa.float64())), "lacks 1 values; fill them in"),
    "huge.parquet": (parquet(token=pa.array([2**64 - 1], pa.uint64())), "is of type uint64; write whole numbers"),
    "large.parquet": (parquet(token=[2**40]), "holds 1099511627776; count from 0 to 2147483647"),
    "negative.parquet": (parquet(expert=[-1]), "column 'expert' of trace"),
    "nan.parquet": (parquet(weight=[float("nan")]), "holds a value that is not finite; mend it"),
    "infinite.parquet": (parquet(weight=[float("inf")]), "holds a value that is not finite; mend it"),
    "empty.jsonl": (lines(" \n"), "has no rows"),
    "broken.jsonl": (lines('{"step": 0, '), "cannot be parsed"),
    "list.jsonl": (lines("[1, 2]\n"), "cannot be parsed"),
    "prose.jsonl": (lines("once upon a time\n"), "cannot be parsed"),
    "text.jsonl": (line(step="zero"), "is of type string; write whole numbers"),
    "field.jsonl": (lines('{"step": 0}\n'), "needs one column 'layer'"),
    "mixed.jsonl": (lines('{"step": 0}\n{"step": "one"}\n'), "cannot be parsed"),
    "twice.jsonl": (
        lines((json.dumps({n: c[0] for n, c in GOOD.items()}) + "\n") * 2),
        "repeat the step, layer, token",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_every_bad_file_ends_in_one_sentence(name, tmp_path):
    write, words = BAD[name]
    path = tmp_path / name
    if write is not None:
        write(path)
    sha256 = sha256_of_file(str(path)) if write is not None and not name.endswith(".csv") else "0" * 64
    with pytest.raises(TraceError) as caught:
        Replay(path=str(path), sha256=sha256).check(8, 2)
    sentence = str(caught.value)
    assert words in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_a_folder_is_no_trace(tmp_path):
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(TraceError, match=r"cannot be read \(Is a directory\)"):
        Replay(path=str(tmp_path / "folder.parquet"), sha256="0").check(8, 2)


def test_the_checksum_is_asked_for_with_its_value_and_held_to(recorded, tmp_path):
    params = recorded().params
    with pytest.raises(TraceError, match=f"add params.traffic.replay.sha256={params.sha256}"):
        Replay(path=params.path).check(6, 2)
    with pytest.raises(TraceError, match="no file is named"):
        Replay().check(6, 2)
    save_trace(str(tmp_path / "trace.parquet"), rows((0, 0, 0, 0, 1.0)))
    with pytest.raises(TraceError, match="give the file that was recorded"):
        Replay(path=params.path, sha256="1" * 64).check(6, 2)


def test_a_file_that_changes_after_it_was_read_changes_nothing(recorded, tmp_path):
    traffic = recorded()
    before = traffic.routing(3, 6, 2, 0, 0, layer=4)
    (tmp_path / "trace.parquet").write_text("gone")
    assert torch.equal(traffic.routing(3, 6, 2, 0, 0, layer=4).to_dense(), before.to_dense())


def test_other_columns_and_integer_weights_are_welcome(tmp_path):
    path = tmp_path / "trace.parquet"
    parquet(weight=pa.array([1], pa.int8()), token=pa.array([0], pa.uint16()), note=["x"])(path)
    trace = load_trace(str(path), sha256_of_file(str(path)))
    assert trace.at(0, 0).weight_N.tolist() == [1.0]
