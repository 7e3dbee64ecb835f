"""MoE layers of a model without their experts: router, shared expert, and an executor that has the experts elsewhere.

Imported by workers only. Shape letters: T tokens of a call, H hidden, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...contracts import Case, LayerSpec, MoebenchError, Registry
from ...moe.experts import ExpertStore
from ...moe.layer import PreparedLayer
from ...moe.recipe import Recipe
from ...moe.router_context import OncePerModel
from ...moe.routing import Context, Routing
from ..models import ModelSource, cache_dir
from ..subject import DTYPES, Subject, boundary_inputs, build_subject

KNOWN = frozenset({"prev"})
"""What of a Context a decoding model can give its routers here."""

Execute = Callable[..., Tensor]
"""An executor: (x_TH, boundary inputs ..., out_TH=None) -> y_TH."""

Hint = Callable[[int, Any, float], None]
"""``Session.hint``."""


def subjects(case: Case, registry: Registry) -> Iterator[tuple[int, Subject]]:
    """Yield (index, layer after its recipe), one at a time: whoever lets each go holds one layer's experts at most."""
    recipe = Recipe.of(case, registry)
    for index in sorted(case.layers):
        yield index, build_subject(replace(case, layers=(index,)), registry, recipe, cache_dir())


@dataclass
class Bare:
    """A layer whose experts are elsewhere. ``routings`` are those of the layers before it in the same call."""

    index: int
    layer: PreparedLayer
    spec: LayerSpec

    @classmethod
    def of(cls, index: int, subject: Subject) -> Bare:
        """Return the layer of a subject without its experts; MoebenchError for a router that lacks something here."""
        router = subject.layer.router
        lacking = sorted(router.needs - KNOWN)
        if lacking:
            raise MoebenchError(
                f"a router here needs the Context's '{lacking[0]}', which token by token is not given; use another "
                f"routing, such as axes.routing=topk."
            )
        if router.scope == "model" and not isinstance(router, OncePerModel):
            raise MoebenchError("routers that decide for the whole model are not run here; use axes.routing=topk.")
        return cls(index, replace(subject.layer, store=_without_experts(subject.layer.store)), subject.spec)

    def route(self, x_TH: Tensor, before: Routing | None) -> Routing:
        """Return the Routing of what the layer reads."""
        routing: Routing = self.layer.router(x_TH, Context(layer=self.index, prev=before))
        return routing


def _without_experts(store: ExpertStore) -> ExpertStore:
    """Return a store of no experts that says the rest of what ``store`` says."""
    empty = torch.empty(0, 0, 0)
    return replace(store, gate_up=empty, down=empty, kinds=(), sparsity=None, stored=None)


Look = Callable[[int, Routing, Sequence[Routing]], None]
"""What sees (layer, Routing of all tokens, the parts in which it is executed)."""


class Answer(NamedTuple):
    """What the experts of a layer read, [T, H], their Routing, and what they answered, [T, H]."""

    layer: int
    x_TH: Tensor
    routing: Routing
    y_TH: Tensor


class Layers:
    """All MoE layers of a model in the order in which a call passes them.

    ``executors`` says who runs the experts of each; ``hint`` is told what the next layer's gate says of this layer's
    input, one expert after another, and ``look`` what every layer was asked, all at once and in the parts in which it
    asked its executor. A traffic sets ``forced``: the Routing of each layer in this call. With ``replayed`` Routings of
    every call, the routers run all the same, and their answers are replaced. An executor takes one expert after
    another; ``by_token`` gives it one token after another. Where ``seen`` is a list, it is given what every executor
    was asked and what it answered.
    """

    def __init__(self, bare: Mapping[int, Bare], dtype: str, by_token: bool = False) -> None:
        self.bare, self.by_token = dict(sorted(bare.items())), by_token
        self.dtype = DTYPES[dtype]
        order = list(self.bare)
        self.following = dict(itertools.pairwise(order))
        self.executors: Mapping[int, Execute] = {}
        self.hint: Hint | None = None
        self.look: Look | None = None
        self.forced: Mapping[int, Routing] | None = None
        self.replayed: Sequence[Mapping[int, Routing]] | None = None
        self.seen: list[Answer] | None = None
        self._first, self._call = order[0], -1
        self._before: Routing | None = None

    def serve_by(self, session: Any, replayed: Sequence[Mapping[int, Routing]] | None = None) -> None:
        """Have the experts run by ``session`` from now on, which begins at the first layer of a first call."""
        self.executors = {index: session.layer(index) for index in self.bare}
        self.hint, self.look, self.seen = session.hint, None, None
        self.replayed, self._call = replayed, -1

    @torch.no_grad()
    def __call__(self, index: int, x_TH: Tensor) -> Tensor:
        """Return y_TH of layer ``index``, in the dtype of ``x_TH``."""
        bare, given_TH = self.bare[index], x_TH
        x_TH = x_TH.to(self.dtype)
        first = index == self._first
        self._call += first
        routing = self._routing(bare, x_TH, None if first else self._before)
        self._before = routing
        if self.hint is not None and index in self.following:
            self._tell_next(self.hint, self.following[index], x_TH, routing)
        read_TH = bare.layer.reads(x_TH)
        y_TH = self._experts(bare, read_TH, routing)
        if self.seen is not None:
            self.seen.append(Answer(index, read_TH, routing, y_TH))
        if bare.layer.shared is not None:
            y_TH = bare.layer.shared.added_to(y_TH, read_TH)
        return y_TH.to(given_TH.dtype)

    def _experts(self, bare: Bare, x_TH: Tensor, routing: Routing) -> Tensor:
        parts, run = [routing], self.executors[bare.index]
        if self.by_token:
            parts = [routing.part(token, token + 1) for token in range(len(x_TH))]
        if self.look is not None:
            self.look(bare.index, routing, parts)
        done, outputs = 0, []
        for part in parts:
            inputs = boundary_inputs(bare.spec.boundary, part, bare.spec)
            outputs.append(run(x_TH[done : done + part.num_tokens], *inputs, out_TH=None))
            done += part.num_tokens
        return torch.cat(outputs)

    def _routing(self, bare: Bare, x_TH: Tensor, before: Routing | None) -> Routing:
        own = bare.route(x_TH, before)
        if self.forced is not None:
            return self.forced[bare.index]
        if self.replayed is None:
            return own
        return self.replayed[self._call][bare.index]

    def _tell_next(self, hint: Hint, index: int, x_TH: Tensor, routing: Routing) -> None:
        """Hint at the experts that the gate of layer ``index`` chooses for what the layer before it reads."""
        guess = self.bare[index].route(x_TH, routing)
        weight_E = torch.zeros(guess.num_experts, dtype=torch.float64)
        weight_E.index_add_(0, guess.expert_N, guess.weight_N.double())
        for expert in sorted(set(guess.expert_N.tolist()), key=lambda e: (-float(weight_E[e]), e)):
            hint(index, [expert], float(weight_E[expert]))


def source_of(case: Case, registry: Registry) -> ModelSource:
    """Return where the model's weights come from."""
    source: ModelSource = registry.get("model", case.model.name).create(case.model.params)
    return source
