"""Every backend for transformers models: ``with attach(model, "grouped"): ...``, or by name, ``moebench:<backend>``.

The experts of a model are used where they lie ([E, 2F, H] and [E, H, F], no copy where the backend needs none).
transformers calls a registered function as ``function(module, hidden_states, top_k_index, top_k_weights)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..contracts import Backend, Executor, LayerSpec, MoebenchError, Refusal, Registry, Scheme, Session
from .gate_hints import hinting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..moe.experts import ExpertStore

ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "ReLU": "relu"}
"""Activation modules of transformers by class, and their names here."""

_BY_NAME: WeakKeyDictionary[nn.Module, tuple[Any, Executor]] = WeakKeyDictionary()
_ATTACHED: WeakKeyDictionary[nn.Module, Executor] = WeakKeyDictionary()


def register(registry: Registry | None = None) -> list[str]:
    """Give every backend to transformers as ``moebench:<name>`` and return these names.

    A model that is set to such a name loads each layer at its first call; ``attach`` loads all layers at once.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    names = [f"moebench:{name}" for name in (registry or Registry.load()).names("backend")]
    for name in names:
        ALL_EXPERTS_FUNCTIONS.register(name, _function(name, registry))
    return names


@contextmanager
def attach(model: nn.Module, backend: str | Backend, backward: bool = False) -> Iterator[Session]:
    """Run the MoE layers of ``model`` on ``backend`` within the ``with`` block, which receives the session.

    Layers are known by their decoder index. ``backward`` asks for gradients of the experts' weights. A session that
    reads hints is told what the gate of the next layer says of each layer's input.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = f"moebench:{backend}" if isinstance(backend, str) else "moebench:attached"
    modules = moe_modules(model)
    session = _load(_create(name) if isinstance(backend, str) else backend, modules, backward)
    ALL_EXPERTS_FUNCTIONS.register(name, _function(name, None))
    before = {module: _ATTACHED.get(module) for module in modules.values()}
    configs = {id(module.config): module.config for module in modules.values()}
    former = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for index, executor in hinting(model, modules, session).items():
            _ATTACHED[modules[index]] = executor
        for config in configs.values():
            config._experts_implementation_internal = name
        yield session
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = former[key]
        for module, one in before.items():
            _ATTACHED.pop(module, None)
            if one is not None:
                _ATTACHED[module] = one
        session.close()


def moe_modules(model: nn.Module) -> dict[int, Any]:
    """Return the expert modules of ``model`` that transformers lets others run, by decoder index."""
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "_is_expert_parallel")]
    if not found:
        raise MoebenchError(f"{type(model).__name__} has no MoE layers that transformers lets a backend run.")
    numbers = [re.search(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?:\.|$)", name) for name, _ in found]
    indices = [int(number.group(1)) for number in numbers if number is not None]
    if len(set(indices)) < len(found):
        indices = list(range(len(found)))
    return {index: module for index, (_, module) in zip(indices, found, strict=True)}


def describe(module: Any, backward: bool = False) -> tuple[ExpertStore, LayerSpec]:
    """Return the store (views) and the specification of one expert module, or refuse it in one sentence."""
    from ..moe.experts import ExpertStore

    reason = _refusal(module)
    if reason:
        raise MoebenchError(f"{type(module).__name__} cannot be attached: {reason}.")
    gate_up, down = module.gate_up_proj, module.down_proj
    experts, hidden, width = down.shape
    activation = ACTIVATIONS[type(module.act_fn).__name__]
    store = ExpertStore(gate_up, down, ("ffn",) * experts, activation)
    slots = getattr(module.config, "num_experts_per_tok", None) or experts
    spec = LayerSpec(
        hidden,
        width,
        store.kinds,
        str(down.dtype).removeprefix("torch."),
        activation,
        schemes=(Scheme(bits=8.0 * down.element_size()),) * experts,
        backward=backward,
        max_k=min(int(slots), experts),
    )
    return store, spec


def _refusal(module: Any) -> str:
    """Return why the experts of ``module`` are not plain gated FFNs, or an empty string."""
    from transformers.integrations.moe import _default_apply_gate

    facts = {
        "its experts have no gate, and only gated ones are known": not module.has_gate,
        "its experts have biases": module.has_bias,
        "its weights are transposed": module.is_transposed,
        "its gate and up rows are interleaved": not module.is_concatenated,
        "it normalises the output of each expert": module.has_post_expert_norm,
        "its experts are spread over processes": module._is_expert_parallel,
        "it has a gating function of its own": type(module)._apply_gate is not _default_apply_gate,
    }
    for reason, true in facts.items():
        if true:
            return reason
    if type(module.act_fn).__name__ not in ACTIVATIONS:
        return f"its activation {type(module.act_fn).__name__} is not one of {', '.join(ACTIVATIONS)}"
    return ""


def _create(name: str, registry: Registry | None = None) -> Backend:
    """Return the backend called ``moebench:<name>``, or raise why it cannot work here."""
    descriptor = (registry or Registry.load()).get("backend", name.removeprefix("moebench:"))
    backend: Backend = descriptor.create()
    return backend


def _load(backend: Backend, modules: Mapping[int, Any], backward: bool = False) -> Session:
    availability = backend.availability()
    if not availability.available:
        raise MoebenchError(f"{availability.reason}.")
    described = {index: describe(module, backward) for index, module in modules.items()}
    for index, (_, spec) in described.items():
        answer = backend.supports(spec)
        if isinstance(answer, Refusal):
            raise MoebenchError(f"layer {index} cannot be attached: {answer.reason}.")
    stores = {index: store for index, (store, _) in described.items()}
    return backend.load(stores, {index: spec for index, (_, spec) in described.items()})


def _function(name: str, registry: Registry | None) -> Callable[..., Tensor]:
    """Return the function that transformers calls for experts implementation ``name``."""
    return partial(_run, name, registry)


def _run(
    name: str, registry: Registry | None, module: Any, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    executor = _ATTACHED.get(module) or _lazily(name, registry, module)
    experts = module.num_experts
    empty_TK = (indices_TK < 0) | (indices_TK >= experts)
    indices_TK = indices_TK.long().masked_fill(empty_TK, experts)
    y_TH: Tensor = executor(x_TH, indices_TK, weights_TK.float().masked_fill(empty_TK, 0.0))
    return y_TH


def _lazily(name: str, registry: Registry | None, module: Any) -> Executor:
    """Return the executor of a module whose model was set to ``name``: loaded anew whenever its weights have moved."""
    state = (name, module.down_proj.dtype, module.gate_up_proj.data_ptr(), module.down_proj.data_ptr())
    known = _BY_NAME.get(module)
    if known is None or known[0] != state:
        known = (state, _load(_create(name, registry), {0: module}).layer(0))
        _BY_NAME[module] = known
    return known[1]
