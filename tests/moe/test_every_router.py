"""Every registered routing keeps the promises of a router; a new one is tested here by being registered.

A routing is tested with its defaults and as the VARIANTS of its family's own tests say. It keeps every promise below
unless a table names it together with the reason. All tables but ``MASK_MATTERS`` are exact: who is named there must
really break the promise, so that a table cannot excuse what has been mended.
"""

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moebench.contracts import BUILTIN_PLUGINS, Descriptor, Selection, load_attribute, load_file
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights
from moebench.moe.router import select
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape
from moebench.moe.stand_ins import StandIns

MEMBERS = [member for module in BUILTIN_PLUGINS for member in importlib.import_module(module).DESCRIPTORS]
ROUTINGS: dict[str, Descriptor] = {member.name: member for member in MEMBERS if member.kind == "routing"}
STRUCTURES: dict[str, Descriptor] = {member.name: member for member in MEMBERS if member.kind == "structure"}
HIDDEN, WIDTH, EXPERTS, TOKENS, SEQUENCE = 32, 8, 16, 64, 16
BASE = ModelShape(HIDDEN, WIDTH, EXPERTS, 2, (0, 1), Selection("softmax", 2, renormalize=True))

NO_INPUT = {"hash", "read_me", "mixer", "advmoe", "thor"}
"""Hidden states are not read: a table, token ids, a context vector, an image or chance decide."""

NOTHING_DRAWN = {
    "hash": lambda params: params.table == "balanced",
    "moex": lambda params: True,
    "thor": lambda params: True,
}
"""Two seeds give the same router: a table of frequencies, the experts' own weights, and draws of the Context's rng."""

STRAIGHT_THROUGH = {"advmoe"}
"""Weights of 1 that have a gradient nevertheless."""

NO_GRADIENT = {
    "hash": "a table",
    "thor": "chance",
    "moex": "no parameters: scores are made of the experts' weights",
    "mixer": "a refit by least squares outside autograd",
}
"""Routers that the output cannot teach, beside those whose weights do not depend on logits."""

SEQUENCE_BOUND = {
    "capped": lambda params: params.policy != "probs",
    "thor": lambda params: params.draw != "segment",
    "random": lambda params: True,
    "uoe": lambda params: not params.weighted or params.select == "expert" or params.batch_norm_epsilon is not None,
    "got_similarity": lambda params: params.causal,
    "got_attention": lambda params: True,
    "read_me": lambda params: True,
    "dmoerm": lambda params: True,
    "robust_qa": lambda params: params.gate == "sequence",
    "odp": lambda params: params.beyond_text is not None or params.by == "random",
}
"""The order of tokens matters: draws are dealt in order, a token looks at those before it, a sequence is read, or
tokens of gate zero fill up what is left."""

MASK_MATTERS = {
    "capped": "padding takes no place",
    "got_similarity": "padding is not looked at",
    "got_attention": "padding is not looked at",
    "read_me": "padding is not looked at",
    "dmoerm": "padding does not vote",
    "robust_qa": "padding is no first token",
    "expert_choice": "padding takes no place",
    "uoe": "padding takes no place",
    "thor": "draws are dealt in order",
    "odp": "padding is not drawn, and takes no place among the protected",
}
"""Leaving tokens out changes what the others get."""


RARELY_AHEAD = {"odp": lambda params: 0 < params.protect < 0.1}
"""So few tokens of a call are protected that what follows the others need not change which."""


@dataclass(frozen=True)
class Variant:
    """A routing with parameters on a layer of some shape."""

    name: str
    params: Any
    shape: ModelShape

    def __str__(self):
        changed = {k: v for k, v in vars(self.shape).items() if v != getattr(BASE, k) and k != "selection"}
        return f"{self.name}-{self.params!r}-{changed or ''}"

    def build(self, seed=0, **weights):
        kinds = self.params.kinds(self.shape)
        own = sum(kind not in ("zero", "copy", "constant") for kind in kinds)
        rows = (3 if self.shape.heads else 2 if self.shape.gated else 1) * self.shape.width
        layer = LayerWeights(
            seeded(own, rows, self.shape.hidden, seed=100) / self.shape.hidden**0.5,
            seeded(own, self.shape.hidden, self.shape.width, seed=200) / self.shape.width**0.5,
            activation=self.shape.activation,
            gated=self.shape.gated,
            heads=self.shape.heads,
        )
        layer = replace(layer, **weights)
        bundle = load_attribute(ROUTINGS[self.name].factory)(self.params)(layer, self.shape, seed)
        store = ExpertStore(
            layer.gate_up,
            layer.down,
            bundle.kinds,
            layer.activation,
            layer.gated,
            constants=bundle.constants,
            heads=layer.heads,
        )
        built = Built(self, bundle, store)
        if getattr(self.params, "calibrated", False):
            x_TH = seeded(TOKENS, self.shape.hidden, seed=9)
            bundle.router.adopt(bundle.router.calibration(x_TH, built.context()))
        return built


