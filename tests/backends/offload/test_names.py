"""Every policy, prefetcher and execution can be made by its name, and a wrong name is told in one sentence."""

from __future__ import annotations

import pytest

from moebench.backends.offload.costs import Curve, ExpertCosts
from moebench.backends.offload.names import (
    EXECUTIONS,
    POLICIES,
    PREFETCHERS,
    make_execution,
    make_policy,
    make_prefetcher,
    needs_costs,
)
from moebench.backends.offload.policies.lookahead import Belady
from moebench.contracts import MoebenchError

COSTS = ExpertCosts(1.0, Curve.line(0, 0.1), Curve.line(0, 0.4))


def test_every_name_makes_something_new_each_time():
    for name in set(POLICIES) - {"pattern"}:
        assert make_policy(name) is not make_policy(name)
    assert all(make_prefetcher(name) is not None for name in set(PREFETCHERS) - {"none"})
    assert all(make_execution(name, COSTS) is not None for name in set(EXECUTIONS) - {"fetch"})
    assert make_prefetcher("none") is None
    assert make_execution("fetch") is None
    assert {name for name in EXECUTIONS if needs_costs(name)} == {"in_place", "fiddler", "duplex"}


def test_arguments_arrive():
    assert make_policy("lru_k:3").k == 3
    assert make_policy("belady:7").window == 7
    assert isinstance(make_policy("belady"), Belady)
    assert make_policy("cpu_moe:4").count == 4
    assert make_policy("pattern:blk:x").pattern.pattern == "blk:x"
    assert make_policy("hobbit:1/2/3/4").weights == (1, 2, 3, 4)
    assert make_policy("static", {(0, 1): 5}).popularity == {(0, 1): 5}
    assert make_prefetcher("oracle:9").accesses == 9
    assert make_execution("fiddler:max", COSTS).objective == "max"
    assert make_execution("hobbit:0.25").threshold == 0.25


@pytest.mark.parametrize(
    ("make", "spec", "words"),
    [
        (make_policy, "lruu", "unknown policy 'lruu': did you mean 'lru'"),
        (make_policy, "lru:3", "takes no argument; leave out ':3'"),
        (make_policy, "lru_k:x", "policy 'lru_k:x'"),
        (make_policy, "lru_k:0", "k=0 must be at least 1"),
        (make_policy, "lfu:0", "half_life=0.0 must be above 0"),
        (make_policy, "lfu:nan", "half_life=nan must be above 0"),
        (make_policy, "belady:-1", "window=-1 must be at least 0"),
        (make_policy, "cpu_moe:-1", "count=-1 must be at least 0"),
        (make_policy, "pattern", "lacks its argument"),
        (make_policy, "pattern:(", "is not a regular expression"),
        (make_policy, "hobbit:1/2", "four weights are wanted"),
        (make_policy, "hobbit:0/0/0/0", "not all 0"),
        (make_policy, "hobbit:nan/1/1/1", "must be finite"),
        (make_policy, "eam:0", "period=0 must be at least 1"),
        (make_prefetcher, "gates", "did you mean 'gate'"),
        (make_prefetcher, "oracle:0", "accesses=0 must be at least 1"),
        (make_prefetcher, "pregate:0", "layers=0 must be at least 1"),
        (make_prefetcher, "frequency:0", "layers=0 must be at least 1"),
        (make_prefetcher, "eam:0", "layers=0 must be at least 1"),
        (make_execution, "fiddler", "decides by costs of this machine"),
        (make_execution, "hobbit:2", "threshold=2.0 must lie in 0..1"),
        (make_execution, "defer:-1", "count=-1 must be at least 0"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(make, spec, words):
    with pytest.raises(MoebenchError) as caught:
        make(spec)
    told = str(caught.value)
    assert words in told
    assert "\n" not in told
    assert not told.endswith("..")


def test_an_unknown_objective_is_refused():
    with pytest.raises(MoebenchError, match="sum or max is wanted"):
        make_execution("fiddler:mean", COSTS)
