"""Token embedding and output head, of which each rank holds a share of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sightline.layers.linear import Linear, linear, new_weight
from sightline.layers.parameter import Slot
from sightline.parallel import SOLO, Group, Shard


class Embedding(nn.Module):
    """weight: [this rank's share of vocab_size, width], uninitialised; also a tied output head, hence a linear layer's memory
    layout."""

    def __init__(self, vocab_size: int, width: int, group: Group = SOLO) -> None:
        super().__init__()
        self.group = group
        self.rows = group.padded_shard(vocab_size)
        self.weight = new_weight(self.rows.width, width)
        _clear_padding(self.weight, self.rows)

    def slots(self, name: str) -> Iterator[tuple[str, Slot]]:
        """The share's rows."""
        yield f"{name}.weight", Slot.of_shard(self.weight.data, self.rows)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int [T] -> [T, width]."""
        if self.group.size == 1:
            return F.embedding(input_ids, self.weight)
        rows = input_ids - self.rows.start
        is_ours = (rows >= 0) & (rows < self.rows.width)
        own = F.embedding(torch.where(is_ours, rows, 0), self.weight)
        return self.group.all_reduce(own.mul_(is_ours.unsqueeze(1)))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, width] -> [S, vocab_size]."""
        return _gathered(self.group, linear(hidden, self.weight), self.rows)


class OutputHead(Linear):
    """Hidden states to logits. weight: [this rank's share of vocab_size, width]."""

    def __init__(self, width: int, vocab_size: int, group: Group = SOLO) -> None:
        self.rows = group.padded_shard(vocab_size)
        super().__init__(width, self.rows.width)
        self.group = group
        _clear_padding(self.weight, self.rows)

    def slots(self, name: str) -> Iterator[tuple[str, Slot]]:
        """The share's rows."""
        yield f"{name}.weight", Slot.of_shard(self.weight.data, self.rows)

    def forward(self, x: Tensor) -> Tensor:
        """x [S, width] -> [S, vocab_size]."""
        return _gathered(self.group, super().forward(x), self.rows)


def _clear_padding(weight: nn.Parameter, rows: Shard) -> None:
    if rows.length < rows.width:
        weight.data[rows.length :].zero_()


def _gathered(group: Group, logits: Tensor, rows: Shard) -> Tensor:
    """This rank's logits [S, rows.width] -> everybody's, [S, rows.total]."""
    return logits if group.size == 1 else group.all_gather(logits)[:, : rows.total]


def place_features(hidden: Tensor, image_rows: Tensor | None, features: Tensor | None) -> Tensor:
    """Overwrite rows `image_rows` [N] of hidden [T, width] by features [N, width], in place. Both or neither are given."""
    assert (image_rows is None) == (features is None), "image_rows and features come together"
    if image_rows is None or features is None:
        return hidden
    assert features.shape == (image_rows.shape[0], hidden.shape[1]), (
        f"{tuple(features.shape)} picture features for {image_rows.shape[0]} placeholder rows of width {hidden.shape[1]}"
    )
    return hidden.index_copy_(0, image_rows, features.to(hidden.dtype))
