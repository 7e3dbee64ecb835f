"""The fake device itself: it computes, it moves, and it refuses what a GPU would refuse."""

import pytest
import torch


def test_it_computes_where_its_tensors_are(fake):
    with fake.Elsewhere() as device:
        x = torch.arange(6.0).view(2, 3).to(fake.NAME)
        out = torch.zeros(2, 2, device=x.device)
        out += x @ x.T
        assert x.device.type == out.device.type == fake.NAME
        assert out.tolist() == [[5.0, 14.0], [14.0, 50.0]]
        assert out.to("cpu").device.type == "cpu"
        assert device.seen > 0


def test_a_tensor_left_on_the_cpu_is_found(fake):
    with fake.Elsewhere():
        x = torch.ones(2, 3).to(fake.NAME)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2, 3)
        x.copy_(torch.zeros(2, 3))  # which a GPU allows as well
        assert float(x.sum()) == 0.0


def test_a_write_through_a_view_is_seen(fake):
    with fake.Elsewhere():
        x = torch.zeros(3, device=fake.NAME)
        x[1:].fill_(2.0)
        assert x.tolist() == [0.0, 2.0, 2.0]
