"""The reference backend: torch's scaled_dot_product_attention on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sightline.attention.backend import AttentionBackend, AttentionBatch, KVCache

# Decode rows share one padded call while the longest has at most twice the keys of the shortest, or few anyway.
_SHORT = 256


@dataclass
class _Keys:
    """Which keys of the cache `batch` (B) sequences read.

    view: (first, end) slots when B is 1 and its pages follow each other, so that nothing is copied; else `pages`, int64
    [B * P]. num_keys: K, keys of the longest. mask: additive [B, 1, 1, K] or [q_len, K], None where every query sees every
    key. unused: int64 rows of the gathered [B * P * page_size] that no sequence has written, None if no query reads them.
    """

    batch: int
    num_keys: int
    mask: Tensor | None = None
    pages: Tensor | None = None
    view: tuple[int, int] | None = None
    unused: Tensor | None = None


@dataclass
class _Decode:
    """Decode rows of similar length; rows is None when they are all of the step's decode rows in order."""

    rows: Tensor | None
    keys: _Keys


@dataclass
class _Prefill:
    """Rows first..end of one sequence, or of `count` equally long ones without history, for which `keys` is None."""

    first: int
    end: int
    keys: _Keys | None
    count: int = 1


@dataclass
class _Plan:
    """What all layers of one step share."""

    decode: list[_Decode] = field(default_factory=list)
    prefill: list[_Prefill] = field(default_factory=list)


