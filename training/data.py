"""Worker processes that write dialogues as token ids and pictures as sprite rows.

One item is what one optimizer step sees: a few batches, each of text pictures, of scenes or of pairs. The GPU renders
the pictures from the rows, so a worker only moves small arrays.
"""

from __future__ import annotations

import multiprocessing as mp
import os
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from random import Random
from threading import Thread

import numpy as np
import render
import talk
import torch
import world
from talk import Message
from tokenizers import Tokenizer
from world import Picture

TASKS = (
    "describe", "count", "color", "shape", "size", "where", "relation", "yesno", "list", "background", "json", "read",
    "follow", "images", "chat", "no_image", "pair_describe", "pair_one", "pair_which", "pair_same", "pair_more",
    "several", "detail",
)  # fmt: skip
PATCH, MERGE = 8, 2
# height x width; buckets of equal area share one compiled vision encoder, and pairs use any two of PAIR_BUCKETS
BUCKETS = ((128, 128), (64, 256), (96, 128), (128, 96), (64, 192), (160, 160), (80, 320), (128, 176), (176, 128))
TEXT_WEIGHTS = (5, 3, 3, 1, 4, 2, 2, 3, 1)
SCENE_WEIGHTS = (6, 0.5, 3, 3, 0.7, 4, 0.5, 4, 3)
PAIR_BUCKETS = ((128, 128), (64, 256), (96, 128), (128, 96), (64, 192), (128, 176), (176, 128))
PAIR_WEIGHTS = (4, 1, 2, 2, 2, 2, 2)


@dataclass(slots=True)
class Sizes:
    """Dialogues per batch and tokens per dialogue."""

    single: int = 512
    text_len: int = 161
    scene_len: int = 225
    pair: int = 256
    pair_len: int = 353


def image_tokens(h: int, w: int) -> int:
    return h * w // (PATCH * MERGE) ** 2


