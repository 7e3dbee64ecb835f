"""Layers as launches of the CUDA kernels: random ones over the routings of the backend contract, and their oracle."""

from __future__ import annotations

import torch

from moebench.kernels.cuda import symmetric
from moebench.kernels.cuda.layer import ACTIVATIONS, Launch, Sizes, Tiles, launches
from moebench.moe.experts import ExpertStore
from moebench.moe.oracle import compare, reference
from moebench.moe.routing import Routing

SMALL = Tiles(16, 16, 16, 3, 1, 2)
"""Tiles that make several of everything of a layer that a test has time for."""

ROUTINGS = ("two", "dynamic_k", "empty", "hot", "signed", "dropped", "repeated", "none")


def routing(kind, tokens, experts, seed):
    """Return a Routing: two experts each, 0 .. E of them, some experts empty, one hot, weights of both signs, ..."""
    generator = torch.Generator().manual_seed(seed)
    chosen_TE = torch.rand(tokens, experts, generator=generator)
    weight_TE = torch.rand(tokens, experts, generator=generator) + 0.1
    rank_TE = chosen_TE.argsort(1).argsort(1)
    if kind == "empty":
        rank_TE = torch.where(torch.arange(experts) % 2 == 0, experts, chosen_TE.argsort(1).argsort(1))
    if kind == "signed":
        weight_TE = torch.where(rank_TE == 0, weight_TE, -weight_TE)
    token_T1 = torch.arange(tokens)[:, None]
    keep_TE = {
        "dynamic_k": rank_TE < (token_T1 + seed) % (experts + 1),
        "hot": (torch.arange(experts) == experts - 1).expand(tokens, experts),
        "dropped": (rank_TE < 2) & (token_T1 % 3 != 0),
        "none": rank_TE < 0,
    }.get(kind, rank_TE < 2)
    made = Routing.dense(torch.where(keep_TE, weight_TE, 0.0))
    if kind == "repeated":  # an expert may have a token twice
        twice = [torch.cat([one, one]) for one in (made.token_N, made.expert_N, made.weight_N)]
        made = Routing(*twice, made.shape)
    return made


class Layer:
    """One layer, the memory of its launches, and what it must give; ``routings`` are those of successive launches."""

    def __init__(self, routings, hidden, width, dtype="bfloat16", activation="silu", gated=True, seed=0, tiles=SMALL):
        generator = torch.Generator().manual_seed(seed)
        self.dtype, self.tiles, self.torch_dtype = dtype, tiles, getattr(torch, dtype)
        tokens, experts = routings[0].shape
        rows = 2 * width if gated else width

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(self.torch_dtype)

        self.x_TH = normal(tokens, hidden)
        gate_up = normal(experts, rows, hidden) / hidden**0.5
        self.store = ExpertStore(
            gate_up, normal(experts, hidden, width) / width**0.5, ("ffn",) * experts, activation, gated
        )
        self.routings = routings
        self.sizes = Sizes(tokens, experts, hidden, width, max(len(one.token_N) for one in routings))

    def steps(self, variant="fused", atomic=False, blocks=5):
        """Return the launches of all calls; outputs go to ``outs``. All calls use one state, as a backend does."""
        of, nan = self.sizes, float("nan")
        state = torch.zeros(of.state_numbers(self.tiles), dtype=torch.int32)
        slots = torch.zeros(of.slots(self.tiles), dtype=torch.int64)
        partial = torch.zeros(of.tokens, of.hidden) if atomic else torch.full((of.assignments, of.hidden), nan)
        self.outs, made = [], []
        for one in self.routings:
            token_N, offsets_E1, weight_N = one.sorted()
            hidden_NF = torch.full((of.assignments, of.width), nan, dtype=self.torch_dtype)
            self.outs.append(torch.full(self.x_TH.shape, nan, dtype=self.torch_dtype))
            lists = (
                torch.full((of.assignments,), -1, dtype=torch.int32),
                torch.full((of.tokens, 2), -1, dtype=torch.int32),
            )
            inputs = (
                self.x_TH,
                self.store.gate_up,
                self.store.down,
                token_N.contiguous(),
                offsets_E1,
                weight_N.contiguous(),
            )
            numbers = (ACTIVATIONS.index(self.store.activation), int(self.store.gated), int(atomic))
            arguments = (*inputs, hidden_NF, partial, *lists, state, slots, self.outs[-1])
            arguments += (of.tokens, of.experts, of.hidden, of.width, *numbers)
            made += [[one] for one in launches(variant, self.dtype, self.tiles, of, arguments, blocks)]
        return made

    def verdicts(self, outs):
        """Return the oracle's Check of each call's output."""
        return [
            compare(out, reference(self.store, one, self.x_TH), self.torch_dtype)
            for out, one in zip(outs, self.routings, strict=True)
        ]


