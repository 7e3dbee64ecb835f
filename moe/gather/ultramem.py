"""UltraMemV2: a memory layer beside the FFN of every block, searched by TDQKR (UltraMem, arXiv 2411.12364, and V2).

y = W_v sum_rows [score_1 g V_1, .., score_M g V_M] with g = gelu((W_pre x) . P[row]), where V[row] is cut into M chunks
and chunk m has the score of core m. One table of values serves all layers: a layer's row is shuffled, then shifted.

Where the released code differs: it lets pairs of heads share one query, normalises whole queries and keys but reads
one half of each for a side, and leaves gelu to an option; here every head has a query for each side, and gelu is as
in the paper. Implicit value expansion (key_expand > 1; released default 1) is not modelled.

Shape letters: T tokens, H hidden, A heads, S keys on one side, D key width, R Tucker rank, M cores, K rows per head,
L = A K found rows of a token, V rows of the table, P width of a pre-value, C = M chunks of one value together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..router import seeded_normal
from ..routing import Routing
from .rank_one import merged_routing
from .retrieval import Vectors, exhaustive_topk, leading_vectors, tucker_grid, tucker_topk


class Found(NamedTuple):
    """Rows of a search: one score per core, [T, A, K, M], and the row's place in the grid, [T, A, K] int64."""

    scores_TAKM: Tensor
    rows_TAK: Tensor


