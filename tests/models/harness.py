"""Drives a model and an attention backend without an engine: scattered pages, chunks, several sequences at once."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sightline.attention.backend import AttentionBackend, AttentionBatch, ForwardContext, KVCache
from sightline.attention.torch_sdpa import TorchSDPABackend
from sightline.models.loader import architecture, build_model, fill_model, read_config
from sightline.prompt.processor import MindsCompany, PixelLimits, Processor, render
from sightline.registry import FAMILIES

PAGE_SIZE = 16


def load(model_dir: Path, load_format: str = "auto", on_progress: Any = None, **options: Any) -> Any:
    """Our model of the folder: float32 on the CPU unless said otherwise."""
    model = build_model(model_dir, architecture(read_config(model_dir)), **options)
    fill_model(model, model_dir, load_format=load_format, on_progress=on_progress)
    return model


def processor(model_dir: Path) -> Processor:
    """The processor of the folder's family."""
    module, _, name = str(FAMILIES[architecture(read_config(model_dir))].processor).partition(":")
    found: Processor = getattr(importlib.import_module(module), name)(model_dir)
    return found


def make_batch(
    q_lens: Sequence[int], kv_lens: Sequence[int], pages: Sequence[Sequence[int]], device: str = "cpu"
) -> AttentionBatch:
    """The layout of one step; pages[i] are sequence i's pages, at least as many as it needs."""
    table = np.zeros((len(pages), max(-(-n // PAGE_SIZE) for n in kv_lens)), dtype=np.int32)
    slots: list[int] = []
    for i, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        used = -(-kv_len // PAGE_SIZE)
        table[i, :used] = pages[i][:used]
        slots += [pages[i][p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(kv_len - q_len, kv_len)]
    num_decode = next((i for i, q_len in enumerate(q_lens) if q_len > 1), len(q_lens))
    return AttentionBatch(
        cu_seqlens_q=torch.tensor(np.cumsum([0, *q_lens]), dtype=torch.int32, device=device),
        kv_lens=torch.tensor(list(kv_lens), dtype=torch.int32, device=device),
        page_table=torch.tensor(table, device=device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        q_lens_cpu=list(q_lens),
        kv_lens_cpu=list(kv_lens),
        num_decode=num_decode,
    )


@dataclass
class Sequence_:
    """One prompt and how far it is."""

    ids: list[int]
    positions: np.ndarray
    delta: int
    features: list[Tensor]
    image_token_id: int
    pages: list[int] = field(default_factory=list)
    done: int = 0

    def rows(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """ids and positions [3, n] of tokens start..end."""
        known = self.positions.shape[1]
        tail = np.arange(max(start, known), max(end, known)) + self.delta
        positions = np.concatenate([self.positions[:, start:end], np.broadcast_to(tail, (3, len(tail)))], axis=1)
        return np.asarray(self.ids[start:end]), positions

    def picture_rows(self, start: int, end: int) -> tuple[list[int], Tensor]:
        """Rows of the chunk that are placeholders, and their features."""
        where = [i for i, token in enumerate(self.ids) if token == self.image_token_id]
        chosen = [n for n, i in enumerate(where) if start <= i < end]
        return [where[n] - start for n in chosen], torch.cat(self.features)[chosen]


class Harness:
    """A page pool handed out at random, NaN in every page that nobody owns."""

    def __init__(
        self,
        model: Any,
        *,
        num_pages: int = 256,
        backend: AttentionBackend | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.model = model
        self.device = device
        self.backend = backend or TorchSDPABackend()
        spec = model.kv_spec
        self.cache = KVCache.allocate(
            num_layers=spec.num_layers,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=next(model.parameters()).dtype,
            device=torch.device(device),
        )
        for tensor in (*self.cache.k, *self.cache.v):
            tensor.fill_(float("nan"))
        self.free = list(np.random.default_rng(seed).permutation(np.arange(1, num_pages)))

    @torch.inference_mode()
    def sequence(self, model_dir: Path, ids: Sequence[int], pictures: Sequence[Image.Image] = ()) -> Sequence_:
        """ids with one placeholder for each picture; the family's processor expands them, resizes and counts positions."""
        family = processor(model_dir) if FAMILIES[architecture(read_config(model_dir))].processor else None
        if family is None:
            assert not pictures
            return Sequence_(list(ids), np.broadcast_to(np.arange(len(ids)), (3, len(ids))), 0, [], -1)
        limits = PixelLimits()
        if isinstance(family, MindsCompany):
            limits = family.limits_among(limits, len(pictures))
        plans = [family.plan(*picture.size, limits) for picture in pictures]
        pixels = [
            render(picture, family.views(picture.size, plan)) for picture, plan in zip(pictures, plans, strict=True)
        ]
        features = self.model.encode_images(
            [torch.tensor(array, device=self.device) for array in pixels], [plan.grid for plan in plans]
        )
        prompt = family.expand(list(ids), plans, [b""] * len(plans))
        positions = prompt.positions
        if positions is None:
            positions = np.broadcast_to(np.arange(len(prompt.input_ids)), (3, len(prompt.input_ids)))
        return Sequence_(prompt.input_ids.tolist(), positions, prompt.position_delta, features, family.image_token_id)

    @torch.inference_mode()
    def step(self, work: Sequence[tuple[Sequence_, int]], wanted: Tensor | None = None) -> list[Tensor]:
        """Advance each sequence by so many tokens (q_len 1 first). Returns log-probabilities [q_len, vocab] of each, or
        one [S, vocab] of the packed rows `wanted`."""
        ids, positions, rows, features = [], [], [], []
        base = 0
        for seq, q_len in work:
            end = seq.done + q_len
            while len(seq.pages) * PAGE_SIZE < end:
                seq.pages.append(int(self.free.pop()))
            chunk_ids, chunk_positions = seq.rows(seq.done, end)
            ids.append(chunk_ids)
            positions.append(chunk_positions)
            if seq.features:
                where, values = seq.picture_rows(seq.done, end)
                rows += [base + i for i in where]
                features.append(values)
            seq.done = end
            base += q_len
        q_lens = [q_len for _, q_len in work]
        batch = make_batch(q_lens, [seq.done for seq, _ in work], [seq.pages for seq, _ in work], self.device)
        self.backend.prepare(batch)
        hidden = self.model.embed(
            torch.from_numpy(np.concatenate(ids)).long().to(self.device),
            torch.tensor(rows, device=self.device) if rows else None,
            torch.cat(features) if rows else None,
        )
        packed = torch.from_numpy(np.concatenate(positions, axis=1)).to(self.device)
        packed = packed if self.model.uses_mrope else packed[0]
        hidden = self.model(hidden, packed, ForwardContext(self.backend, self.cache, batch), wanted)
        logprobs = torch.log_softmax(self.model.logits(hidden), dim=-1)
        return list(logprobs.split(q_lens)) if wanted is None else [logprobs]

    def logprobs(self, seq: Sequence_, chunk: int | None = None) -> Tensor:
        """Run a whole prompt, in chunks; float32 [L, vocab]."""
        parts = []
        while seq.done < len(seq.ids):
            parts += self.step([(seq, min(chunk or len(seq.ids), len(seq.ids) - seq.done))])
        return torch.cat(parts)

    def greedy(self, seq: Sequence_, max_new_tokens: int) -> list[int]:
        """Greedy continuation of a prompt that has not run yet."""
        last = self.logprobs(seq)[-1]
        new: list[int] = []
        while True:
            new.append(int(last.argmax()))
            if len(new) == max_new_tokens:
                return new
            seq.ids.append(new[-1])
            last = self.step([(seq, 1)])[0][-1]
