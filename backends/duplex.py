"""``duplex``: an expert with few tokens reads packed codes, those with many share a grouped product, dequantized.

Duplex (arXiv 2409.01141) sends experts of low operations per byte to processing in memory and the others to the GPU.
Here both are kernels of one CPU: the packed product reads the fewest bytes, the bfloat16 GEMM computes the most per
second. Operations per byte grow with the tokens of an expert, so a number of tokens divides them: the crossover, which
is measured when a layer is loaded, on its own experts, unless it is given. It is measured with a few experts in a call
and with many, since the grouped product takes its time for a call besides that for each token. All weights are held
twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING

from ..contracts import Availability, Execution, LayerSpec, Refusal
from . import plugins, rules
from .crossover import ROUNDS, Split, crossover, is_faster, split
from .grouped import GroupedExecutor
from .packed import PackedExecutor
from .packing import PackedMatrix, unpackable
from .session import Session, SortedExecutor, open_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..moe.experts import ExpertStore

LIMIT = 256
"""The most tokens that are tried: a layer where packed codes are still faster runs them up to here."""

FEW, MANY = 4, 16
"""How many experts of a kind make one timed call; the next call takes the next ones, round and round, so that weights
come from as far away as they do in a layer."""

Kind = tuple[tuple[str, int | None], ...]


def kind_of(matrices: Sequence[PackedMatrix]) -> Kind:
    """Return the kernels of an expert's matrices, with their groups: experts of one kind share a crossover."""
    return tuple((matrix.kernel, matrix.group) for matrix in matrices)


class DuplexExecutor(SortedExecutor):
    """One layer on two executors; each expert goes to the one that is faster for its number of tokens."""

    def __init__(self, store: ExpertStore, spec: LayerSpec, given: int | None) -> None:
        super().__init__(store, spec)
        import torch

        self.cold, self.hot = PackedExecutor(store, spec), GroupedExecutor(store, spec)
        self.kinds = [kind_of(matrices) for matrices in self.cold.per_expert()]
        distinct = list(dict.fromkeys(self.kinds))
        self.splits = {kind: self._measured(kind) if given is None else Split(given) for kind in distinct}
        self.kind_E = torch.tensor([distinct.index(kind) for kind in self.kinds])
        self.least_E = torch.tensor([self.splits[kind].tokens for kind in self.kinds])
        self.beyond_K = torch.tensor([self.splits[kind].beyond for kind in distinct])
        cold_runs = any(one.tokens > 1 or one.beyond for one in self.splits.values())
        hot_runs = any(spec.tokens is None or one.tokens <= spec.tokens for one in self.splits.values())
        used = (self.cold.kernels if cold_runs else ()) + (self.hot.kernels if hot_runs else ())
        self.kernels = tuple(dict.fromkeys(used))
        self.notes = self._told("measured" if given is None else "given")

    def add_sorted(self, y_TH: Tensor, x_TH: Tensor, token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor) -> None:
        """Add w * f_e(x): first for all hot experts at once, then for one cold expert after another."""
        counts_E = offsets_E1.diff()
        hot_E = self._hot(counts_E)
        hot_N = hot_E.repeat_interleave(counts_E)
        for executor, mine_E, mine_N in ((self.hot, hot_E, hot_N), (self.cold, ~hot_E, ~hot_N)):
            offsets = _offsets(counts_E * mine_E)
            executor.add_sorted(y_TH, x_TH, token_N[mine_N], offsets, weight_N[mine_N])

    def _hot(self, counts_E: Tensor) -> Tensor:
        """Return which experts are hot: those from their kind's crossover on, where together they pay for the call."""
        more_E = counts_E - self.least_E
        more_K = self.beyond_K.new_zeros(self.beyond_K.shape).index_add(0, self.kind_E, more_E.clamp(min=0))
        return (more_E >= 0) & (more_K >= self.beyond_K)[self.kind_E]

    def resident_bytes(self) -> int:
        """Return the bytes of codes and scales, and of the dequantized weights beside them."""
        return self.cold.resident_bytes() + self.hot.resident_bytes()

    def _measured(self, kind: Kind) -> Split:
        """Return where experts of a kind are divided, up to as many tokens as a call will have."""
        import torch

        limit = min(LIMIT, LIMIT if self.spec.tokens is None else self.spec.tokens)
        experts = [expert for expert, other in enumerate(self.kinds) if other == kind]
        in_turn = cycle(experts)
        generator = torch.Generator().manual_seed(0)
        x_TH = torch.randn(limit, self.spec.hidden, generator=generator).to(torch.bfloat16)

        def is_hot(number: int, tokens: int) -> bool:
            chosen = [list(islice(in_turn, number)) for _ in range(ROUNDS + 1)]
            calls = [_load(len(self.kinds), experts, x_TH[:tokens]) for experts in chosen]
            return is_faster(partial(_next, self.hot, iter(calls)), partial(_next, self.cold, iter(calls)))

        with torch.no_grad():
            few, many = (min(number, len(experts)) for number in (FEW, MANY))
            at_many = crossover(partial(is_hot, many), limit)
            at_few = crossover(partial(is_hot, few), limit) if few < many and at_many <= limit else at_many
        return split(few, at_few, many, at_many, limit)

    def _told(self, how: str) -> str:
        """Return the crossovers and the bytes of both forms, in words."""
        mebibytes = [executor.resident_bytes() / 2**20 for executor in (self.cold, self.hot)]
        numbers = [f"{one.tokens} ({_name(kind)}{_price(one)})" for kind, one in self.splits.items()]
        held = f"{mebibytes[0]:.2f} MiB of packed and {mebibytes[1]:.2f} MiB of dequantized weights held"
        return f"dequantized from {how} {', '.join(numbers)} tokens per expert on, packed below; {held}"