class Devices:
    """One layer, its experts spread over ``ranks`` emulated devices, each with tokens of its own; ``calls`` calls."""

    def __init__(self, ranks, own, tokens, hidden, width, dtype="bfloat16", calls=2, tiles=SMALL):
        self.layers = [
            Layer(
                [
                    routing(kind, tokens, ranks * own, 7 * call + rank)
                    for call, kind in enumerate(("two", "dynamic_k")[:calls])
                ],
                hidden,
                width,
                dtype,
                seed=1,
                tiles=tiles,
            )
            for rank in range(ranks)
        ]
        for rank, layer in enumerate(self.layers):  # the same experts, other tokens
            layer.x_TH = layer.x_TH.roll(rank, 0) * (1 + rank / 8)
        self.ranks, self.own, self.tiles = ranks, own, tiles
        self.shape = symmetric.Shape(ranks, own, tokens, hidden)

    def steps(self, blocks=3):
        """Return the launches of all calls: one of every device at the same time."""
        first = self.layers[0]
        nan, of = float("nan"), first.sizes
        units, everywhere = self.shape.units(self.tiles), self.ranks * self.own
        buffers = tuple(torch.full((self.shape.numbers,), nan, dtype=first.torch_dtype) for _ in self.layers)
        flags = tuple(torch.zeros(symmetric.ROUNDS * everywhere, dtype=torch.int64) for _ in self.layers)
        kept = [self._kept(units, everywhere) for _ in self.layers]
        self.outs, made = [[] for _ in self.layers], []
        for call in range(len(first.routings)):
            together = []
            for rank, layer in enumerate(self.layers):
                token_N, offsets_E1, weight_N = layer.routings[call].sorted()
                mine = slice(rank * self.own, (rank + 1) * self.own)
                weights = layer.store.gate_up[mine].clone(), layer.store.down[mine].clone()
                hidden_NF = torch.full((units * self.tiles.bm, of.width), nan, dtype=first.torch_dtype)
                lists = (
                    torch.full((max(1, len(token_N)),), -1, dtype=torch.int32),
                    torch.full((of.tokens, 2), -1, dtype=torch.int32),
                )
                self.outs[rank].append(torch.full(layer.x_TH.shape, nan, dtype=first.torch_dtype))
                arguments = (layer.x_TH, *weights, token_N.contiguous(), offsets_E1, weight_N.contiguous(), hidden_NF)
                arguments += (
                    *lists,
                    *kept[rank],
                    buffers,
                    flags,
                    self.outs[rank][-1],
                    of.tokens,
                    everywhere,
                    of.hidden,
                )
                arguments += (of.width, 0, 1, self.ranks, rank, self.shape.capacity)
                shared = self.tiles.shared_bytes(everywhere)
                together.append(Launch(f"moe_symmetric_{layer.dtype}", blocks, self.tiles.threads, shared, arguments))
            made.append(together)
        return made

    def _kept(self, units, everywhere):
        counters = (torch.zeros(units + 1, dtype=torch.int64), torch.zeros(everywhere, dtype=torch.int64))
        return torch.zeros(4, dtype=torch.int32), *counters

    def verdicts(self):
        """Return the oracle's Check of each device's outputs."""
        return [check for rank, layer in enumerate(self.layers) for check in layer.verdicts(self.outs[rank])]
