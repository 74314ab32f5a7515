"""The reference backend: torch's scaled_dot_product_attention on any device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sightline.attention.backend import AttentionBackend, AttentionBatch, KVCache


@dataclass
class _Keys:
    """Which slots of the flat cache a group of sequences reads.

    view: (first, end) when one sequence's slots follow each other, so that nothing is copied; else `slots`, int64
    [B * K]. mask: additive [B, 1, 1, K] or [q_len, K], None where every query sees every key.
    """

    num_keys: int
    mask: Tensor | None
    slots: Tensor | None = None
    view: tuple[int, int] | None = None


@dataclass
class _Prefill:
    """Rows first..end of one sequence; `keys` is None when it has no history."""

    first: int
    end: int
    keys: _Keys | None


@dataclass
class _Plan:
    """What all layers of one step share."""

    decode: _Keys | None = None
    prefill: list[_Prefill] = field(default_factory=list)


class TorchSDPABackend(AttentionBackend):
    """Decode rows in one call over gathered keys, prefill sequences one by one.

    Nothing outside a sequence's own first kv_len slots is ever multiplied, not even by a zero weight: padding reads the
    sequence's own first key, so that garbage in free or foreign pages cannot turn into NaN here.
    """

    def __init__(self) -> None:
        self._plan: _Plan | None = None
        self._cache: KVCache | None = None
        self._flat: list[tuple[Tensor, Tensor]] = []

    def prepare(self, batch: AttentionBatch) -> None:
        """The plan needs the cache's page size and dtype: the step's first layer makes it."""
        self._plan = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer: int, cache: KVCache, batch: AttentionBatch) -> Tensor:
        """See `AttentionBackend.forward`."""
        plan = self._plan
        if plan is None:
            plan = self._plan = _make_plan(batch, cache.page_size, q)
        if cache is not self._cache:
            self._cache = cache
            self._flat = [(ck.flatten(0, 1), cv.flatten(0, 1)) for ck, cv in zip(cache.k, cache.v, strict=True)]
        flat_k, flat_v = self._flat[layer]
        flat_k.index_copy_(0, batch.slot_mapping, k)
        flat_v.index_copy_(0, batch.slot_mapping, v)

        num_decode = batch.num_decode
        outputs = []
        if plan.decode is not None:
            outputs.append(_decode(q[:num_decode], flat_k, flat_v, plan.decode))
        for part in plan.prefill:
            rows = slice(part.first, part.end)
            if part.keys is None:
                outputs.append(_causal(q[rows], k[rows], v[rows]))
            else:
                outputs.append(_chunk(q[rows], flat_k, flat_v, part.keys))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _decode(q: Tensor, flat_k: Tensor, flat_v: Tensor, keys: _Keys) -> Tensor:
    """q [B, H, D], one query for each sequence. Heads that share a key head become its rows: no repeated keys."""
    batch, heads, dim = q.shape
    k, v = _read(flat_k, batch, keys), _read(flat_v, batch, keys)
    grouped = q.view(batch, k.shape[1], -1, dim)
    return scaled_dot_product_attention(grouped, k, v, keys.mask).reshape(batch, heads, dim)


def _chunk(q: Tensor, flat_k: Tensor, flat_v: Tensor, keys: _Keys) -> Tensor:
    """q [q_len, H, D] of one sequence with history."""
    k, v = _read(flat_k, 1, keys), _read(flat_v, 1, keys)
    queries = q.transpose(0, 1).unsqueeze(0)
    out = scaled_dot_product_attention(queries, k, v, keys.mask, enable_gqa=queries.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [q_len, H, D], k, v [q_len, Hk, D] of one sequence without history: the cache need not be read."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


def _read(flat: Tensor, batch: int, keys: _Keys) -> Tensor:
    """[slots, Hk, D] -> [B, Hk, K, D]."""
    if keys.view is not None:
        return flat[keys.view[0] : keys.view[1]].unsqueeze(0).transpose(1, 2)
    assert keys.slots is not None
    return flat.index_select(0, keys.slots).view(batch, keys.num_keys, *flat.shape[1:]).transpose(1, 2)


def _make_plan(batch: AttentionBatch, page_size: int, q: Tensor) -> _Plan:
    plan = _Plan()
    if batch.num_decode:
        plan.decode = _decode_keys(batch, page_size, q)
    first = batch.num_decode
    for i in range(batch.num_decode, len(batch.q_lens_cpu)):
        q_len, kv_len = batch.q_lens_cpu[i], batch.kv_lens_cpu[i]
        keys = None if q_len == kv_len else _chunk_keys(batch, i, page_size, q)
        plan.prefill.append(_Prefill(first, first + q_len, keys))
        first += q_len
    return plan


def _decode_keys(batch: AttentionBatch, page_size: int, q: Tensor) -> _Keys:
    kv_lens = batch.kv_lens_cpu[: batch.num_decode]
    num_keys = max(kv_lens)
    if len(kv_lens) == 1:
        view = _contiguous(batch, 0, page_size)
        if view is not None:
            return _Keys(num_keys, None, view=view)
    slots = _slots(batch.page_table[: batch.num_decode], num_keys, page_size)
    if min(kv_lens) == num_keys:
        return _Keys(num_keys, None, slots.flatten())
    missing = torch.arange(num_keys, device=q.device) >= batch.kv_lens[: batch.num_decode, None]
    slots = torch.where(missing, slots[:, :1], slots)
    mask = torch.zeros(missing.shape, dtype=q.dtype, device=q.device).masked_fill_(missing, float("-inf"))
    return _Keys(num_keys, mask[:, None, None, :], slots.flatten())


def _chunk_keys(batch: AttentionBatch, index: int, page_size: int, q: Tensor) -> _Keys:
    """Row r of the chunk sees keys 0 .. kv_len - q_len + r."""
    q_len, kv_len = batch.q_lens_cpu[index], batch.kv_lens_cpu[index]
    mask = torch.full((q_len, kv_len), float("-inf"), dtype=q.dtype, device=q.device).triu_(kv_len - q_len + 1)
    view = _contiguous(batch, index, page_size)
    if view is not None:
        return _Keys(kv_len, mask, view=view)
    return _Keys(kv_len, mask, _slots(batch.page_table[index : index + 1], kv_len, page_size).flatten())


def _slots(page_table: Tensor, num_keys: int, page_size: int) -> Tensor:
    """Pages [B, P] -> flat slots of the first `num_keys` tokens, int64 [B, num_keys]."""
    pages = page_table[:, : -(-num_keys // page_size)].long() * page_size
    offsets = torch.arange(page_size, device=page_table.device)
    return (pages.unsqueeze(-1) + offsets).flatten(1)[:, :num_keys]


def _contiguous(batch: AttentionBatch, index: int, page_size: int) -> tuple[int, int] | None:
    """(first, end) slots of a sequence whose pages follow each other; only looked for where the table is on the host."""
    if batch.page_table.device.type != "cpu":
        return None
    kv_len = batch.kv_lens_cpu[index]
    pages = batch.page_table[index, : -(-kv_len // page_size)].tolist()
    if pages != list(range(pages[0], pages[0] + len(pages))):
        return None
    return pages[0] * page_size, pages[0] * page_size + kv_len
