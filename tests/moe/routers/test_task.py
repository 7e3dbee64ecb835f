"""M3ViT: one gate per task, which is plain top-k once the task is known."""

import pytest
import torch

from moebench.contracts import Selection, load_attribute
from moebench.moe.layer import LayerWeights
from moebench.moe.router import select
from moebench.moe.router_params.task import DESCRIPTORS, M3ViT
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape

VARIANTS = [
    ("m3vit", M3ViT(), {}),
    ("m3vit", M3ViT(k=2, tasks=5), {}),
    ("m3vit", M3ViT(tasks=3, slice_width=4), {}),
    ("m3vit", M3ViT(noise_std=1.0), {}),
]
SHAPE = ModelShape(32, 8, 16, 2, (0, 1), Selection("softmax", 2, True))
TOKENS = 48
every_variant = pytest.mark.parametrize("params", [variant[1] for variant in VARIANTS])


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(params, seed=0, router_EH=None):
    weights = LayerWeights(torch.zeros(16, 16, 32), torch.zeros(16, 32, 8), router_EH)
    return load_attribute(DESCRIPTORS[0].factory)(params)(weights, SHAPE, seed)


def maps_of(router):
    """weight_GEH, below the noise where there is some."""
    return dict(router.named_parameters())[next(name for name, _ in router.named_parameters())].detach()


@every_variant
def test_a_task_is_top_k_of_its_own_gate(params):
    router = build(params).router
    x_TH = seeded(TOKENS, 32)
    for task in range(params.tasks):
        routing = router(x_TH, Context(task=task))
        logits_TE = torch.full((TOKENS, 16), float("-inf"))
        allowed = list(params.slices(SHAPE)[task])
        logits_TE[:, allowed] = x_TH @ maps_of(router)[task, allowed].T
        torch.testing.assert_close(routing.logits_TE, logits_TE)
        indices_TK, weights_TK = select(routing.logits_TE, params.selection(SHAPE))
        assert torch.equal(routing.padded()[0], indices_TK)
        assert torch.equal(routing.padded()[1], weights_TK)
        assert (routing.to_dense().sum(1) <= 1 + 1e-6).all()


@every_variant
def test_tasks_may_differ_by_token(params):
    router = build(params).router
    x_TH, task_T = seeded(TOKENS, 32), torch.arange(TOKENS) % params.tasks
    mixed_TE = router(x_TH, Context(task=task_T)).to_dense()
    for task in range(params.tasks):
        alone_TE = router(x_TH, Context(task=torch.tensor(task))).to_dense()
        torch.testing.assert_close(mixed_TE[task_T == task], alone_TE[task_T == task])
    assert not torch.equal(mixed_TE, router(x_TH, Context(task=0)).to_dense())


def test_slices_are_spread_from_the_first_expert_to_the_last():
    """The released code adds the starts up: 0, 6, 18 for these tasks, beyond the last of 16 experts."""
    assert M3ViT(tasks=3, slice_width=4).slices(SHAPE) == (range(4), range(6, 10), range(12, 16))
    assert M3ViT(tasks=1, slice_width=4).slices(SHAPE) == (range(4),)
    assert M3ViT().slices(SHAPE) == (range(16), range(16))


def test_experts_of_other_tasks_are_never_read():
    params = M3ViT(tasks=3, slice_width=4)
    router = build(params).router
    for task in range(3):
        used = (router(seeded(400, 32), Context(task=task)).counts_E > 0).nonzero().flatten().tolist()
        assert used == list(params.slices(SHAPE)[task])


def test_all_gates_start_as_the_layers_router():
    router_EH = seeded(16, 32, seed=5)
    router = build(M3ViT(tasks=2), router_EH=router_EH).router
    x_TH = seeded(TOKENS, 32)
    first, second = (router(x_TH, Context(task=task)) for task in range(2))
    torch.testing.assert_close(first.logits_TE, x_TH @ router_EH.T)
    assert torch.equal(first.to_dense(), second.to_dense())
    with torch.no_grad():
        next(router.parameters()).add_(1)
    assert torch.equal(router_EH, seeded(16, 32, seed=5))


def test_the_gradient_of_a_task_stays_in_its_gate():
    router = build(M3ViT(tasks=3)).router
    router(seeded(TOKENS, 32), Context(task=1)).weight_N.square().sum().backward()
    size_G = next(router.parameters()).grad.abs().amax((1, 2))
    assert size_G[1] > 0
    assert (size_G[[0, 2]] == 0).all()


def test_noise_comes_with_training_only_and_from_the_generator():
    router = build(M3ViT(noise_std=16.0)).router
    x_TH = seeded(4000, 32)
    plain_TE = router(x_TH, Context(task=0)).logits_TE

    def noisy(seed):
        ctx = Context(task=0, training=True, rng=torch.Generator().manual_seed(seed))
        return router(x_TH, ctx).logits_TE

    assert router.needs == {"task", "rng"}
    assert (noisy(1) - plain_TE).detach().std() == pytest.approx(1.0, rel=0.02)
    assert torch.equal(noisy(1), noisy(1))
    assert not torch.equal(noisy(1), noisy(2))
    with pytest.raises(ValueError, match="'rng'"):
        router(x_TH, Context(task=0, training=True))


@pytest.mark.parametrize(
    ("task", "message"),
    [(None, "'task'"), (2, r"\[0, 2\)"), (torch.zeros(3).long(), r"\(3,\) for 48 tokens")],
)
def test_a_task_is_needed_for_every_token(task, message):
    with pytest.raises(ValueError, match=message):
        build(M3ViT()).router(seeded(TOKENS, 32), Context(task=task))


def test_invalid_tokens_have_no_entries():
    valid_T = torch.arange(TOKENS) % 3 != 0
    routing = build(M3ViT()).router(seeded(TOKENS, 32), Context(task=0, valid_T=valid_T))
    assert torch.equal(routing.k_T, 4 * valid_T.long())


def test_no_tokens():
    routing = build(M3ViT()).router(torch.zeros(0, 32), Context(task=torch.zeros(0).long()))
    assert (routing.shape, len(routing.token_N)) == ((0, 16), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 5, "slice_width": 4}, "the 4 experts"),
        ({"slice_width": 17}, "the 16 experts"),
        ({"tasks": 0}, "tasks=0"),
        ({"noise_std": -1.0}, "noise_std"),
    ],
)
def test_impossible_parameters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        M3ViT(**changes).selection(SHAPE)
