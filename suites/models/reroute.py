"""Our routers in real transformers models: ``with reroute(model, "moepp", "grouped"): ...``.

A transformers MoE block asks its gate for (logits, weights, indices) and hands them to its experts. Within the block
the gate's ``forward`` is ours; its module, parameters and hooks stay, so that the model records our router logits, and
on exit it is the model that it was, bit for bit. Experts without weights (copy, constant) are folded: what they give is
added to the output of the others. Shared experts are the model's own, with or without: a scheme's are not added.

Our routers score in float32. Where a model scores in less (OLMoE, Mixtral, Qwen3-MoE in bfloat16), its own rule in our
hands may choose differently near a tie; in float32 logits are equal.

Shape letters: T tokens of a call, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...backends.bridge import attach, moe_modules
from ...contracts import Backend, MoebenchError, Registry, unknown
from ...moe.router import Router, RouterBundle
from ...moe.router_context import OncePerModel
from ...moe.routing import Context, Routing
from ...moe.shapes import ModelShape
from . import substream
from .hf_config import READERS
from .reroute_call import Call, ContextOf, attention_beside
from .reroute_layer import ReroutedLayer, RouterFactory

__all__ = ["Rerouted", "RouterFactory", "model_shape", "reroute"]


@contextmanager
def reroute(
    model: nn.Module,
    routing: str | RouterFactory,
    backend: str | Backend | None = None,
    seed: int = 0,
    context: Context | ContextOf | None = None,
) -> Iterator[Rerouted]:
    """Route the MoE layers of ``model`` by ``routing`` within the ``with`` block, which receives a ``Rerouted``.

    ``routing`` is the name of one (with its defaults) or a factory; each layer gets a router made from the layer's own
    gate, and from a seed of its own where the gate does not decide all. ``backend`` attaches one of ours for the same
    time. Without one the model's own execution stays, which runs the same number of FFN experts for every token: a
    token with fewer is refused.

    ``context`` is what the model cannot know, such as ``Context(task=1)``, or a function that makes it anew from the
    inputs of each call: ``lambda inputs: Context(modality_T=(inputs["input_ids"] == IMAGE).long().flatten())``. A
    routing that needs a field which nobody gave is refused when a call begins, before any layer runs.
    """
    factory = Registry.load().get("routing", routing).create() if isinstance(routing, str) else routing
    with ExitStack() as stack:
        if backend is not None:
            stack.enter_context(attach(model, backend))
        handle = Rerouted(model, factory, seed, context)
        handle.enter()
        stack.callback(handle.exit)
        yield handle


class Rerouted:
    """The routers at work, by decoder index, and what each last did.

    ``context`` holds what the model cannot know (task, features, ranks, progress ...); set it between calls. The layer,
    the Routing of the layer before, token ids, sequences, padding and attention are filled in from the call, and a
    generator from ``seed`` where none is given. A router of scope ``model`` is the same object for all layers.
    """

    def __init__(
        self, model: nn.Module, factory: RouterFactory, seed: int, context: Context | ContextOf | None = None
    ) -> None:
        shape = model_shape(model)
        self.model = model
        self.context = context if isinstance(context, Context) else Context()
        self.routings: dict[int, Routing] = {}
        self.layers: dict[int, ReroutedLayer] = {}
        self._context_of = None if isinstance(context, Context) else context
        self._rng = torch.Generator().manual_seed(substream(seed, "rng"))
        self._call = Call()
        self._plan: dict[int, Routing] = {}
        self._hooks: list[Any] = []
        for index, experts in sorted(moe_modules(model).items()):
            layer = ReroutedLayer(self.model, index, experts, factory, shape, substream(seed, "router", index))
            self.layers[index] = layer
            if layer.bundle.router.scope == "model":
                factory = _always(layer.bundle)
        self._order = list(self.layers)

    @property
    def routers(self) -> dict[int, Router]:
        """The router of every layer."""
        return {index: layer.bundle.router for index, layer in self.layers.items()}

    def enter(self) -> None:
        """Take the place of the gates."""
        inner: nn.Module = getattr(self.model, "base_model", self.model)
        self._hooks = [inner.register_forward_pre_hook(self._look, with_kwargs=True)]
        for index, layer in self.layers.items():
            layer.enter(partial(self.route, index))
            attention = attention_beside(self.model, layer.experts) if "attn" in layer.bundle.router.needs else None
            if attention is not None:
                self._hooks.append(attention.register_forward_hook(partial(self._watch, index)))

    def exit(self) -> None:
        """Put everything back."""
        for layer in self.layers.values():
            layer.exit()
        for hook in self._hooks:
            hook.remove()

    def route(self, index: int, x_TH: Tensor) -> Routing:
        """Return the Routing of layer ``index``; a router of scope ``model`` decides once, before the first layer."""
        router, ctx = self.layers[index].bundle.router, self._context(index, len(x_TH))
        if router.scope == "model" and ctx.plan is None:
            if index == self._order[0]:
                self._plan = self._planned(router, x_TH, ctx)
            self.routings[index] = self._plan[index]
        else:
            self.routings[index] = router(x_TH, ctx)
        return self.routings[index]

    def _planned(self, router: Router, x_TH: Tensor, ctx: Context) -> dict[int, Routing]:
        if isinstance(router, OncePerModel):
            return router.plan(x_TH, ctx, self._order)
        return dict.fromkeys(self._order, router(x_TH, ctx))

    def _context(self, index: int, tokens: int) -> Context:
        """Return the Context of a call of layer ``index``."""
        layer, place = self.layers[index], self._order.index(index)
        known: dict[str, Any] = {name: value for name, value in self._call.fields.items() if len(value) == tokens}
        if not layer.on_our_backend:
            known.pop("valid_T", None)  # it would leave padding without experts, which only our backends allow
        known |= {"attn": self._call.attn.get(index), "rng": self._rng}
        own = {name: value for name, value in known.items() if getattr(self.context, name) is None}
        prev = self.routings[self._order[place - 1]] if place else None
        training = self.model.training
        return replace(self.context, layer=index, training=training, experts=layer.store, prev=prev, **own)

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the call that begins, and refuse it where a router would lack something."""
        self._call.begin(args, kwargs)
        if self._context_of is not None:
            self.context = self._context_of(self._call.inputs)
        config: Any = getattr(self.model, "config", None)
        self._call.check(self.routers.values(), self.context, getattr(config, "_attn_implementation", None))

    def _watch(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the attention of a decoder layer for its router."""
        if isinstance(output, tuple) and isinstance(output[1], Tensor):
            self._call.attn[index] = output[1]


def _always(bundle: RouterBundle) -> RouterFactory:
    return lambda weights, shape, seed: bundle


def model_shape(model: nn.Module) -> ModelShape:
    """Return the sizes and the own selection of a transformers model, or refuse an architecture in one sentence."""
    config: Any = getattr(model, "config", None)
    name = str(getattr(config, "model_type", None))
    if name not in READERS:
        raise MoebenchError(unknown("MoE architecture (model_type)", name, READERS))
    return READERS[name](config.to_dict())