def _offsets(counts_E: Tensor) -> Tensor:
    """Return where each expert's assignments begin, and where the last ones end: offsets_E1 int32."""
    offsets_E1 = counts_E.new_zeros(len(counts_E) + 1)
    offsets_E1[1:] = counts_E.cumsum(0)  # written as int32 again, which the grouped product wants
    return offsets_E1


def _load(number: int, experts: Sequence[int], x_TH: Tensor) -> tuple[Tensor, ...]:
    """Return the arguments of ``add_sorted`` where each of ``experts``, out of ``number``, has all tokens."""
    import torch

    counts_E = torch.zeros(number, dtype=torch.int32)
    counts_E[list(experts)] = len(x_TH)
    token_N = torch.arange(len(x_TH)).repeat(len(experts))
    return x_TH.new_zeros(x_TH.shape), x_TH, token_N, _offsets(counts_E), torch.ones(len(token_N))


def _next(executor: SortedExecutor, calls: Iterator[tuple[Tensor, ...]]) -> None:
    executor.add_sorted(*next(calls))


def _name(kind: Kind) -> str:
    """Return a kind as readers know it: int8, or int4 with its groups."""
    return "/".join(dict.fromkeys("int8" if group is None else f"int4 in groups of {group}" for _, group in kind))


def _price(one: Split) -> str:
    if one.few_to is not None:
        return f", few experts: not up to {one.few_to}"
    return f", if {one.beyond} beyond that in all" if one.beyond else ""


class Duplex:
    """The backend."""

    def __init__(self, params: plugins.Duplex) -> None:
        self.crossover = params.crossover

    def availability(self) -> Availability:
        """It runs wherever torch does."""
        return Availability(True)

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        """Take layers of FFN experts whose codes packed kernels read; their hot experts are dequantized."""
        refused = rules.refusal(spec, "duplex", ("bfloat16",), leaves_out=rules.MASKED)
        reason = unpackable(spec)
        if refused is None and reason:
            refused = Refusal(f"duplex keeps cold experts packed, and {reason}")
        return refused or rules.execution(spec, ("topk", "sorted"))

    def load(self, layers: Mapping[int, ExpertStore], specs: Mapping[int, LayerSpec]) -> Session:
        """Load layers in both forms and measure where to divide them."""
        return open_session(partial(DuplexExecutor, given=self.crossover), layers, specs)