class Writer:
    """Turns messages into ids and task labels the way the chat template and the server do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        special = {
            t: tokenizer.token_to_id(t)
            for t in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
        }
        self.start, self.end, self.vision_start, self.vision_end, self.pad_image = special.values()
        self.newline = self.encode("\n")
        self.heads = {r: [self.start, *self.encode(r + "\n")] for r in ("system", "user", "assistant")}

    def content(self, m: Message, sizes: list[tuple[int, int]]) -> list[int]:
        ids: list[int] = []
        for n, i in enumerate(m.images):
            label = self.encode(f"Image {n + 1}: ") if m.glue and len(m.images) > 1 and not m.images_last else []
            ids += [
                *label,
                self.vision_start,
                *[self.pad_image] * image_tokens(*sizes[i]),
                self.vision_end,
                *(self.encode(m.glue) if m.glue else []),
            ]
        text = self.encode(m.text)
        return text + ids if m.images_last else ids + text

    def dialogue(self, messages: list[Message], sizes: list[tuple[int, int]], room: int) -> tuple[list[int], list[int]]:
        """ids and, for every token of an answer and its end, the task (else -1); cut after the last turn that fits."""
        ids: list[int] = []
        tasks: list[int] = []
        kept = 0
        for m in messages:
            head, body = self.heads[m.role], self.content(m, sizes)
            if len(ids) + len(head) + len(body) + 2 > room:
                break
            task = TASKS.index(m.task) if m.role == "assistant" else -1
            ids += [*head, *body, self.end, *self.newline]
            tasks += [-1] * len(head) + [task] * (len(body) + 1) + [-1] * len(self.newline)
            kept = len(ids) if task >= 0 else kept
        return ids[:kept], tasks[:kept]


def pack(pics: list[Picture], advance: list[list[float]]) -> dict[str, np.ndarray]:
    """Rows of one batch of pictures of one size: layer0..2, owner0..2 and ground."""
    layers: list[list[list[float]]] = [[], [], []]
    owners: list[list[int]] = [[], [], []]
    grounds = []
    for n, pic in enumerate(pics):
        *parts, ground = render.rows(pic, advance)
        grounds.append(ground)
        for layer, owner, part in zip(layers, owners, parts):
            layer += part
            owner += [n] * len(part)
    out = {"ground": np.asarray(grounds, np.float32), "size": np.asarray([pics[0].h, pics[0].w])}
    for i in range(3):
        out[f"layer{i}"] = np.asarray(layers[i], np.float32).reshape(-1, render.SPRITE)
        out[f"owner{i}"] = np.asarray(owners[i], np.int64)
    return out


def partner(rng: Random, first: Picture, h: int, w: int, advance: list[list[float]]) -> Picture:
    """The second picture of a pair: unrelated, equal in content, or different in one thing."""
    pick = rng.random()
    if pick < 0.55 or (first.texts and first.objs):
        return world.scene(rng, h, w) if rng.random() < 0.55 else world.text_picture(rng, h, w, advance)
    if first.texts:
        strings = [(t.string, t.kind) for t in first.texts]
        if pick > 0.8:
            strings[0] = world.string(rng)
        return world.text_picture(rng, h, w, advance, strings)
    wanted = [(o.shape, o.color) for o in first.objs]
    if pick > 0.78:
        i = rng.randrange(len(wanted))
        shape, color = wanted[i]
        wanted[i] = (
            (rng.choice(world.SHAPES), color) if rng.random() < 0.5 else (shape, rng.choice(tuple(world.COLORS)))
        )
    return world.scene(rng, h, w, wanted)


class Maker:
    """Makes items from one seed."""

    def __init__(self, tokenizer: str, advance: list[list[float]], sizes: Sizes, seed: int, mix: list[str]) -> None:
        self.mix = mix
        self.rng, self.advance, self.sizes = Random(seed), advance, sizes
        self.writer = Writer(Tokenizer.from_file(tokenizer))

    def picture(self, kind: str, h: int, w: int) -> Picture:
        return world.scene(self.rng, h, w) if kind == "scene" else world.text_picture(self.rng, h, w, self.advance)

    def batch(self, kind: str) -> dict[str, object]:
        rng, n = self.rng, self.sizes.single
        h, w = rng.choices(BUCKETS, TEXT_WEIGHTS if kind == "text" else SCENE_WEIGHTS)[0]
        pics = [self.picture(kind, h, w) for _ in range(n)]
        talks = [talk.textual(rng) if rng.random() < 0.04 else talk.single(p, rng) for p in pics]
        return self.finish(talks, [pics], self.sizes.text_len if kind == "text" else self.sizes.scene_len)

    def pairs(self) -> dict[str, object]:
        rng, n = self.rng, self.sizes.pair
        a, b = (rng.choices(PAIR_BUCKETS, PAIR_WEIGHTS)[0] for _ in range(2))
        first = [self.picture(rng.choice(("scene", "scene", "text")), *a) for _ in range(n)]
        second = [partner(rng, p, *b, self.advance) for p in first]
        talks = [talk.pair([p, q], rng) for p, q in zip(first, second)]
        return self.finish(talks, [first, second], self.sizes.pair_len)

    def finish(self, talks: list[list[Message]], pictures: list[list[Picture]], room: int) -> dict[str, object]:
        ids = np.zeros((len(talks), room), np.int16)
        tasks = np.full((len(talks), room), -1, np.int8)
        sizes = [(p[0].h, p[0].w) for p in pictures]
        for i, messages in enumerate(talks):
            a, b = self.writer.dialogue(messages, sizes, room)
            ids[i, : len(a)], tasks[i, : len(b)] = a, b
        return {"ids": ids, "tasks": tasks, "pictures": [pack(p, self.advance) for p in pictures]}

    def item(self) -> list[dict[str, object]]:
        return [self.pairs() if kind == "pair" else self.batch(kind) for kind in self.mix]


def work(queue: mp.Queue, tokenizer: str, advance: list[list[float]], sizes: Sizes, seed: int, mix: list[str]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    maker = Maker(tokenizer, advance, sizes, seed, mix)
    while True:
        queue.put(maker.item())


def to_device(value: object, device: torch.device) -> object:
    if isinstance(value, np.ndarray):
        tensor = torch.from_numpy(value)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
    if isinstance(value, list):
        return [to_device(v, device) for v in value]
    assert isinstance(value, dict)
    return {k: tuple(v.tolist()) if k == "size" else to_device(v, device) for k, v in value.items()}


class Stream:
    """Items from `workers` processes, moved to the device by a thread."""

    def __init__(
        self, tokenizer: Path, fonts: Path, sizes: Sizes, seed: int, mix: list[str], workers: int, device: torch.device
    ) -> None:
        context = mp.get_context("spawn")
        queue = context.Queue(maxsize=max(8, workers))
        advance = render.advances(fonts)
        for i in range(workers):
            args = (queue, str(tokenizer), advance, sizes, seed * 1000 + i, mix)
            context.Process(target=work, args=args, daemon=True).start()
        self.ready: Queue = Queue(maxsize=3)
        Thread(target=self.move, args=(queue, device), daemon=True).start()

    def move(self, queue: mp.Queue, device: torch.device) -> None:
        while True:
            self.ready.put(to_device(queue.get(), device))

    def __next__(self) -> list[dict]:
        return self.ready.get()
