"""Experts of one layer in schemes of their own: each goes to its kernel, and one without a kernel bars the layer."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.backends.packed import MATMULS
from moebench.contracts import Execution, MoebenchError, Refusal, Scheme
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.routing import Routing

INT8 = Scheme("rtn", 8.0)
PACKABLE = (INT8, Scheme("rtn", 4.0, 32), Scheme("rtn", 4.0, 32, symmetric=False))
INT2 = Scheme("rtn", 2.0, 32, symmetric=False)
KERNELS = {8.0: "aten::_weight_int8pack_mm", 4.0: "aten::_weight_int4pack_mm_for_cpu"}
ARCHETYPES = ("dynamic_k", "empty", "hot", "signed", "null", "dropped")

mixtures = st.lists(st.sampled_from(PACKABLE), min_size=6, max_size=6)
relaxed = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def mixture(lab, schemes, some_kinds=("ffn",) * 6, seed=0):
    """A store whose experts that own weights are quantized each by its own scheme."""
    dense = lab.store(seed, torch.bfloat16, some_kinds=some_kinds)
    rounded = {
        name: tuple(
            round_to_nearest(weight, scheme) for weight, scheme in zip(getattr(dense, name), schemes, strict=True)
        )
        for name in ("gate_up", "down")
    }
    return dataclasses.replace(dense, **rounded)


def planned(store):
    """What a plan knows of a mixture before its weights exist."""
    average = sum(scheme.bits for scheme in store.schemes) / len(store.schemes)
    return (Scheme("mixed", average),) * len(store.schemes)


@relaxed
@given(
    schemes=mixtures,
    archetype=st.sampled_from(ARCHETYPES),
    count=st.sampled_from([0, 1, 3, 17]),
    boundary=st.sampled_from(["topk", "sorted"]),
    seed=st.integers(0, 2**20),
)
def test_a_mixture_agrees_with_the_oracle(lab, schemes, archetype, count, boundary, seed):
    store = mixture(lab, schemes, lab.kinds(archetype), seed % 7)
    lab.check("packed", store, torch.bfloat16, archetype, count, boundary, seed)


@relaxed
@given(schemes=mixtures, seed=st.integers(0, 2**20))
def test_an_expert_of_a_mixture_computes_bit_for_bit_what_it_computes_among_its_like(lab, schemes, seed):
    store = mixture(lab, schemes)
    x_TH = lab.tokens(9, torch.bfloat16, seed)
    mixed = lab.executor("packed", store, lab.spec(store, "bfloat16", schemes=planned(store)))
    for expert, scheme in enumerate(schemes):
        indices_TK = torch.full((9, 1), expert)
        inputs = Routing.topk(indices_TK, torch.ones(9, 1), 6).padded()
        alike = mixture(lab, [scheme] * 6)
        alone = lab.executor("packed", alike, lab.spec(alike, "bfloat16"))
        assert torch.equal(mixed(x_TH, *inputs), alone(x_TH, *inputs))


@relaxed
@given(schemes=mixtures)
def test_a_mixture_names_all_its_kernels_and_counts_its_own_bytes(lab, schemes):
    store = mixture(lab, schemes)
    session = lab.backend("packed").load({0: store}, {0: lab.spec(store, "bfloat16", schemes=planned(store))})
    assert set(session.executed().kernels) == {KERNELS[scheme.bits] for scheme in schemes} | {"aten::index_add_"}
    assert session.executed().weights == "packed"
    # 3 matrices of 32 x 32: int8 has one scale a row; int4 a scale and an offset a row and group, symmetric or not
    assert session.resident_bytes() == sum(3 * 32 * (32 * s.bits / 8 + (2 if s.bits == 8 else 4)) for s in schemes)


def test_a_plan_takes_a_mixture_by_its_schemes_and_by_its_average(lab):
    store = mixture(lab, PACKABLE * 2)
    expected = Execution("packed", excludes=MATMULS)
    for schemes in (store.schemes, planned(store)):
        assert lab.backend("packed").supports(lab.spec(store, "bfloat16", schemes=schemes)) == expected


@pytest.mark.parametrize("name", ["reference", "eager", "batched", "grouped"])
def test_dense_backends_run_a_mixture_dequantized(lab, name):
    store = mixture(lab, (*PACKABLE, INT2, *PACKABLE[:2]))
    spec = lab.spec(store, "bfloat16", schemes=planned(store))
    assert lab.backend(name).supports(spec).weights == "dequantized"
    lab.check(name, store, torch.bfloat16, "dynamic_k", 17, "topk", 3)


@pytest.mark.parametrize("matrices", [("gate_up", "down"), ("gate_up",), ("down",)])
def test_one_expert_without_a_kernel_bars_the_whole_layer(lab, matrices):
    good = mixture(lab, [INT8] * 6)
    bad = mixture(lab, (*[INT8] * 4, INT2, INT8))
    store = dataclasses.replace(good, **{name: getattr(bad, name) for name in matrices})
    answer = lab.backend("packed").supports(lab.spec(bad, "bfloat16"))
    assert isinstance(answer, Refusal)
    assert answer.reason.startswith("expert 4 cannot be packed: packed reads 8 or 4 bit codes")
    with pytest.raises(MoebenchError, match=r"^expert 4 cannot be packed: packed reads .* not rtn of 2 bits"):
        lab.backend("packed").load({0: store}, {0: lab.spec(store, "bfloat16", schemes=planned(bad))})


def test_experts_are_named_by_their_ids_among_those_that_own_no_weights(lab):
    store = mixture(lab, [INT8, INT2], some_kinds=("zero", "ffn", "copy", "ffn"))
    answer = lab.backend("packed").supports(lab.spec(store, "bfloat16"))
    assert answer.reason.startswith("expert 3 cannot be packed")
