"""Self-attention of a decoder layer: projections and rotation here, the cache and the softmax behind `ctx.attend`."""

from __future__ import annotations

from torch import Tensor, nn

from sightline.attention.backend import ForwardContext
from sightline.layers.linear import Linear, MergedLinear
from sightline.layers.norm import RMSNorm
from sightline.layers.normed import normed_linear
from sightline.layers.rotary import Rotary, apply_rotary


class DecoderAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) of decoder layer `layer`."""

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
    ) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_qk_heads = num_heads + num_kv_heads
        self.num_kv_heads = num_kv_heads
        self.v_start = self.num_qk_heads * head_dim
        kv_width = num_kv_heads * head_dim
        parts = {"q_proj": num_heads * head_dim, "k_proj": kv_width, "v_proj": kv_width}
        self.qkv_proj = MergedLinear(hidden_size, parts, bias=qkv_bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=output_bias)

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
