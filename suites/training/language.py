"""Next-token prediction with an MoE model of transformers, as a Task.

Shape letters: B windows, T tokens of one window, N tokens of a text, V vocabulary, E experts, K slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...moe.balance.registry import Term, total
from ...moe.routing import Routing
from ..models import substream
from ..models.smollm2_jobs import ffn_of

BALANCE = (Term("switch", 0.01),)
"""What keeps experts alive, as a mean over layers."""


@dataclass(frozen=True)
class Windows:
    """Held-out text: ``ids_BT`` int64, and the bytes of text that its tokens stand for but each window's first."""

    ids_BT: Tensor
    bytes: float


class LanguageModelTask:
    """A causal language model whose routers, if it has any, are named ``gate``.

    Every second window of a batch begins with ``end``, the others in the midst of text: the model is used to both.
    """

    def __init__(
        self, model: Any, ids_N: Tensor, held_out: Windows, batch: tuple[int, int], end: int, seed: int, device: str
    ) -> None:
        self.model = model.to(device)
        self.ids_N, self.held_out, self.seed, self.device = ids_N, held_out, seed, device
        self.windows, self.window = batch
        self.end = end
        self._routed: list[tuple[Tensor, Tensor, Tensor]] = []
        for gate in gates(model).values():
            gate.register_forward_hook(lambda module, inputs, output: self._routed.append(output))

    def batch(self, step: int) -> Tensor:
        """Return ids_BT [windows, window + 1], from places that the seed and the step decide."""
        shape = (self.windows, self.window)
        return windows_at(self.ids_N, shape, self.end, substream(self.seed, "batch", step)).to(self.device)

    def loss(self, batch: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return cross-entropy plus balance, and both by name; a dense model has no balance."""
        self._routed.clear()
        loss = nll(self.model, batch).mean()
        if not self._routed:
            return loss, {"loss": loss}
        balance = torch.stack([total(routing, None, BALANCE) for routing in self._routings()]).mean()
        self._routed.clear()
        return loss + balance, {"loss": loss, "balance": balance / BALANCE[0].coefficient}

    def evaluate(self) -> Mapping[str, float]:
        """Return bits per byte of the held-out windows."""
        found = bits_per_byte(self.model, self.held_out)
        self._routed.clear()
        return {"bits_per_byte": found}

    def _routings(self) -> Iterator[Routing]:
        for logits_TE, weights_TK, indices_TK in self._routed:
            probs_TE = logits_TE.float().softmax(-1)
            yield Routing.topk(indices_TK, weights_TK, logits_TE.shape[-1], logits_TE, probs_TE)


def gates(model: Any) -> dict[int, Any]:
    """Return the routers by decoder layer."""
    return {i: ffn_of(layer).gate for i, layer in enumerate(model.model.layers) if hasattr(ffn_of(layer), "gate")}


def windows_at(ids_N: Tensor, shape: tuple[int, int], end: int, seed: int) -> Tensor:
    """Return ids_BT [windows, window + 1] of places that the seed decides, every second one beginning with ``end``."""
    windows, window = shape
    start_B = torch.randint(len(ids_N) - window, (windows,), generator=torch.Generator().manual_seed(seed))
    ids_BT = ids_N[start_B[:, None] + torch.arange(window + 1)]
    ids_BT[::2, 0] = end
    return ids_BT


def nll(model: Any, ids_BT: Tensor) -> Tensor:
    """Return the negative log-probability of every token but each window's first, in nats, [B * (T - 1)]."""
    hidden_BTH = model.model(ids_BT[:, :-1], use_cache=False).last_hidden_state
    logits_NV = model.lm_head(hidden_BTH).flatten(0, 1).float()
    return F.cross_entropy(logits_NV, ids_BT[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def bits_per_byte(model: Any, held_out: Windows) -> float:
    """Return the bits that the model needs for each byte of the text."""
    device = next(model.parameters()).device
    parts = [nll(model, ids_T[None].to(device)).double().sum() for ids_T in held_out.ids_BT]
    return float(torch.stack(parts).sum()) / math.log(2) / held_out.bytes


def take_windows(ids_N: Tensor, bytes_N: Tensor, count: int, window: int) -> Windows:
    """Return up to ``count`` windows of ``window`` tokens, evenly spread over a text."""
    available = len(ids_N) // window
    chosen = torch.linspace(0, available - 1, min(count, available)).round().long()
    ids_BT = ids_N[: available * window].view(available, window)[chosen]
    bytes_BT = bytes_N[: available * window].view(available, window)[chosen]
    return Windows(ids_BT, float(bytes_BT[:, 1:].sum()))


def encode(tokenizer: Any, text: str) -> Tensor:
    """Return the token ids of a text, int64 [N], with nothing added."""
    ids: Sequence[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return torch.tensor(ids)