class TorchSDPABackend(AttentionBackend):
    """Decode rows of similar length in one call over gathered pages, prefill sequences one by one, or in one call where neighbours
    are equally long and new.

    Nothing outside a sequence's own first kv_len slots enters a product, not even beside a zero weight: padding reads the
    sequence's own first page, and gathered rows past its end are cleared, so that garbage in free or foreign pages cannot
    turn into NaN here.
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

        outputs = []
        if plan.decode:
            outputs.append(_decode(q[: batch.num_decode], flat_k, flat_v, cache.page_size, plan.decode))
        for part in plan.prefill:
            rows = slice(part.first, part.end)
            if part.keys is None:
                outputs.append(_causal(q[rows], k[rows], v[rows], part.count))
            else:
                outputs.append(_chunk(q[rows], flat_k, flat_v, cache.page_size, part.keys))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _decode(q: Tensor, flat_k: Tensor, flat_v: Tensor, page_size: int, groups: Sequence[_Decode]) -> Tensor:
    """q [B, H, D], one query for each sequence. Heads that share a key head become its rows: no repeated keys."""
    kv_heads, dim = flat_k.shape[1:]
    grouped = q.view(q.shape[0], kv_heads, -1, dim)
    if groups[0].rows is None:
        keys = groups[0].keys
        k, v = _read(flat_k, page_size, keys), _read(flat_v, page_size, keys)
        return scaled_dot_product_attention(grouped, k, v, keys.mask).reshape(q.shape)
    out = torch.empty_like(grouped, memory_format=torch.contiguous_format)
    for group in groups:
        assert group.rows is not None
        k, v = _read(flat_k, page_size, group.keys), _read(flat_v, page_size, group.keys)
        queries = grouped.index_select(0, group.rows)
        out.index_copy_(0, group.rows, scaled_dot_product_attention(queries, k, v, group.keys.mask))
    return out.view(q.shape)


def _chunk(q: Tensor, flat_k: Tensor, flat_v: Tensor, page_size: int, keys: _Keys) -> Tensor:
    """q [q_len, H, D] of one sequence with history."""
    k, v = _read(flat_k, page_size, keys), _read(flat_v, page_size, keys)
    queries = q.transpose(0, 1).unsqueeze(0)
    out = scaled_dot_product_attention(queries, k, v, keys.mask, enable_gqa=queries.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


def _causal(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """q [count * q_len, H, D], k, v [count * q_len, Hk, D] of sequences without history: the cache need not be read."""
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _read(flat: Tensor, page_size: int, keys: _Keys) -> Tensor:
    """[slots, Hk, D] -> [B, Hk, K, D]."""
    if keys.view is not None:
        return flat[keys.view[0] : keys.view[1]].unsqueeze(0).transpose(1, 2)
    assert keys.pages is not None
    _, kv_heads, dim = flat.shape
    # whole pages: a slot is too short a copy
    gathered = flat.view(-1, page_size * kv_heads * dim).index_select(0, keys.pages).view(-1, kv_heads * dim)
    if keys.unused is not None:
        gathered.index_fill_(0, keys.unused, 0)
    return gathered.view(keys.batch, -1, kv_heads, dim)[:, : keys.num_keys].transpose(1, 2)


def _make_plan(batch: AttentionBatch, page_size: int, q: Tensor) -> _Plan:
    groups = _similar(batch.kv_lens_cpu[: batch.num_decode])
    plan = _Plan()
    for members in groups:
        rows = None if len(groups) == 1 else torch.tensor(members, device=q.device)
        plan.decode.append(_Decode(rows, _decode_keys(batch, members, rows, page_size, q)))
    first = batch.num_decode
    for i in range(batch.num_decode, len(batch.q_lens_cpu)):
        q_len, kv_len = batch.q_lens_cpu[i], batch.kv_lens_cpu[i]
        keys = None if q_len == kv_len else _chunk_keys(batch, i, page_size, q)
        last = plan.prefill[-1] if plan.prefill else None
        if last is not None and last.keys is keys is None and last.end - last.first == last.count * q_len:
            last.end, last.count = first + q_len, last.count + 1
        else:
            plan.prefill.append(_Prefill(first, first + q_len, keys))
        first += q_len
    return plan


def _similar(kv_lens: Sequence[int]) -> list[list[int]]:
    """Indices in groups of similar length, so that one long sequence does not pad all others to its length."""
    if not kv_lens:
        return []
    longest = max(kv_lens)
    if longest <= max(2 * min(kv_lens), _SHORT):
        return [list(range(len(kv_lens)))]
    groups: list[list[int]] = []
    for i in sorted(range(len(kv_lens)), key=lambda i: -kv_lens[i]):
        if not groups or longest > max(2 * kv_lens[i], _SHORT):
            groups.append([])
            longest = kv_lens[i]
        groups[-1].append(i)
    return groups


def _decode_keys(
    batch: AttentionBatch, members: Sequence[int], rows: Tensor | None, page_size: int, q: Tensor
) -> _Keys:
    """members: indices of the sequences; rows: the same on the device, None for the first len(members)."""
    if len(members) == 1:
        return _keys_of_one(batch, members[0], page_size, None)
    lengths = [batch.kv_lens_cpu[i] for i in members]
    num_keys = max(lengths)
    num_pages = -(-num_keys // page_size)
    if rows is None:
        table, kv_lens = batch.page_table[: len(members), :num_pages], batch.kv_lens[: len(members)]
    else:
        table, kv_lens = batch.page_table[:, :num_pages].index_select(0, rows), batch.kv_lens.index_select(0, rows)
    if min(lengths) == num_keys:
        return _Keys(len(members), num_keys, pages=table.flatten().long())
    missing = torch.arange(num_pages * page_size, device=q.device) >= kv_lens.unsqueeze(1)
    table = torch.where(missing[:, ::page_size], table[:, :1], table)
    mask = torch.zeros(len(members), num_keys, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill_(missing[:, :num_keys], float("-inf"))[:, None, None, :]
    unused = torch.tensor(_unused_rows(lengths, num_pages, page_size), dtype=torch.int64, device=q.device)
    return _Keys(len(members), num_keys, mask, table.flatten().long(), unused=unused)


def _unused_rows(kv_lens: Sequence[int], num_pages: int, page_size: int) -> list[int]:
    """Rows of [B * P * page_size] gathered keys that nobody wrote: past the end in the last page, and in every page where
    that is the first one too, which then stands in the padding."""
    unused: list[int] = []
    for i, kv_len in enumerate(kv_lens):
        base = i * num_pages * page_size
        end = num_pages * page_size if kv_len < page_size else -(-kv_len // page_size) * page_size
        unused += range(base + kv_len, base + end)
    return unused


def _chunk_keys(batch: AttentionBatch, index: int, page_size: int, q: Tensor) -> _Keys:
    """Row r of the chunk sees keys 0 .. kv_len - q_len + r."""
    q_len, kv_len = batch.q_lens_cpu[index], batch.kv_lens_cpu[index]
    mask = torch.full((q_len, kv_len), float("-inf"), dtype=q.dtype, device=q.device).triu_(kv_len - q_len + 1)
    return _keys_of_one(batch, index, page_size, mask)


def _keys_of_one(batch: AttentionBatch, index: int, page_size: int, mask: Tensor | None) -> _Keys:
    """Keys of one sequence: a view where its pages follow each other (looked for where the table is on the host)."""
    kv_len = batch.kv_lens_cpu[index]
    pages = batch.page_table[index, : -(-kv_len // page_size)]
    if pages.device.type == "cpu":
        numbers = pages.tolist()
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            first = numbers[0] * page_size
            return _Keys(1, kv_len, mask, view=(first, first + kv_len))
    return _Keys(1, kv_len, mask, pages.long())