@dataclass(frozen=True)
class Built:
    """A router on its layer, and the Context that it is asked with."""

    variant: Variant
    bundle: Any
    store: ExpertStore

    @property
    def router(self):
        return self.bundle.router

    def context(self, tokens=TOKENS, **changes):
        fields = StandIns(tokens, len(self.bundle.kinds), self.variant.params, seed=7, sequence=SEQUENCE)
        ctx = fields.fill(Context(experts=self.store), self.router)
        if ctx.attn is not None and not self.router.causal:
            ctx = replace(ctx, attn=seeded(*ctx.attn.shape, seed=8).softmax(-1))
        return replace(ctx, **changes)

    def route(self, x_TH=None, **changes):
        x_TH = seeded(TOKENS, self.variant.shape.hidden, seed=1) if x_TH is None else x_TH
        return self.router(x_TH, self.context(len(x_TH), **changes))


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


SIGMOID_GROUPED = Selection("sigmoid", 4, True, 2.5, True, (8, 4))
WIDE = {"experts": 64}
BASIC = [
    ("topk", {}, {**WIDE, "selection": SIGMOID_GROUPED}),
    ("topk", {"renormalize": False, "scale": 0.5}, {**WIDE, "selection": SIGMOID_GROUPED}),
    ("topk", {"k": 1}, {"selection": Selection("one", 3, renormalize=False)}),
    ("topk", {"scale": 3.0}, {"selection": Selection("one", 3, renormalize=True)}),
    ("mixtral", {"k": 1}, {}),
    ("deepseek_v3", {}, WIDE),
    ("deepseek_v3", {"groups": 1, "groups_kept": 1}, WIDE),
    ("deepseek_v3", {"groups": 64, "groups_kept": 8}, WIDE),
    ("moepp", {"k": 4, "zero": 8, "scale": 2.0}, {}),
    ("moepp", {"scorer": "mlp"}, {}),
    ("moepp", {"residual": False}, {}),
    ("moepp", {"zero": 0, "copy": 0, "constant": 0}, {}),
    ("odp", {"protect": 0.0}, {}),
    ("odp", {"protect": 0.4, "importance": "norm"}, {}),
    ("odp", {"protect": 0.4, "k": 4}, {}),
    ("odp", {"protect": 0.0, "by": "random", "rate": 0.5}, {}),
    ("odp", {"protect": 0.0, "by": "random"}, {}),
    ("dropped", {"experts": ["0:1", "0:4"]}, {}),
]
"""Variants of the routings that have no family of their own."""


def family_variants():
    """What the tests of the families say, beside the defaults of every routing that fits the base shape."""
    found = [Variant(name, ROUTINGS[name].params_from(own), BASE.with_(**changes)) for name, own, changes in BASIC]
    for path in sorted((Path(__file__).parent / "routers").glob("test_*.py")):
        for name, params, changes in getattr(load_file(path), "VARIANTS", ()):
            found.append(Variant(name, params, BASE.with_(**changes)))
    for name, member in ROUTINGS.items():
        params = member.params_from({})
        if any(variant.name == name and variant.params == params for variant in found):
            continue
        found.append(Variant(name, params, shape_for(params)))
    return found


def shape_for(params):
    """The base shape, after the structure that makes the experts of a routing where it names one."""
    structure = getattr(params, "structure", None)
    return BASE if structure is None else STRUCTURES[structure].params_from({}).reshape(BASE)


VARIANTS = family_variants()
every = pytest.mark.parametrize("variant", VARIANTS, ids=str)


