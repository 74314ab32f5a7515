"""Self-attention of a decoder layer: projections and rotation here, the cache and the softmax behind `ctx.attend`."""

from __future__ import annotations

from torch import Tensor, nn

from sightline.attention.backend import ForwardContext
from sightline.layers.linear import MergedLinear, RowLinear
from sightline.layers.norm import RMSNorm
from sightline.layers.normed import normed_linear
from sightline.layers.rotary import Rotary, apply_rotary
from sightline.parallel import SOLO, Group


class DecoderAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) of decoder layer `layer`; each rank has a share of the
    query heads, and the key heads that these read."""

    def __init__(
        self,
        layer: int,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        output_bias: bool = False,
        group: Group = SOLO,
    ) -> None:
        super().__init__()
        self.layer = layer
        heads, kv_heads = group.shard(num_heads), group.kv_shard(num_kv_heads)
        self.num_heads = heads.width
        self.head_dim = head_dim
        self.num_qk_heads = heads.width + kv_heads.width
        self.num_kv_heads = kv_heads.width
        self.v_start = self.num_qk_heads * head_dim
        queries, keys = heads.times(head_dim), kv_heads.times(head_dim)
        self.qkv_proj = MergedLinear(hidden_size, {"q_proj": queries, "k_proj": keys, "v_proj": keys}, bias=qkv_bias)
        self.o_proj = RowLinear(queries, hidden_size, bias=output_bias, group=group)

    def forward(
        self, hidden: Tensor, norm: RMSNorm, rotary: Rotary, ctx: ForwardContext, rows: Tensor | None = None
    ) -> Tensor:
        """hidden [T, hidden], overwritten -> hidden + attention(norm(hidden)), [T, hidden].

        rows: int64 [S]; only these come back, [S, hidden], though every row's keys and values enter the cache.
        """
        out = self._attend(normed_linear(norm, self.qkv_proj, hidden), rotary, ctx).flatten(1)
        if rows is not None:
            out, hidden = out.index_select(0, rows), hidden.index_select(0, rows)
        return self.o_proj.add_to(hidden, out)

    def _attend(self, qkv: Tensor, rotary: Rotary, ctx: ForwardContext) -> Tensor:
        """qkv [T, heads * head_dim], overwritten -> [T, num_heads, head_dim]."""
        if ctx.backend.rotates:
            return ctx.backend.rotate_and_forward(qkv, *rotary, self.layer, ctx.cache, ctx.batch)
        num_rows = qkv.shape[0]
        # queries and keys lie side by side, so one rotation turns both
        qk = apply_rotary(qkv[:, : self.v_start].view(num_rows, self.num_qk_heads, self.head_dim), rotary)
        v = qkv[:, self.v_start :].view(num_rows, self.num_kv_heads, self.head_dim)
        return ctx.attend(qk[:, : self.num_heads], qk[:, self.num_heads :], v, self.layer)
