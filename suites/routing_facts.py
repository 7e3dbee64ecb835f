"""Every figure of what a router decides, for suite ``routing``. Imported by workers only.

Experts without weights (zero, copy, constant) cost next to nothing and are fetched from nowhere: sparsity, chunks,
drops and comparisons look at the experts that own weights. Shape letters: T tokens, H hidden, E expert ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..contracts import Case, Choice, Facts, Metric, Registry, Series
from ..moe.capacity import CapacityRule, limit
from ..moe.layer import moe_forward
from ..moe.metrics import load_series, routing_metrics
from ..moe.routing import Context, Routing
from ..moe.routing_metrics.agreement import fluctuation
from ..moe.routing_metrics.chunks import chunk_bytes, sparsity_metrics
from ..moe.routing_metrics.cost import counted_flops, expert_flops
from ..moe.routing_metrics.drops import drop_metrics
from ..moe.routing_metrics.labels import label_information
from ..moe.routing_metrics.prefetch import prefetch_metrics
from ..moe.routing_metrics.tokens import gradient_share, k_histogram, weight_metrics
from .layer import expert_bytes
from .models import substream
from .routing_inputs import Question, make_question, question_of
from .subject import Subject, prepare_subject

WEIGHTLESS = ("zero", "copy", "constant")

MOST_EXPERTS = 4096
"""Beyond so many, loads are not kept one by one, and what needs E x E numbers is left out."""


@dataclass(frozen=True)
class Decided:
    """A router's answer to one question, and its part with experts that own weights, which are numbered anew."""

    case: Case
    registry: Registry
    subject: Subject
    question: Question
    routing: Routing

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every expert id."""
        return self.subject.spec.kinds

    @property
    def owned(self) -> Routing:
        """The entries of experts that own weights."""
        return owned_part(self.routing, self.kinds)

    def asked(self, question: Question) -> Routing:
        """Return the router's answer to another question."""
        with torch.no_grad():
            routing: Routing = self.subject.layer.router(question.x_TH, question.context())
        return routing


def routing_facts(case: Case, registry: Registry, subject: Subject, question: Question, routing: Routing) -> Facts:
    """Return all figures of ``routing``, which the layer's router made of ``question``."""
    decided = Decided(case, registry, subject, question, routing)
    dropped, drop_series = _drops(decided)
    metrics = [
        *routing_metrics(routing, decided.kinds),
        *weight_metrics(routing),
        *_sparsity(decided),
        *dropped,
        *_cost(decided),
        _gradient(decided),
        *_changes(decided),
        *_prefetch(decided),
        *(m for name, label_T in question.labels.items() for m in label_information(decided.owned, label_T, name)),
        Metric("causal", float(subject.layer.router.causal), n=1),
        Metric("model_scope", float(subject.layer.router.scope == "model"), n=1),
    ]
    series = [k_histogram(routing), drop_series]
    if routing.num_experts <= MOST_EXPERTS:
        series.append(load_series(routing))
    layer = case.layers[0]
    return Facts(tuple(metrics), tuple(replace(one, layer=layer, step=0) for one in series))


def owned_part(routing: Routing, kinds: tuple[str, ...]) -> Routing:
    """Return the entries of experts that own weights, by new ids in the same order."""
    owner_E = torch.tensor([kind not in WEIGHTLESS for kind in kinds])
    if bool(owner_E.all()):
        return routing
    new_id_E = owner_E.long().cumsum(0) - 1
    return routing.keep(owner_E[routing.expert_N]).relabel(new_id_E, int(owner_E.sum()))


def _sparsity(decided: Decided) -> Iterator[Metric]:
    """Yield TLS, CLS and the bytes of a chunk: the experts of a layer that own weights are of one size."""
    ctx = Context(segment_T=decided.question.segment_T)
    yield from sparsity_metrics(decided.owned, ctx=ctx)
    yield from chunk_bytes(decided.owned, expert_bytes(decided.subject, decided.case), ctx=ctx)


