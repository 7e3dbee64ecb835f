"""An MoE layer in the place of an FFN while tasks are evaluated. Shape letters: B sequences, T tokens, H hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...moe.routing import Routing
from ..quality.block import Call, MoEBlock
from ..subject import DTYPES


class Rows:
    """The sequences of one forward pass: their token ids, and the Routings of the layers before, by sequence.

    ``tokens`` counts what all passes read, padding included. ``continued``: the tokens of the pass follow others, whose
    keys and values the model kept, as in generation.
    """

    def __init__(self) -> None:
        self.ids: Sequence[Tensor] = ()
        self.continued = False
        self.routings: list[list[Routing]] = []
        self.tokens = 0

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the ids of a forward pass; a hook that the model calls before each."""
        ids_BT = kwargs.get("input_ids", args[0] if args else None)
        self.ids = list(ids_BT) if ids_BT is not None else []
        self.routings = [[] for _ in self.ids]
        kept = kwargs.get("past_key_values")
        self.continued = kept is not None and kept.get_seq_length() > 0
        self.tokens += sum(map(len, self.ids))


class TaskBlock(MoEBlock):
    """Runs each sequence of a batch by itself, so that no token's experts depend on the others in the batch.

    What pads a sequence stands behind it, where no causal router looks. ``last`` is what was computed last, for the
    oracle.
    """

    rows: Rows
    last: Call | None = None

    @torch.no_grad()
    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return y in the shape and dtype of ``x_BTH``."""
        y_BTH = torch.stack([self._sequence(x_TH, row) for row, x_TH in enumerate(x_BTH)])
        return y_BTH.to(x_BTH.dtype)

    def first_tokens(self, tokens: int) -> int:
        """Return how many of the first tokens the dense prefix covers: none in the middle of a sequence."""
        return 0 if self.rows.continued else super().first_tokens(tokens)

    def _sequence(self, x_TH: Tensor, row: int) -> Tensor:
        before = self.rows.routings[row]
        self.token_ids_T = self.rows.ids[row]
        x_TH = x_TH.to(DTYPES[self.subject.spec.dtype])
        routing = self.route(x_TH, before)
        read_TH = self.subject.layer.reads(x_TH)
        y_TH = self.computed(read_TH, routing)
        before.append(routing)
        prefix, attended = self.prefix(len(x_TH)), self.attended()
        self.last = Call(self, read_TH, routing, y_TH, torch.empty(0), routing, prefix, attended)
        return y_TH