def named(table, variant):
    """Whether a table of predicates over parameters names this variant."""
    return variant.name in table and table[variant.name](variant.params)


# --- what holds for all ----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("training", [False, True])
def test_entries_are_in_range_unique_and_finite(variant, training):
    built = variant.build()
    routing = built.route(training=training, rng=torch.Generator().manual_seed(3))
    assert built.bundle.kinds == variant.params.kinds(variant.shape)
    assert built.router.causal == getattr(variant.params, "causal", True)
    beyond = {getattr(variant.params, "beyond_text", None)} - {None}
    assert built.router.needs & {"features", "task", "attn"} == beyond
    assert routing.shape == (TOKENS, len(built.bundle.kinds))
    assert (routing.token_N.dtype, routing.expert_N.dtype) == (torch.int64, torch.int64)
    for index_N, size in zip((routing.token_N, routing.expert_N), routing.shape, strict=True):
        assert 0 <= int(index_N.min()) <= int(index_N.max()) < size
    assert len(set(zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True))) == len(routing.token_N)
    assert torch.isfinite(routing.weight_N).all()
    assert routing.k_T.max() <= variant.params.max_k(variant.shape)


@every
def test_scores_are_float32_whatever_the_input_and_of_every_expert(variant):
    routing = variant.build().route(seeded(TOKENS, HIDDEN).bfloat16())
    assert routing.weight_N.dtype == torch.float32
    for scores_TE in (routing.logits_TE, routing.probs_TE):
        if scores_TE is not None:
            assert scores_TE.dtype == torch.float32
            assert scores_TE.shape == routing.shape
    if routing.probs_TE is not None:
        assert (routing.probs_TE >= 0).all()


@every
def test_no_tokens(variant):
    routing = variant.build().route(torch.zeros(0, HIDDEN))
    assert routing.num_tokens == 0
    assert len(routing.token_N) == 0


@every
def test_sorted_apply_is_dense_apply(variant):
    """R27: over sorted entries as with the matrix: within 4.1e-7 of the largest output (5e-7 for 18 routers)."""
    routing = variant.build().route()
    x_TH = seeded(TOKENS, HIDDEN, seed=1)
    expert_EHH = seeded(routing.num_experts, HIDDEN, HIDDEN, seed=5) / HIDDEN
    dense_TH = torch.einsum("te,ehi,th->ti", routing.to_dense(), expert_EHH, x_TH)
    token_N, offsets_E1, weight_N = routing.sorted()
    sorted_TH = torch.zeros_like(x_TH)
    for expert, (start, end) in enumerate(zip(offsets_E1[:-1].tolist(), offsets_E1[1:].tolist(), strict=True)):
        rows = token_N[start:end]
        sorted_TH.index_add_(0, rows, x_TH[rows] @ expert_EHH[expert] * weight_N[start:end, None])
    torch.testing.assert_close(sorted_TH, dense_TH, atol=5e-6, rtol=1e-5)


WITH_SELECTION = [variant for variant in VARIANTS if variant.params.selection(variant.shape) is not None]


@pytest.mark.parametrize("variant", WITH_SELECTION, ids=str)
def test_declared_selection_is_what_the_router_does(variant):
    """Experts, their order and their weights, exactly."""
    built, rule = variant.build(), variant.params.selection(variant.shape)
    routing = built.route()
    if routing.logits_TE is None:
        assert variant.name in NO_INPUT, "a routing with a selection keeps its logits"
        assert (routing.weight_N == 1).all()
        return
    bias_E = built.router.get_buffer("selector.bias_E") if rule.bias else None
    indices_TK, weights_TK = select(routing.logits_TE, rule, bias_E)
    assert torch.equal(routing.padded(rule.k)[0], indices_TK)
    assert torch.equal(routing.padded(rule.k)[1], weights_TK)


@every
def test_same_seed_same_routing(variant):
    first, again, other = (variant.build(seed).route() for seed in (3, 3, 4))
    assert torch.equal(first.to_dense(), again.to_dense())
    assert torch.equal(first.to_dense(), other.to_dense()) == named(NOTHING_DRAWN, variant)


