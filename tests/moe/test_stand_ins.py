"""What is made up for a layer that stands alone."""

import pytest
import torch

from moebench.contracts import MoebenchError
from moebench.moe.router import Router
from moebench.moe.router_params.lookup import Hash
from moebench.moe.routing import Context
from moebench.moe.stand_ins import StandIns, alone


def needing(*names):
    router = Router()
    router.needs = frozenset(names)
    return router


@pytest.mark.parametrize("vocabulary", [1, 2, 7])
def test_every_id_of_a_small_vocabulary_occurs_and_the_first_most(vocabulary):
    ids_T = StandIns(5000, 8, Hash(vocabulary=vocabulary), 0).fill(Context(), needing("token_ids_T")).token_ids_T
    count_V = torch.bincount(ids_T)
    assert len(count_V) == vocabulary
    assert (count_V > 0).all()
    assert torch.equal(count_V, count_V.sort(descending=True).values)


def test_only_what_is_needed_and_missing_is_made_and_the_same_again():
    fields, own_T = StandIns(64, 8, None, 3), torch.zeros(64, dtype=torch.int64)
    ctx = fields.fill(Context(segment_T=own_T), needing("segment_T", "attn"))
    assert ctx.segment_T is own_T
    assert ctx.features is None
    assert torch.equal(ctx.attn, fields.fill(Context(), needing("attn")).attn)
    torch.testing.assert_close(ctx.attn.sum(-1), torch.ones(ctx.attn.shape[:-1]))
    assert not ctx.attn.triu(1).any()


def test_nothing_lies_before_a_layer_alone():
    assert alone(StandIns(8, 4, None, 0), needing("prev"), 5, None).prev is None


def test_what_cannot_be_made_up_is_told():
    with pytest.raises(MoebenchError, match="'ranks' cannot be made up"):
        StandIns(8, 4, None, 0).fill(Context(), needing("ranks"))
