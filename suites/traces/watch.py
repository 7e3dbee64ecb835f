"""Who goes where in a language model at work, call by call: in its own MoE layers, or in FFNs exchanged for some.

Imported by recording processes only. Shape letters: T tokens of a call, S tokens of a sequence, H hidden.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...contracts import Case, MoebenchError, Registry
from ...moe.router import Router
from ...moe.routing import Context, Routing
from ..models import substream
from ..models.reroute import reroute
from ..models.reroute_call import GIVEN, SEQUENCE
from ..quality.block import Call, MoEBlock
from ..quality.changed import Changed
from ..quality.windows import subjects_of
from ..subject import DTYPES

BACKEND = "eager"
"""Runs the experts, of which a token may have any number."""


@dataclass(frozen=True)
class Seen:
    """What one layer's router read, [T, H], and decided in a call; entries of experts without weights are left out."""

    x_TH: Tensor
    routing: Routing


@dataclass(frozen=True)
class Watched:
    """A layer that is watched: its router and the ExpertStore behind it."""

    router: Router
    store: Any


@dataclass
class Watch:
    """The layers at work, by rising decoder index; ``seen`` is what each did in the call of the model before.

    ``begin`` is told the token ids [1, T] before every call.
    """

    layers: Mapping[int, Watched]
    seed: int
    begin: Callable[[Tensor], None] = lambda ids_1T: None
    seen: dict[int, Seen] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """How many experts with weights a layer has."""
        largest: int = max(max(watched.store.ffn_ids) for watched in self.layers.values())
        return largest + 1

    def note(self, index: int, x_TH: Tensor, routing: Routing) -> None:
        """Note what layer ``index`` did."""
        self.seen[index] = Seen(x_TH, routing)

    def asked(self) -> Iterator[tuple[int, Routing]]:
        """Yield each layer's Routing of the call before, of experts with weights only."""
        for index, watched in self.layers.items():
            yield index, _with_weights(self.seen[index].routing, watched)

    def expected(self, ids_1T: Tensor) -> Iterator[tuple[int, Routing]]:
        """Yield, for every layer but the first, what its router says of that which the layer before read.

        It is the guess that a driver can make while the layer before is still at work (Mixtral-offloading,
        arXiv 2312.17238). Routers that decide once for all layers make none.
        """
        indices = list(self.layers)
        for before, index in itertools.pairwise(indices):
            watched, seen = self.layers[index], self.seen[before]
            if watched.router.scope != "model":
                routing: Routing = watched.router(seen.x_TH, self._context(index, ids_1T, seen.routing))
                yield index, _with_weights(routing, watched)

    def _context(self, index: int, ids_1T: Tensor, prev: Routing) -> Context:
        zeros_T = torch.zeros(ids_1T.numel(), dtype=torch.int64)
        return Context(
            layer=index,
            experts=self.layers[index].store,
            token_ids_T=ids_1T.flatten(),
            segment_T=zeros_T,
            modality_T=zeros_T,
            rng=torch.Generator().manual_seed(substream(self.seed, "routing", index)),
            prev=prev,
        )


@contextlib.contextmanager
def own_layers(model: Any, case: Case, registry: Registry) -> Iterator[Watch]:
    """Watch the MoE layers that the model has, routed as the case says, until the block ends; no weight is copied."""
    factory = registry.get("routing", case.routing.name).create(case.routing.params)
    with contextlib.ExitStack() as stack:
        routers = stack.enter_context(reroute(model, factory, BACKEND, case.seed, _of_text))
        chosen = {index: layer for index, layer in routers.layers.items() if index in case.layers}
        watch = Watch({index: Watched(layer.bundle.router, layer.store) for index, layer in chosen.items()}, case.seed)
        _check(watch, case)

        def note(index: int) -> Callable[[Any, tuple[Any, ...], Any], None]:
            return lambda gate, args, _: watch.note(index, args[0].flatten(0, -2), routers.routings[index])

        for index, layer in chosen.items():
            stack.callback(layer.gate.register_forward_hook(note(index)).remove)
        yield watch


@contextlib.contextmanager
def exchanged_layers(model: Any, case: Case, registry: Registry) -> Iterator[Watch]:
    """Put the case's MoE layers in the place of the model's FFNs and watch them until the block ends."""
    subjects = subjects_of(case, registry)
    watched = {index: Watched(subject.layer.router, subject.layer.store) for index, subject in subjects.items()}
    watch = Watch(watched, case.seed)
    _check(watch, case)
    changed = Changed(case, registry, BACKEND, subjects, model, WatchedBlock)
    try:
        for block in changed.blocks.values():
            if isinstance(block, WatchedBlock):  # they all are: it is the class that was given
                block.watch = watch

        def begin(ids_1T: Tensor) -> None:
            changed.calls.clear()
            for block in changed.blocks.values():
                block.token_ids_T = ids_1T.flatten()

        watch.begin = begin
        with changed.applied():
            yield watch
    finally:
        changed.close()


class WatchedBlock(MoEBlock):
    """An MoE layer in the place of an FFN that tells a Watch what it does, and compares itself with nothing."""

    watch: Watch

    @torch.no_grad()
    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return y in the shape and dtype of ``x_BTH``."""
        x_TH = x_BTH.flatten(0, -2).to(DTYPES[self.subject.spec.dtype])
        routing = self.route(x_TH, [call.routing for call in self.calls])
        self.watch.note(self.index, x_TH, routing)
        read_TH = self.subject.layer.reads(x_TH)
        y_TH = self.computed(read_TH, routing)
        self.calls.append(Call(self, read_TH, routing, y_TH, x_TH.new_empty(0), routing))
        return y_TH.to(x_BTH.dtype).view_as(x_BTH)


def _of_text(inputs: Mapping[str, Any]) -> Context:
    """Return what a text says and a call does not: all of it is language."""
    return Context(modality_T=torch.zeros(inputs["input_ids"].numel(), dtype=torch.int64))


def _with_weights(routing: Routing, watched: Watched) -> Routing:
    """Return the Routing without entries of experts that have no weights, which nobody needs to bring."""
    if len(watched.store.ffn_ids) == routing.num_experts:
        return routing
    return routing.keep(torch.isin(routing.expert_N, torch.tensor(watched.store.ffn_ids)))


def _check(watch: Watch, case: Case) -> None:
    """Raise MoebenchError where a router looks at other tokens, or wants to know what a text does not say."""
    needs = {name for watched in watch.layers.values() for name in watched.router.needs}
    if needs & SEQUENCE or not all(watched.router.causal for watched in watch.layers.values()):
        raise MoebenchError(
            f"routing '{case.routing}' looks at a whole sequence, and a step of generation has one token; "
            "record another."
        )
    absent: Sequence[str] = [name for name in GIVEN if name in needs and name != "modality_T"]
    if absent:
        raise MoebenchError(f"routing '{case.routing}' needs the Context's '{absent[0]}', which a text does not give.")
