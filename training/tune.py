"""Third stage, on a CPU: the language half alone learns more wordings, with the vision half frozen.

    python training/tune.py --init MODEL_DIR --out DIR --minutes 15

Pictures are encoded once and asked about again and again, so a step costs only the small language model.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from random import Random

import data
import numpy as np
import render
import talk
import torch
import world
from model import Model, export, imported
from torch import Tensor
from train import loss_of, pictures, prepare

BUCKETS = ((96, 128), (128, 96), (128, 128), (64, 192))


class Bank:
    """Pictures with their features, by size; half of them are the second ones of pairs."""

    def __init__(self, model: Model, rng: Random, batches: int, size: int) -> None:
        folder = render.font_folder()
        self.advance = render.advances(folder)
        renderer = render.Renderer(folder, "cpu")
        self.groups: list[tuple[list[world.Picture], list[world.Picture], Tensor, Tensor]] = []
        for i in range(batches):
            a, b = rng.choice(BUCKETS), rng.choice(BUCKETS)
            firsts = [self.picture(rng, i, *a) for _ in range(size)]
            seconds = [data.partner(rng, p, *b, self.advance) for p in firsts]
            features = []
            for pics in (firsts, seconds):
                batch = data.to_device({"pictures": [data.pack(pics, self.advance)]}, torch.device("cpu"))
                with torch.no_grad():
                    features.append(model.visual(pictures(renderer, batch)[0]))  # type: ignore[arg-type]
            self.groups.append((firsts, seconds, *features))

    def picture(self, rng: Random, i: int, h: int, w: int) -> world.Picture:
        if i % 4 == 0:
            return world.text_picture(rng, h, w, self.advance)
        if i % 2:  # two to four different things: room for questions about places
            n = rng.choice((2, 3, 3, 4))
            return world.scene(rng, h, w, list(zip(rng.sample(world.SHAPES, n), rng.sample(tuple(world.COLORS), n))))
        return world.scene(rng, h, w)


def step_loss(model: Model, bank: Bank, maker: data.Maker, rng: Random, n: int) -> Tensor:
    """Mean loss of one batch of fresh dialogues about pictures of the bank: half singles, half pairs."""
    firsts, seconds, f, g = rng.choice(bank.groups)
    chosen = rng.sample(range(len(firsts)), n)
    two = rng.random() < 0.45
    pics = [[firsts[i] for i in chosen]] + ([[seconds[i] for i in chosen]] if two else [])
    talks = [
        talk.pair([p[k] for p in pics], rng)
        if two
        else talk.textual(rng)
        if rng.random() < 0.03
        else talk.single(pics[0][k], rng)
        for k in range(n)
    ]
    tokens = sum(p[0].h * p[0].w // 256 for p in pics)
    room = tokens + 110
    ids, tasks = np.zeros((n, room), np.int64), np.full((n, room), -1, np.int64)
    for k, messages in enumerate(talks):
        a, b = maker.writer.dialogue(messages, [(p[0].h, p[0].w) for p in pics], room)
        ids[k, : len(a)], tasks[k, : len(b)] = a, b
    width = int((tasks >= 0).any(0).nonzero()[0].max()) + 1
    ids_t, task = torch.from_numpy(ids[:, :width]), torch.from_numpy(tasks[:, 1:width])
    features = torch.cat([x[chosen] for _, x in zip(pics, (f, g))], 1)
    hidden = model.decode(ids_t[:, :-1], features, [(p[0].h // 16, p[0].w // 16) for p in pics])
    total, _ = loss_of(model.logits(hidden), ids_t[:, 1:], task)
    return total / (task >= 0).sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--peak", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--bank", type=int, default=64, help="batches of 64 encoded picture pairs")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = Random(args.seed)
    config, ids, path = prepare(args.out, args.init)
    model = Model(config)
    model.load_state_dict(imported(args.init))
    began = time.time()
    bank = Bank(model, rng, args.bank, 64)
    print(f"bank after {time.time() - began:.0f} s", flush=True)
    maker = data.Maker(str(path), bank.advance, data.Sizes(), args.seed, [])
    named = {n: p for n, p in model.named_parameters() if not n.startswith("visual.")}
    params = list(named.values())
    optimizer = torch.optim.AdamW(params, lr=args.peak, betas=(0.9, 0.98), weight_decay=0.0)
    ema = [p.detach().clone() for p in params]
    began, step, recent = time.time(), 0, 0.0
    while (done := (time.time() - began) / (args.minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.peak * min(1, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        loss = step_loss(model, bank, maker, rng, args.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        recent += loss.item()
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - min(0.99, step / (step + 10)))
        if step % 50 == 0:
            print(f"{time.time() - began:.0f} s step {step} loss {recent / 50:.4f}", flush=True)
            recent = 0.0
    export(model.state_dict() | dict(zip(named, ema)), config, ids, args.out)


if __name__ == "__main__":
    main()