def _drops(decided: Decided) -> tuple[list[Metric], Series]:
    """Return what a capacity would drop that is served in the order of tokens: factor * N / E slots per expert."""
    owned = decided.owned
    per_token = len(owned.token_N) / max(owned.num_tokens, 1)
    if not per_token:
        return drop_metrics(owned, owned)
    rule = CapacityRule(factor=decided.case.workload["capacity_factor"] * per_token)
    return drop_metrics(owned, limit(owned, ("ffn",) * owned.num_experts, rule))


def _cost(decided: Decided) -> Iterator[Metric]:
    spec, router, tokens = decided.subject.spec, decided.subject.layer.router, decided.routing.num_tokens
    yield from expert_flops(decided.routing, spec.kinds, spec.hidden, spec.width, spec.gated)
    flops = counted_flops(lambda: decided.asked(decided.question))
    yield Metric("router_flops_per_token", flops / tokens if tokens else None, "flop", n=tokens)
    yield Metric("router_parameters", float(sum(p.numel() for p in router.parameters())), n=1)


def _gradient(decided: Decided) -> Metric:
    """Return the share of tokens with gradient-carrying weights, from a float32 input of its own."""
    x_TH = decided.question.x_TH.float().requires_grad_()
    with torch.enable_grad():
        return gradient_share(decided.subject.layer.router(x_TH, decided.question.context()), x_TH)


def _changes(decided: Decided) -> Iterator[Metric]:
    """Yield the fluctuation against the router's own routing of noisy inputs, and against another routing.

    Another routing can be compared where as many experts own weights.
    """
    yield from _prefixed("noise", fluctuation(decided.routing, decided.asked(_noisy(decided))))
    other = replace(decided.case, routing=Choice(**decided.case.workload["other"]))
    subject = prepare_subject(other, decided.registry)
    question = question_of(other, decided.registry, subject, decided.question.x_TH, 0)
    with torch.no_grad():
        theirs = owned_part(subject.layer.router(question.x_TH, question.context()), subject.spec.kinds)
    if theirs.num_experts == decided.owned.num_experts:
        yield from _prefixed("other", fluctuation(decided.owned, theirs))


def _noisy(decided: Decided) -> Question:
    """Return the question with gaussian noise in proportion to the root mean square of each token."""
    x_TH = decided.question.x_TH.float()
    rng = torch.Generator().manual_seed(substream(decided.case.seed, "routing", "noise"))
    scale_T1 = decided.case.workload["noise"] * x_TH.square().mean(1, keepdim=True).sqrt()
    noisy_TH = x_TH + scale_T1 * torch.randn(x_TH.shape, generator=rng)
    return replace(decided.question, x_TH=noisy_TH.to(decided.question.x_TH.dtype))


def _prefixed(prefix: str, metrics: list[Metric]) -> Iterator[Metric]:
    yield from (replace(metric, name=f"{prefix}_{metric.name}") for metric in metrics)


def _prefetch(decided: Decided) -> list[Metric]:
    """Return what this layer's routing tells of the next MoE layer's; nothing after the last one."""
    later = [layer for layer in decided.subject.shape.moe_layers if layer > decided.case.layers[0]]
    if not later or decided.routing.num_experts > MOST_EXPERTS or set(decided.kinds) - {"ffn", *WEIGHTLESS}:
        return []
    if decided.subject.layer.router.scope == "model":
        return prefetch_metrics(decided.owned, decided.owned)
    case = replace(decided.case, layers=(later[0],))
    subject = prepare_subject(case, decided.registry)
    question = question_of(case, decided.registry, subject, _next_states(decided, case, subject), 0)
    if "prev" in subject.layer.router.needs:
        question = replace(question, ctx=replace(question.ctx, prev=decided.routing))
    after = Decided(case, decided.registry, subject, question, decided.routing).asked(question)
    return prefetch_metrics(decided.owned, owned_part(after, subject.spec.kinds))


def _next_states(decided: Decided, case: Case, subject: Subject) -> Tensor:
    """Return the next MoE layer's input: the recorded one, or this layer's input plus its output, brought to rms 1."""
    if decided.registry.params("traffic", case.traffic).recorded:
        return make_question(case, decided.registry, subject, 0).x_TH
    x_TH = decided.question.x_TH
    with torch.no_grad():
        y_TH = moe_forward(decided.subject.layer, x_TH, routing=decided.routing)
        return nnf.rms_norm(x_TH + y_TH, x_TH.shape[1:])
