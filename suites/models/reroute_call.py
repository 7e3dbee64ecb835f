"""What routers in a real model know of the call at work: its tokens, its sequences, its attention, and what is given.

Shape letters: T tokens of a call, B sequences, S tokens of each, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...contracts import MoebenchError
from ...moe.router import Router
from ...moe.routing import Context

ContextOf = Callable[[Mapping[str, Any]], Context]
"""Makes the given part of the Context from a call's inputs by name (``input_ids``, ``attention_mask`` ...)."""

KNOWN = ("token_ids_T", "segment_T", "attn")
GIVEN = ("task", "modality_T", "features")
"""Fields that the call tells, and those that the caller alone can know."""

SEQUENCE = frozenset({"segment_T", "attn"})
"""Fields that are read to look at other tokens of a sequence, or to find its row of ``features``."""

ATTENTION_NAMES = ("self_attn", "attention", "attn")
"""What transformers calls the attention of a decoder layer."""


class Call:
    """The fields of the Context that the inputs of the call at work tell, and the attention of each layer."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.fields: dict[str, Tensor] = {}
        self.attn: dict[int, Tensor] = {}
        self.goes_on = False

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Forget the call before and look at the inputs of the one that begins."""
        self.inputs = {**({"input_ids": args[0]} if args else {}), **kwargs}
        self.fields, self.attn = {}, {}
        cache = self.inputs.get("cache", self.inputs.get("past_key_values"))
        self.goes_on = cache is not None and cache.get_seq_length() > 0
        ids_BS, embedded_BSH = self.inputs.get("input_ids"), self.inputs.get("inputs_embeds")
        like = ids_BS if isinstance(ids_BS, Tensor) else embedded_BSH
        if not isinstance(like, Tensor):
            return
        batch, length = like.shape[:2]
        self.fields["segment_T"] = torch.arange(batch, device=like.device).repeat_interleave(length)
        if isinstance(ids_BS, Tensor):
            self.fields["token_ids_T"] = ids_BS.flatten()
        mask_BS = self.inputs.get("attention_mask")
        if isinstance(mask_BS, Tensor) and mask_BS.dim() == 2 and not bool(mask_BS.all()):
            self.fields["valid_T"] = mask_BS[:, -length:].bool().flatten()

    def check(self, routers: Iterable[Router], given: Context, attention: str | None) -> None:
        """Raise MoebenchError where a router needs what neither the call nor ``given`` has; no layer has run yet.

        ``attention`` is the model's implementation of it, of which only ``eager`` hands out its weights.
        """
        needs = {name for router in routers for name in router.needs}
        absent = [name for name in (*KNOWN, *GIVEN) if name in needs and not self._has(name, given, attention)]
        if absent:
            raise MoebenchError(f"this routing cannot decide without the Context's '{absent[0]}'; {_remedy(absent[0])}")
        if self.goes_on and needs & SEQUENCE and "features" not in needs:
            raise MoebenchError(
                "this routing looks at a whole sequence, and a call that goes on from a cache has only its end; "
                "call the model with use_cache=False."
            )

    def _has(self, name: str, given: Context, attention: str | None) -> bool:
        return getattr(given, name) is not None or name in self.fields or (name == "attn" and attention == "eager")


def _remedy(name: str) -> str:
    return {
        "token_ids_T": "call the model with input_ids, or give it in reroute(..., context=Context(token_ids_T=...)).",
        "segment_T": "call the model with input_ids, or give it in reroute(..., context=Context(segment_T=...)).",
        "attn": "load the model with attn_implementation='eager', whose attention can be seen.",
    }.get(name, f"the model cannot know it, so give it in reroute(..., context=Context({name}=...)).")


def attention_beside(model: nn.Module, experts: nn.Module) -> nn.Module | None:
    """Return the attention of the decoder layer that holds ``experts``, None where there is none by a known name."""
    paths = [name for name, module in model.named_modules() if module is experts]
    parts = paths[0].split(".")
    for end in range(len(parts) - 1, 0, -1):
        layer = model.get_submodule(".".join(parts[:end]))
        for name in ATTENTION_NAMES:
            if isinstance(getattr(layer, name, None), nn.Module):
                found: nn.Module = getattr(layer, name)
                return found
    return None
