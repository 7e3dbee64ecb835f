"""One class for TEAL, CATS, CHESS, WINA and R-Sparse: a site, a weight for its scores, and a rule.

Shape letters: T tokens, N rows, H hidden, F expert width, I channels of a site, O outputs of the matrix behind it,
R rank, N_F experts that own weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...contracts import SITES
from ..channels import LowRank, SiteRule, Sparsity
from ..experts import ExpertStore
from ..routing import Routing
from ..sparsity import quantile, site_activations
from .params import ChannelParams


@dataclass(frozen=True)
class ChannelSparsifier:
    """Leaves out channels at ``site`` where |a_j| * weight_j is small.

    ``weight`` is ``one``, ``column_norm`` (of the matrix behind the site) or ``up_mean`` (E|up_j|, for site ``gate``);
    ``rule`` a ``threshold`` over the layer or ``topk`` per token. ``rotated``: in the basis of the right singular
    vectors of gate and up. ``alpha`` is the share of the weights that are left which goes to channels; the rest goes to
    a low-rank residual.
    """

    site: str
    weight: str = "one"
    rule: str = "threshold"
    rotated: bool = False
    alpha: float = 1.0

    def calibrate(self, store: ExpertStore, routing: Routing, x_TH: Tensor, level: float) -> SiteRule | None:
        """Return the rule that leaves out ``level`` of the site's channels; None where it leaves out nothing.

        ``store`` leaves out at earlier sites what it will when it is executed.
        """
        basis_II = singular_basis(store) if self.rotated else None
        weight = channel_weights(self.weight, store, routing, x_TH, self.site, basis_II)
        outputs, width = matrix_shape(store, self.site)
        used = (1.0 - level) * self.alpha
        rule: SiteRule | None = SiteRule(k=math.floor(width * used + 1e-9), weight=weight, basis_II=basis_II)
        if self.rule == "threshold":
            rule = self._threshold(SiteRule(0.0, weight=weight, basis_II=basis_II), store, routing, x_TH, 1.0 - used)
        rank = spare_rank(outputs, width, level, self.alpha)
        if rule is None or rule.k == width:
            return None
        return replace(rule, residual=low_rank_parts(store, self.site, rank)) if rank else rule

    def _threshold(
        self, rule: SiteRule, store: ExpertStore, routing: Routing, x_TH: Tensor, level: float
    ) -> SiteRule | None:
        """Return ``rule`` with the threshold that leaves out ``level`` of all experts' activations; None: nothing."""
        found = site_activations(store, routing, x_TH, self.site)
        threshold = quantile([rule.score(rule.turned(part), slot).float() for part, slot in found], level)
        return None if threshold is None else replace(rule, threshold=threshold)


def sparsifiers(params: ChannelParams, alphas: Mapping[str, float] | None = None) -> list[ChannelSparsifier]:
    """Return the sparsifiers of a configuration, in the order of an expert's work; ``alphas`` by site, or its own."""
    return [
        ChannelSparsifier(
            site,
            params.scores[site],
            params.rule,
            rotated=params.rotated and site == "input",
            alpha=params.alpha if alphas is None else alphas[site],
        )
        for site in SITES
        if site in params.scores
    ]


def calibrated(
    family: Sequence[ChannelSparsifier], store: ExpertStore, routing: Routing, x_TH: Tensor, levels: Mapping[str, float]
) -> ExpertStore:
    """Return the store with a rule at every site, in the order of an expert's work; itself where none leaves out any.

    ``levels`` is by site. A later site is calibrated with the earlier ones sparse, so that its level holds as executed.
    """
    rules: dict[str, SiteRule] = {}
    for one in family:
        if levels[one.site] > 0:
            so_far = replace(store, sparsity=Sparsity(rules))
            found = one.calibrate(so_far, routing, x_TH, levels[one.site])
            rules = rules if found is None else {**rules, one.site: found}
    return replace(store, sparsity=Sparsity(rules)) if rules else store


# --- what scores are weighted by -------------------------------------------------------------------------------------


