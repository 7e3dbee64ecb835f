"""Decoder layers that decide for each token whether they are voids, by hooks that leave with the block.

Shape letters: B windows (1), T tokens, S keys, H hidden, L layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ...moe.probes.voids import Adaptive

Mode = Literal["trace", "emulate", "skip"]
ROUNDS = 1000
"""Missing keys need at most as many rounds as a window has tokens."""


class Skipping:
    """What each layer decided in the forward passes so far: ``active`` [L][T] bool, one list entry a layer.

    ``trace`` watches. ``emulate`` gives each token at the end the output of its last active layer, as the reference
    code does, whose layers all run on the unchanged stream. ``skip`` leaves a token's state as it was where a layer is
    void. ``kv="missing"`` (of ``skip``) also hides void tokens' keys from later tokens: what a token decides then
    depends on earlier decisions alone, and rounds over the window settle it, token by token at the latest. ``forced``
    activity [L, T] takes the place of LAC's. A token's own key is always there.
    """

    def __init__(self, mode: Mode, alpha: float, kv: str = "project", forced: Tensor | None = None) -> None:
        self.mode, self.alpha, self.kv, self.forced = mode, alpha, kv, forced
        self.active: list[Tensor] = []
        self.rounds = 0
        self.kwargs: Mapping[str, Any] = {}
        self._lac = Adaptive(alpha)
        self._before_T = torch.empty(0)
        self._last_TH = torch.empty(0)

    def start(self, entering_TH: Tensor) -> None:
        """Begin a forward pass: decisions of an earlier one are forgotten."""
        self.active.clear()
        self._lac = Adaptive(self.alpha)
        self._before_T, self._last_TH = norms(entering_TH), entering_TH

    def after(self, layer: int, last: int, module: Any, entering_BTH: Tensor, kwargs: Any, out_BTH: Tensor) -> Any:
        """Decide on a layer's output; return what takes its place, None for itself."""
        if layer == 0:
            self.start(entering_BTH[0])
            self.kwargs = kwargs
        active_T = self._decide(layer, out_BTH[0], keep=self.kv == "project")
        if self.kv == "missing":
            out_BTH, active_T = self._settled(layer, module, entering_BTH, kwargs, out_BTH, active_T)
        self.active.append(active_T)
        state_TH = torch.where(active_T[:, None], out_BTH[0], entering_BTH[0])
        self._before_T = norms(state_TH if self.mode == "skip" else out_BTH[0])
        if self.mode == "skip":
            return state_TH[None]
        self._last_TH = torch.where(active_T[:, None], out_BTH[0], self._last_TH)
        return self._last_TH[None] if self.mode == "emulate" and layer == last else None

    def _decide(self, layer: int, out_TH: Tensor, keep: bool) -> Tensor:
        if self.forced is not None:
            return self.forced[layer]
        lac = self._lac if keep else self._lac.copy()
        return lac.active(norms(out_TH) - self._before_T)

    def _settled(
        self, layer: int, module: Any, entering_BTH: Tensor, kwargs: Any, out_BTH: Tensor, active_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the layer with void tokens' keys hidden until what is void no longer changes."""
        for _ in range(ROUNDS):
            self.rounds += 1
            hidden = {**kwargs, "attention_mask": visible(active_T, out_BTH.dtype)}
            out_BTH = module.forward(entering_BTH, **hidden)
            again_T = self._decide(layer, out_BTH[0], keep=False)
            if torch.equal(again_T, active_T):
                break
            active_T = again_T
        return out_BTH, self._decide(layer, out_BTH[0], keep=True)


def norms(state_TH: Tensor) -> Tensor:
    """Return the L2 norm of each token's state, float64 [T]."""
    norm_T: Tensor = state_TH.double().norm(dim=1)
    return norm_T


def visible(active_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [1, 1, T, S]: a query sees its own key and those of active tokens before it."""
    tokens = len(active_T)
    seen_TS = torch.ones(tokens, tokens, dtype=torch.bool).tril() & (
        active_T[None] | torch.eye(tokens, dtype=torch.bool)
    )
    return torch.zeros(tokens, tokens, dtype=dtype).masked_fill(~seen_TS, torch.finfo(dtype).min)[None, None]


@contextlib.contextmanager
def skipping(model: Any, how: Skipping) -> Iterator[Skipping]:
    """Let ``how`` decide at every decoder layer until the block ends; the layers themselves stay as they are."""
    layers = model.model.layers

    def hook(layer: int) -> Any:
        def decide(module: Any, args: Any, kwargs: Any, output: Tensor) -> Any:
            rest = dict(kwargs)
            entering_BTH = args[0] if args else rest.pop("hidden_states")
            return how.after(layer, len(layers) - 1, module, entering_BTH, rest, output)

        return decide

    hooks = [layer.register_forward_hook(hook(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        yield how
    finally:
        for handle in hooks:
            handle.remove()
