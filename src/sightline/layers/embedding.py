"""Token embedding and output head."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sightline.layers.linear import linear, new_weight


class Embedding(nn.Module):
    """weight: [vocab_size, width], uninitialised; also a tied output head, hence a linear layer's memory layout."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = new_weight(vocab_size, width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int [T] -> [T, width]."""
        return F.embedding(input_ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, width] -> [S, vocab_size]."""
        return linear(hidden, self.weight)


def place_features(hidden: Tensor, image_rows: Tensor | None, features: Tensor | None) -> Tensor:
    """Overwrite rows `image_rows` [N] of hidden [T, width] by features [N, width], in place. Both or neither are given."""
    assert (image_rows is None) == (features is None), "image_rows and features come together"
    if image_rows is None or features is None:
        return hidden
    assert features.shape == (image_rows.shape[0], hidden.shape[1]), (
        f"{tuple(features.shape)} picture features for {image_rows.shape[0]} placeholder rows of width {hidden.shape[1]}"
    )
    return hidden.index_copy_(0, image_rows, features.to(hidden.dtype))
