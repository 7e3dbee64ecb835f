"""Gates made of smooth steps, differentiable and sparse once saturated: DSelect-k and COMET.

Both mix k parts (selectors, trees), each a product of smooth steps over the experts. The papers' losses need these
parts, which a Routing does not hold: ``choices`` returns them, and ``choice_entropy`` and ``unreachable`` are the
losses.

Shape letters: T tokens, H hidden, E expert ids, J parts, B binary digits, S inner nodes of a tree, D depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..router import Linear, Router, RouterBundle
from ..router_parts import Permutation, masked_routing, seeded_uniform
from ..routing import Context, Routing

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.smoothstep import Comet as CometParams
    from ..router_params.smoothstep import DSelectK as DSelectKParams
    from ..router_params.smoothstep import SmoothStepGate
    from ..shapes import ModelShape

MIX_BOUND = 0.05
"""Other maps than steps start as U(-0.05, 0.05), as do the logits of permutations: the bound of the released code."""


def smooth_step(value: Tensor, gamma: float) -> Tensor:
    """Return 0 below -gamma / 2, 1 above gamma / 2, and -2 u^3 + 3 u / 2 + 1 / 2 of u = value / gamma between.

    Both ends are exact, so that a product of steps is exactly 0 where it should be. 1 - step(v) is step(-v).
    """
    unit = (value / gamma).clamp(-0.5, 0.5)
    return 2 * (unit + 0.5).square() * (1 - unit)


class Parts(Router):
    """A gate that is the sum of J parts over the experts, each of which a permutation may rename on its own.

    The Routing has no logits; its probabilities are the gate itself.
    """

    def __init__(self, permutation: Permutation | None) -> None:
        super().__init__()
        self.permutation = permutation
        if permutation is not None:
            self.needs = frozenset({"progress"})

    def choices(self, x_TH: Tensor) -> Tensor:
        """Return choice_TJE: how far each part chooses each expert; a row sums to one where all codes are experts."""
        raise NotImplementedError

    def parts(self, x_TH: Tensor) -> Tensor:
        """Return gate_TJE, the parts with their weights, before any permutation."""
        raise NotImplementedError

    def forward(self, x_TH: Tensor, ctx: Context) -> Routing:
        """Return the Routing of ``x_TH``."""
        gate_TJE = self.parts(x_TH)
        gate_TE = gate_TJE.sum(1) if self.permutation is None else self.permutation(gate_TJE, ctx)
        return masked_routing(gate_TE, gate_TE > 0, ctx, None, gate_TE)

    def update(self, routing: Routing, signal: Any = None) -> None:
        """Round the permutation, where there is one."""
        if self.permutation is not None:
            self.permutation.round()


class DSelectK(Parts):
    """G = sum_j alpha_j r_j, alpha = softmax(w x + c), r_j(e) the product of steps that spell e in binary.

    ``steps`` scores J x B digits, ``mix`` the J selectors (DSelect-k, arXiv 2106.03760).
    """

    codes_EB: Tensor

    def __init__(
        self, steps: Linear, mix: Linear, experts: int, gamma: float, permutation: Permutation | None = None
    ) -> None:
        super().__init__(permutation)
        self.steps = steps
        self.mix = mix
        self.gamma = gamma
        digits_B = torch.arange((experts - 1).bit_length())
        self.register_buffer("codes_EB", (torch.arange(experts)[:, None] >> digits_B) % 2 == 1)

    def choices(self, x_TH: Tensor) -> Tensor:
        """Return r_TJE, the selectors."""
        value_TJB = self.steps(x_TH, Context()).unflatten(1, (-1, self.codes_EB.shape[1]))[:, :, None]
        digit_TJEB = torch.where(self.codes_EB, value_TJB, -value_TJB)
        return smooth_step(digit_TJEB, self.gamma).prod(-1)

    def parts(self, x_TH: Tensor) -> Tensor:
        """Return alpha_j r_j."""
        alpha_TJ: Tensor = self.mix(x_TH, Context()).softmax(-1)
        return alpha_TJ[:, :, None] * self.choices(x_TH)


class Comet(Parts):
    """G = softmax over all leaves of J trees of a_je x + b_je + log P_je, P the probability of the path to the leaf.

    ``steps`` scores J x (E - 1) inner nodes, ``leaves`` J x E leaves (COMET, arXiv 2306.02824). Inner node n of a tree
    has children 2n + 1 (taken with the step) and 2n + 2; the last E nodes are the leaves, so E need be no power of 2.
    """

    turns_ED: Tensor

    def __init__(
        self, steps: Linear, leaves: Linear, experts: int, gamma: float, permutation: Permutation | None = None
    ) -> None:
        super().__init__(permutation)
        self.steps = steps
        self.leaves = leaves
        self.experts = experts
        self.gamma = gamma
        self.register_buffer("turns_ED", turns(experts))

    def choices(self, x_TH: Tensor) -> Tensor:
        """Return P_TJE, the probabilities of the paths."""
        value_TJS = self.steps(x_TH, Context()).unflatten(1, (-1, self.experts - 1))
        stay_TJ1 = torch.ones_like(value_TJS[:, :, :1])
        left_TJS, right_TJS = smooth_step(value_TJS, self.gamma), smooth_step(-value_TJS, self.gamma)
        return torch.cat([left_TJS, right_TJS, stay_TJ1], dim=-1)[:, :, self.turns_ED].prod(-1)

    def parts(self, x_TH: Tensor) -> Tensor:
        """Return the softmax over the leaves of all trees; a leaf whose path has probability 0 has weight 0."""
        path_TJE = self.choices(x_TH)
        leaf_TJE: Tensor = self.leaves(x_TH, Context()).unflatten(1, (-1, self.experts))
        score_TJE = (leaf_TJE + (path_TJE + 1e-8).log()).masked_fill(path_TJE == 0, float("-inf"))
        return score_TJE.flatten(1).softmax(-1).reshape(path_TJE.shape)


def turns(experts: int) -> Tensor:
    """Return turns_ED int64: the steps that lead to each leaf of a heap with that many leaves.

    Of S = experts - 1 inner nodes, n stands for left at node n, S + n for right, and 2 S fills up shorter paths.
    """
    inner = experts - 1
    paths: list[list[int]] = []
    for leaf in range(experts):
        node, path = inner + leaf, []
        while node > 0:
            parent, right = divmod(node - 1, 2)
            path.append(parent + inner * right)
            node = parent
        paths.append(path)
    depth = max(map(len, paths))
    return torch.tensor([path + [2 * inner] * (depth - len(path)) for path in paths])


# --- losses ----------------------------------------------------------------------------------------------------------


def choice_entropy(choice_TJE: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return the mean over tokens of sum_je -r log(r + epsilon): pressed down, every part chooses one expert."""
    return -(choice_TJE * (choice_TJE + epsilon).log()).sum() / max(len(choice_TJE), 1)