@every
def test_training_does_not_write_into_the_models_own_router(variant):
    own_EH, own_E = seeded(variant.shape.experts, HIDDEN, seed=6), torch.zeros(variant.shape.experts)
    built = variant.build(router_EH=own_EH, router_bias_E=own_E)
    with torch.no_grad():
        for parameter in built.router.parameters():
            parameter += 1
    built.router.update(built.route())
    assert torch.equal(own_EH, seeded(variant.shape.experts, HIDDEN, seed=6))
    assert not own_E.any()


# --- what holds unless a table says otherwise ------------------------------------------------------------------------


@every
def test_causal_routers_do_not_look_ahead_and_the_others_do(variant):
    built, half = variant.build(), TOKENS // 2 + SEQUENCE // 2
    x_TH = seeded(TOKENS, HIDDEN, seed=1)
    before_TE = built.route(x_TH).to_dense()
    ctx = built.context()
    changed_TH = torch.cat([x_TH[:half], seeded(TOKENS - half, HIDDEN, seed=2)])
    ids_T = ctx.token_ids_T
    if ids_T is not None:
        ids_T = torch.cat([ids_T[:half], (ids_T[half:] + 1) % 17])
    after_TE = built.route(changed_TH, token_ids_T=ids_T).to_dense()
    same = torch.allclose(before_TE[:half], after_TE[:half], atol=1e-6)
    assert same == built.router.causal or named(RARELY_AHEAD, variant)
    reads = ids_T is not None or variant.name not in NO_INPUT
    assert reads != torch.allclose(before_TE[half:], after_TE[half:], atol=1e-3), "what the router reads has no effect"


@every
def test_order_of_tokens_matters_only_to_routers_of_sequences(variant):
    built = variant.build()
    x_TH, order_T = seeded(TOKENS, HIDDEN, seed=1), torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    ctx = built.context()
    per_token = ("segment_T", "token_ids_T", "task", "modality_T")
    moved = {name: getattr(ctx, name)[order_T] for name in per_token if getattr(ctx, name) is not None}
    if ctx.prev is not None:
        moved["prev"] = replace(ctx.prev, logits_TE=ctx.prev.logits_TE[order_T])
    permuted_TE = built.route(x_TH[order_T], **moved).to_dense()
    expected_TE = built.route(x_TH).to_dense()[order_T]
    assert torch.allclose(permuted_TE, expected_TE, atol=2e-6, rtol=1e-5) != named(SEQUENCE_BOUND, variant)


@every
def test_invalid_tokens_have_no_entries_and_change_nothing(variant):
    built = variant.build()
    valid_T = torch.arange(TOKENS) % 3 != 0
    masked = built.route(valid_T=valid_T)
    assert not masked.k_T[~valid_T].any()
    same = torch.equal(masked.to_dense()[valid_T], built.route().to_dense()[valid_T])
    assert same or variant.name in MASK_MATTERS


def learns_from_output(variant):
    """Whether weights depend on logits: not with score ``one``, where one renormalised expert is all (R28), or where
    released code adds up without the gate (``weighted=False``)."""
    rule = variant.params.selection(variant.shape)
    if variant.name in STRAIGHT_THROUGH:
        return True
    if not getattr(variant.params, "weighted", True):
        return False
    return rule is None or not (rule.score == "one" or (rule.renormalize and rule.k == 1))


@every
def test_gradient_of_the_output_reaches_every_parameter(variant):
    built = variant.build()
    gate_TE = built.route().to_dense()
    if gate_TE.requires_grad:
        (gate_TE * seeded(*gate_TE.shape, seed=3)).sum().backward()
    expected = learns_from_output(variant) and variant.name not in NO_GRADIENT
    names = dict(built.router.named_parameters())
    assert names or not expected
    for name, parameter in names.items():
        size = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        assert (size > 1e-6) == expected, name


# --- the tables ------------------------------------------------------------------------------------------------------


def test_every_routing_is_here_and_the_tables_name_no_other():
    assert {variant.name for variant in VARIANTS} == set(ROUTINGS)
    for table in (NO_INPUT, NOTHING_DRAWN, STRAIGHT_THROUGH, NO_GRADIENT, SEQUENCE_BOUND, MASK_MATTERS, RARELY_AHEAD):
        assert set(table) <= set(ROUTINGS)
