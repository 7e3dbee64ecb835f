"""``duplex``: an expert with few tokens reads packed codes, one with many multiplies dequantized weights.

Duplex (arXiv 2409.01141) sends experts of low operations per byte to processing in memory and the others to the GPU.
Here both are kernels of one CPU: the packed product reads the fewest bytes, the bfloat16 GEMM computes the most per
second. Operations per byte grow with the tokens of an expert, so a number of tokens divides them: the crossover, which
is measured when a layer is loaded, on its own experts, unless it is given. All weights are held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from ..contracts import Availability, Execution, LayerSpec, Refusal
from . import plugins, rules
from .crossover import crossover, is_faster
from .eager import EagerExecutor
from .packed import PackedExecutor
from .packing import PackedMatrix, unpackable
from .session import LoopExecutor, Session, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore

LIMIT = 256
"""The most tokens that are tried: a layer where packed codes are still faster runs them up to here."""

SAMPLE = 4
"""How many experts of a kind make one timed call; the next call takes the next ones, round and round, so that weights
come from as far away as they do in a layer."""

Kind = tuple[tuple[str, int | None], ...]


def kind_of(matrices: Sequence[PackedMatrix]) -> Kind:
    """Return the kernels of an expert's matrices, with their groups: experts of one kind share a crossover."""
    return tuple((matrix.kernel, matrix.group) for matrix in matrices)


class DuplexExecutor(LoopExecutor):
    """One layer on two executors; each expert goes to the one that is faster for its number of tokens."""

    def __init__(self, store: ExpertStore, spec: LayerSpec, given: int | None) -> None:
        super().__init__(store, spec)
        self.cold, self.hot = PackedExecutor(store, spec), EagerExecutor(store, spec)
        self.pairs = list(zip(self.cold.per_expert(), self.hot.per_expert(), strict=True))
        kinds = dict.fromkeys(kind_of(cold) for cold, _ in self.pairs)
        self.crossovers = {kind: self._measured(kind) if given is None else given for kind in kinds}
        cold_runs = any(tokens > 1 for tokens in self.crossovers.values())
        hot_runs = any(spec.tokens is None or tokens <= spec.tokens for tokens in self.crossovers.values())
        used = (self.cold.kernels if cold_runs else ()) + (self.hot.kernels if hot_runs else ())
        self.kernels = tuple(dict.fromkeys(used))
        self.notes = self._told("measured" if given is None else "given")

    def per_expert(self) -> Sequence[tuple[tuple[PackedMatrix, PackedMatrix], tuple[Tensor, Tensor]]]:
        """Return (packed, dequantized) of every expert, each a pair of gate_up and down."""
        return self.pairs

    def ffn(self, x_NH: Tensor, gate_up: Any, down: Any) -> Tensor:
        """Return f_e(x) [N, H] of an expert, given as its packed and its dequantized pair."""
        packed, dense = gate_up, down
        if len(x_NH) < self.crossovers[kind_of(packed)]:
            return self.cold.ffn(x_NH, *packed)
        return self.hot.ffn(x_NH, *dense)

    def resident_bytes(self) -> int:
        """Return the bytes of codes and scales, and of the dequantized weights beside them."""
        return self.cold.resident_bytes() + self.hot.resident_bytes()

    def _measured(self, kind: Kind) -> int:
        """Return the crossover of experts of a kind, up to as many tokens as a call will have."""
        import torch

        limit = min(LIMIT, LIMIT if self.spec.tokens is None else self.spec.tokens)
        pairs = [pair for pair in self.pairs if kind_of(pair[0]) == kind]
        number = min(SAMPLE, len(pairs))
        packed, dense = cycle([cold for cold, _ in pairs]), cycle([hot for _, hot in pairs])
        generator = torch.Generator().manual_seed(0)
        x_NH = torch.randn(limit, self.spec.hidden, generator=generator).to(torch.bfloat16)

        def is_hot(tokens: int) -> bool:
            cold = partial(_run, self.cold.ffn, packed, number, x_NH[:tokens])
            hot = partial(_run, self.hot.ffn, dense, number, x_NH[:tokens])
            return is_faster(hot, cold)

        with torch.no_grad():
            return crossover(is_hot, limit)

    def _told(self, how: str) -> str:
        """Return the crossovers and the bytes of both forms, in words."""
        mebibytes = [executor.resident_bytes() / 2**20 for executor in (self.cold, self.hot)]
        numbers = [f"{tokens} ({_name(kind)})" for kind, tokens in self.crossovers.items()]
        held = f"{mebibytes[0]:.2f} MiB of packed and {mebibytes[1]:.2f} MiB of dequantized weights held"
        return f"dequantized from {how} {', '.join(numbers)} tokens per expert on, packed below; {held}"


def _run(ffn: Callable[..., Tensor], experts: Iterator[tuple[Any, Any]], number: int, x_NH: Tensor) -> None:
    for gate_up, down in islice(experts, number):
        ffn(x_NH, gate_up, down)


def _name(kind: Kind) -> str:
    """Return a kind as readers know it: int8, or int4 with its groups."""
    return "/".join(dict.fromkeys("int8" if group is None else f"int4 in groups of {group}" for _, group in kind))


class Duplex:
    """The backend."""

    def __init__(self, params: plugins.Duplex) -> None:
        self.crossover = params.crossover

    def availability(self) -> Availability:
        """It runs wherever torch does."""
        return Availability(True)

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of FFN experts whose codes packed kernels read; their hot experts are dequantized."""
        refused = rules.refusal(spec, "duplex", ("bfloat16",))
        reason = unpackable(spec)
        if refused is None and reason:
            refused = Refusal(f"duplex keeps cold experts packed, and {reason}")
        return refused or rules.execution(spec, ("topk", "sorted"))

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers in both forms and measure where to divide them."""
        return open_session(partial(DuplexExecutor, given=self.crossover), layers, specs)