def unreachable(choice_TJE: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return the mean over tokens of sum_j 1 / (epsilon + sum_e r_je): J where no code without an expert has a share.

    DSelect-k adds it where the number of experts is no power of 2.
    """
    return (1 / (choice_TJE.sum(-1) + epsilon)).sum() / max(len(choice_TJE), 1)


# --- factories -------------------------------------------------------------------------------------------------------


def build_dselect_k(params: DSelectKParams) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of DSelect-k, seeded whole: a linear router that the layer has does not fit it."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        kinds = params.kinds(shape)
        digits = (shape.experts - 1).bit_length()
        steps = _uniform(params.k * digits, shape, params.init * params.gamma, seed, "dselect_k.steps")
        mix = _uniform(params.k, shape, MIX_BOUND, seed, "dselect_k.mix")
        permutation = _permutation(params, shape.experts, seed)
        return RouterBundle(DSelectK(steps, mix, shape.experts, params.gamma, permutation), kinds)

    return factory


def build_comet(params: CometParams) -> Callable[[LayerWeights, ModelShape, int], RouterBundle]:
    """Return the factory of COMET, seeded whole: a linear router that the layer has does not fit it."""

    def factory(weights: LayerWeights, shape: ModelShape, seed: int) -> RouterBundle:
        kinds = params.kinds(shape)
        bound = params.init * params.gamma
        steps = _uniform(params.k * (shape.experts - 1), shape, bound, seed, "comet.steps")
        leaves = _uniform(params.k * shape.experts, shape, MIX_BOUND, seed, "comet.leaves")
        permutation = _permutation(params, shape.experts, seed)
        return RouterBundle(Comet(steps, leaves, shape.experts, params.gamma, permutation), kinds)

    return factory


def _uniform(rows: int, shape: ModelShape, bound: float, seed: int, stream: str) -> Linear:
    """Return a linear map from H to ``rows`` whose weights and bias are U(-bound, bound)."""
    weight_RH = seeded_uniform((rows, shape.hidden), bound, seed, stream)
    return Linear(weight_RH, seeded_uniform((rows,), bound, seed, f"{stream}.bias"))


def _permutation(params: SmoothStepGate, experts: int, seed: int) -> Permutation | None:
    if params.permutation == "none":
        return None
    count = 1 if params.permutation == "shared" else params.k
    return Permutation(seeded_uniform((count, experts, experts), MIX_BOUND, seed, "permutation"), params.search)