class TuckerSearch(nn.Module):
    """Queries, keys and cores. Call ``refresh`` after every step that changes the cores."""

    left_AR: Tensor
    right_AR: Tensor

    def __init__(self, query_QH: Tensor, keys_A2SDR: Tensor, core_MARR: Tensor, k: int) -> None:
        super().__init__()
        heads, _, self.side, width, _ = keys_A2SDR.shape
        if len(query_QH) != heads * 2 * width:
            raise ValueError(f"{heads} heads of 2 x {width} need {heads * 2 * width} query rows, not {len(query_QH)}.")
        self.query_QH = nn.Parameter(query_QH.detach().clone())
        self.keys_A2SDR = nn.Parameter(keys_A2SDR.detach().clone())
        self.core_MARR = nn.Parameter(core_MARR.detach().clone())
        scale_D = torch.full((width,), width**-0.4, dtype=query_QH.dtype)
        self.query_scale_D = nn.Parameter(scale_D)
        self.key_scale_D = nn.Parameter(scale_D.clone())
        self.k = k
        left_AR, right_AR = leading_vectors(self.core_MARR)
        self.register_buffer("left_AR", left_AR.to(query_QH.dtype))
        self.register_buffer("right_AR", right_AR.to(query_QH.dtype))

    @classmethod
    def seeded(
        cls, hidden: int, side: int, key_width: int, k: int, heads: int, rank: int, cores: int, seed: int
    ) -> TuckerSearch:
        """Return a search with the released initialisation: cores U(0, 1), queries and keys normal."""

        def normal(*size: int, fan_in: int, name: str) -> Tensor:
            return seeded_normal(size, fan_in**-0.5, seed, f"ultramem.{name}")

        uniform_MARR = normal(cores, heads, rank, rank, fan_in=1, name="core").mul(0.5**0.5).erf().add(1).mul(0.5)
        return cls(
            normal(heads * 2 * key_width, hidden, fan_in=key_width, name="query"),
            normal(heads, 2, side, key_width, rank, fan_in=key_width, name="keys"),
            uniform_MARR,
            k,
        )

    def refresh(self) -> None:
        """Find the leading singular vectors of the cores anew, with the sign that they had."""
        left_AR, right_AR = leading_vectors(self.core_MARR, self.vectors)
        self.left_AR.copy_(left_AR)
        self.right_AR.copy_(right_AR)

    @property
    def vectors(self) -> Vectors:
        """The directions of the search."""
        return self.left_AR, self.right_AR

    def side_scores(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the refined scores of the keys of each side, two of [T, A, S, R]."""
        heads, _, _, width, _ = self.keys_A2SDR.shape
        query_TA2D = nnf.linear(x_TH.to(self.query_QH.dtype), self.query_QH).view(len(x_TH), heads, 2, width)
        query_TA2D = nnf.layer_norm(query_TA2D, (width,), self.query_scale_D)
        keys_A2SRD = nnf.layer_norm(self.keys_A2SDR.transpose(3, 4), (width,), self.key_scale_D)
        first_TASR, second_TASR = torch.einsum("tapd,apsrd->ptasr", query_TA2D, keys_A2SRD)
        return first_TASR, second_TASR

    def forward(self, x_TH: Tensor) -> Found:
        """Return the rows that TDQKR finds."""
        return Found(*tucker_topk(*self.side_scores(x_TH), self.core_MARR, self.vectors, self.k))

    def exhaustive(self, x_TH: Tensor) -> Found:
        """Return the truly best rows, by scoring all S^2 of them."""
        grid_TASSM = tucker_grid(*self.side_scores(x_TH), self.core_MARR)
        _, rows_TAK = exhaustive_topk(grid_TASSM.sum(-1), self.k)
        index_TAKM = rows_TAK[..., None].expand(-1, -1, -1, len(self.core_MARR))
        return Found(grid_TASSM.flatten(2, 3).gather(2, index_TAKM), rows_TAK)


class ValueTable(nn.Module):
    """``pre_VP`` and ``value_VC``: the rows that the memory layers of a model share."""

    def __init__(self, pre_VP: Tensor, value_VC: Tensor) -> None:
        super().__init__()
        self.pre_VP = nn.Parameter(pre_VP.detach().clone())
        self.value_VC = nn.Parameter(value_VC.detach().clone())

    @property
    def row_values(self) -> int:
        """Numbers that one row owns: vdim + pre_vdim."""
        return self.pre_VP.shape[1] + self.value_VC.shape[1]


class UltraMem(nn.Module):
    """One memory layer; ``table`` may be shared, ``offset`` says where in it this layer's rows begin."""

    shuffle_E: Tensor

    def __init__(
        self,
        search: TuckerSearch,
        table: ValueTable,
        pre_PH: Tensor,
        out_HC: Tensor,
        shuffle_E: Tensor,
        offset: int = 0,
    ) -> None:
        super().__init__()
        cores, values = len(search.core_MARR), table.value_VC.shape[1]
        if values % cores:
            raise ValueError(f"values of {values} numbers cannot be cut into {cores} equal chunks, one per core.")
        if len(shuffle_E) != search.side**2:
            raise ValueError(f"shuffle a grid of {search.side**2} rows, not {len(shuffle_E)}.")
        self.search = search
        self.table = table
        self.pre_PH = nn.Parameter(pre_PH.detach().clone())
        self.out_HC = nn.Parameter(out_HC.detach().clone())
        self.register_buffer("shuffle_E", shuffle_E)
        self.offset = offset
        self.chunk = values // cores

    @classmethod
    def seeded(
        cls,
        hidden: int,
        side: int = 128,
        key_width: int = 512,
        values: int = 512,
        pre_values: int = 512,
        k: int = 16,
        heads: int = 1,
        rank: int = 2,
        cores: int = 2,
        seed: int = 0,
        table: ValueTable | None = None,
        offset: int = 0,
    ) -> UltraMem:
        """Return a layer of the released sizes and initialisation: cores U(0, 1), norms 1 / D^0.4, the rest normal.

        Without ``table`` the layer gets one of its own with unit fan-in.
        """

        def normal(*size: int, fan_in: int, name: str) -> Tensor:
            return seeded_normal(size, fan_in**-0.5, seed, f"ultramem.{name}")

        search = TuckerSearch.seeded(hidden, side, key_width, k, heads, rank, cores, seed)
        if table is None:
            pre_VP = normal(side**2, pre_values, fan_in=pre_values, name="pre_values")
            table = ValueTable(pre_VP, normal(side**2, values, fan_in=values, name="values"))
        pre_PH = normal(table.pre_VP.shape[1], hidden, fan_in=hidden, name="pre")
        out_HC = normal(hidden, table.value_VC.shape[1], fan_in=table.value_VC.shape[1], name="out")
        return cls(search, table, pre_PH, out_HC, seeded_shuffle(side, seed), offset)

    def rows(self, found: Found) -> Tensor:
        """Return the rows of the table, [T, L] int64."""
        return (self.shuffle_E[found.rows_TAK].flatten(1) + self.offset) % len(self.table.value_VC)

    def forward(self, x_TH: Tensor, found: Found | None = None) -> Tensor:
        """Return y_TH; a given ``found`` replaces the search."""
        found = self.search(x_TH) if found is None else found
        rows_TL = self.rows(found)
        scores_TLM = found.scores_TAKM.flatten(1, 2)
        pre_TP = nnf.linear(x_TH, self.pre_PH)
        gate_TL = nnf.gelu(torch.einsum("tp,tlp->tl", pre_TP, self.table.pre_VP[rows_TL]))
        values_TLMC = self.table.value_VC[rows_TL].view(*scores_TLM.shape, self.chunk)
        mixed_TMC = torch.einsum("tl,tlm,tlmc->tmc", gate_TL, scores_TLM, values_TLMC)
        return nnf.linear(mixed_TMC.flatten(1), self.out_HC)

    def dense(self, x_TH: Tensor, found: Found) -> Tensor:
        """Return the same through every row of the table: the reference of the gather."""
        rows_TL, scores_TLM = self.rows(found), found.scores_TAKM.flatten(1, 2)
        gate_TV = nnf.gelu(nnf.linear(x_TH, self.pre_PH) @ self.table.pre_VP.T)
        chunks = []
        for core, value_VC in enumerate(self.table.value_VC.chunk(scores_TLM.shape[-1], dim=1)):
            weight_TV = gate_TV.new_zeros(gate_TV.shape).scatter_add(1, rows_TL, scores_TLM[..., core])
            chunks.append((gate_TV * weight_TV) @ value_VC)
        return nnf.linear(torch.cat(chunks, dim=1), self.out_HC)

    def routing(self, x_TH: Tensor) -> Routing:
        """Return which rows of the table each token reads, weighted by the sum of its scores over the cores."""
        found = self.search(x_TH)
        return merged_routing(self.rows(found), found.scores_TAKM.sum(-1).flatten(1), len(self.table.value_VC))


def seeded_shuffle(side: int, seed: int) -> Tensor:
    """Return shuffle_E: a permutation of the S^2 rows of a grid."""
    return torch.argsort(seeded_normal((side**2,), 1.0, seed, "ultramem.shuffle"))


def core_penalty(core_MARR: Tensor, floor: float = 0.15) -> Tensor:
    """Return mean relu(sigma_i - floor)^2 over all but the largest singular value of each head's summed core.

    It pulls the cores towards rank one, where the search is right; released coefficient 0.001, not yet applied here.
    """
    others_AR = torch.linalg.svdvals(core_MARR.float().sum(0))[:, 1:]
    penalty: Tensor = (others_AR - floor).relu().square().sum() / max(others_AR.numel(), 1)
    return penalty


def key_balance(first_TAS: Tensor, second_TAS: Tensor, k: int) -> Tensor:
    """Return sum over both sides of S sum_s P_s f_s for scores along the search's vectors; 2 at perfect balance.

    P is the mean softmax over the keys and f the share of the k best that each key has. Released coefficient 0.
    """
    loss = first_TAS.new_zeros(())
    for scores_TAS in (first_TAS, second_TAS):
        keys = scores_TAS.shape[-1]
        probs_NS = scores_TAS.softmax(-1).flatten(0, 1)
        mean_S = probs_NS.sum(0) / max(len(probs_NS), 1)
        count_S = torch.bincount(scores_TAS.topk(k, dim=-1).indices.flatten(), minlength=keys)
        loss = loss + keys * torch.dot(mean_S, count_S.to(mean_S.dtype) / count_S.sum().clamp(min=1))
    return loss