def channel_weights(
    name: str, store: ExpertStore, routing: Routing, x_TH: Tensor, site: str, basis_II: Tensor | None
) -> Tensor | None:
    """Return the weights [N_F, I] of a site's scores as float32 of bfloat16 values; None stands for ones."""
    if name == "one":
        return None
    if name == "column_norm":
        return exact_in_bfloat16(column_norms(store, site, basis_II))
    return exact_in_bfloat16(up_means(store, routing, x_TH))


def column_norms(store: ExpertStore, site: str, basis_II: Tensor | None = None) -> Tensor:
    """Return the column norms [N_F, I] of the matrix that each expert has behind ``input`` or ``hidden``, float32."""
    norms = [
        (weight if basis_II is None else weight @ basis_II.double()).norm(dim=0) for weight in matrices(store, site)
    ]
    return torch.stack(norms).float()


def up_means(store: ExpertStore, routing: Routing, x_TH: Tensor) -> Tensor:
    """Return E|up_j| [N_F, F] over the tokens of each expert, float32; without tokens, the mean over the others."""
    means: dict[int, Tensor] = {}
    for x_NH, slot in site_activations(store, routing, x_TH, "input"):
        up_FH = store.weights(slot)[0].chunk(2)[1]
        means[slot] = nnf.linear(x_NH, up_FH).abs().mean(0)
    others = torch.stack(list(means.values())).mean(0) if means else torch.ones(store.width)
    return torch.stack([means.get(slot, others) for slot in range(len(store.ffn_ids))])


def exact_in_bfloat16(weights: Tensor) -> Tensor:
    """Return the nearest bfloat16 values as float32: the product with an activation is then rounded once at most."""
    return weights.bfloat16().float()


# --- the matrices behind a site --------------------------------------------------------------------------------------


def matrices(store: ExpertStore, site: str) -> Iterator[Tensor]:
    """Yield the matrix [O, I] behind ``input`` (gate and up, stacked) or ``hidden`` (down) of every slot, float64."""
    for slot in range(len(store.ffn_ids)):
        yield store.weights(slot)[site == "hidden"].double()


def matrix_shape(store: ExpertStore, site: str) -> tuple[int, int]:
    """Return (O, I) of the matrix behind a site; that of site ``gate`` is down."""
    if site == "input":
        return (2 if store.gated else 1) * store.width, store.hidden
    return store.hidden, store.width


def singular_basis(store: ExpertStore) -> Tensor:
    """Return the right singular vectors [H, H] of gate and up of all experts, stacked, as float32 columns."""
    gram_HH = torch.zeros(store.hidden, store.hidden, dtype=torch.float64)
    for weight in matrices(store, "input"):
        gram_HH += weight.T @ weight
    basis_HH: Tensor = torch.linalg.eigh(gram_HH).eigenvectors
    return basis_HH.float()


def spare_rank(outputs: int, width: int, level: float, alpha: float) -> int:
    """Return the rank that the share 1 - ``alpha`` of the weights left pays for: R-Sparse's budget with the true O, I.

    n = floor(I (1 - level) alpha) channels; r = floor((I O (1 - level) - n O) / (I + O)).
    """
    if alpha >= 1:
        return 0
    channels = math.floor(width * (1 - level) * alpha)
    return max(0, math.floor((width * outputs * (1 - level) - channels * outputs) / (width + outputs)))


def low_rank_parts(store: ExpertStore, site: str, rank: int) -> LowRank:
    """Return the best approximation of rank ``rank`` of every expert's matrix behind ``input`` or ``hidden``.

    By the eigenvectors of the smaller Gram matrix, in float64: W V V^T with V the first right singular vectors, or
    U U^T W with the left ones.
    """
    pairs = [best_of_rank(weight, rank) for weight in matrices(store, site)]
    return LowRank(*(torch.stack([pair[side].float() for pair in pairs]) for side in (0, 1)))


def best_of_rank(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (left [O, R], right [R, I]) whose product is the best approximation of a float64 matrix."""
    outputs, width = weight_OI.shape
    gram = weight_OI.T @ weight_OI if width <= outputs else weight_OI @ weight_OI.T
    first = torch.linalg.eigh(gram).eigenvectors[:, -rank:]  # eigenvalues rise
    return (weight_OI @ first, first.T) if width <= outputs else (first, first.T @ weight_OI)
