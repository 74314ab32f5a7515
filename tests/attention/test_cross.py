"""Attention from text to pictures, beside the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sightline.attention.cross import CrossAttentionBatch, CrossDecodeBatch, PictureGroup
from sightline.attention.torch_sdpa import TorchSDPABackend

HEADS, KV_HEADS, DIM, LAYERS = 6, 2, 8, 3


def _expected(q: Tensor, layer: int, features: list[Tensor]) -> Tensor:
    k, v = torch.cat([f[layer] for f in features], dim=1).repeat_interleave(HEADS // KV_HEADS, dim=2)
    weights = torch.einsum("rhd,thd->rht", q, k).mul(DIM**-0.5).softmax(dim=-1)
    return torch.einsum("rht,thd->rhd", weights, v)


def test_groups_beside_the_formula() -> None:
    torch.manual_seed(0)
    one, two, three = (torch.randn(LAYERS, 2, n, KV_HEADS, DIM) for n in (5, 17, 34))
    groups = [PictureGroup(3, (one,)), PictureGroup(1, (two, three)), PictureGroup(4, (three,))]
    q = torch.randn(8, HEADS, DIM)
    for layer in range(LAYERS):
        out = TorchSDPABackend().cross_forward(q, layer, CrossAttentionBatch(None, groups))
        want = [
            _expected(q[:3], layer, [one]),
            _expected(q[3:4], layer, [two, three]),
            _expected(q[4:], layer, [three]),
        ]
        torch.testing.assert_close(out, torch.cat(want))


def test_rows_that_see_nothing_stay() -> None:
    batch = CrossAttentionBatch(torch.tensor([4, 1]), [PictureGroup(2, (torch.zeros(1, 2, 1, 1, 1),))])
    x = torch.arange(6.0)[:, None]
    assert batch.gather(x).flatten().tolist() == [4.0, 1.0]
    assert batch.scatter(x, batch.gather(x) * 10).flatten().tolist() == [0.0, 10.0, 2.0, 3.0, 40.0, 5.0]
    everything = CrossAttentionBatch(None, [])
    assert everything.gather(x) is x
    assert everything.scatter(x, x + 1).flatten().tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_of_a_graphs_rows_those_that_see_nothing_stay() -> None:
    """Whatever was computed for them."""
    batch = CrossDecodeBatch(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[4, 0, 1], [4, 0, 9]]), 1)
    x, new = torch.arange(6.0).view(3, 2), torch.full((3, 2), 7.0)
    new[1] = float("nan")
    assert batch.gather(x) is x
    assert batch.scatter(x, new).tolist() == [[7.0, 7.0], [2.0, 3.0], [7.0, 7.0]]
    with pytest.raises(AssertionError):
        TorchSDPABackend().cross_forward(x[:, None], 0, batch)
