"""Trains sightline-tiny: `python training/train.py --out DIR --minutes 19`.

Where a machine limits the length of a command, call it again with the same `--out`: `--stop-after SECONDS` ends a call
early and writes a checkpoint from which the next call goes on. The learning rate follows the sum of training seconds.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import render
import tokenizer as tok
import torch
import torch.nn.functional as F
from data import TASKS, Sizes, Stream
from model import Config, Model, export, imported
from tokenizers import Tokenizer
from torch import Tensor

EMA = 0.998


def prepare(out: Path, init: Path | None = None) -> tuple[Config, dict[str, int], Path]:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tokenizer.json"
    if not path.exists():
        tok.save(Tokenizer.from_file(str(init / "tokenizer.json")) if init else tok.build(), out)
    t = Tokenizer.from_file(str(path))
    ids = {s: t.token_to_id(s) for s in tok.SPECIAL}
    return Config(vocab_size=-(-t.get_vocab_size() // 16) * 16, image_token_id=ids["<|image_pad|>"]), ids, path


def pictures(renderer: render.Renderer, batch: dict) -> list[Tensor]:
    return [
        renderer.draw([(p[f"layer{i}"], p[f"owner{i}"]) for i in range(3)], p["ground"], *p["size"])
        for p in batch["pictures"]
    ]


def loss_of(logits: Tensor, target: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over answer tokens and which tokens are right; task is -1 outside of answers."""
    nll = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    return (nll * (task >= 0)).sum(), logits.argmax(-1) == target


def forward(
    model: Model, batch: dict, images: list[Tensor], device: torch.device, loss_fn=loss_of
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss over answer tokens, right [b, n - 1] and task [b, n - 1]."""
    ids, task = batch["ids"].long(), batch["tasks"].long()[:, 1:]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.hidden(ids[:, :-1], images)
        total, right = loss_fn(model.logits(hidden), ids[:, 1:], task)
    return total / (task >= 0).sum().clamp(min=1), right, task


def score(
    model: Model, items: list[list[dict]], renderer: render.Renderer, device: torch.device
) -> dict[str, tuple[float, int]]:
    """Share of whole answers right per task. All tokens right under teacher forcing is what greedy decoding yields.

    Gradients stay on, unused, so that the graphs compiled for training serve here too.
    """
    good, total = torch.zeros(len(TASKS)), torch.zeros(len(TASKS))
    for item in items:
        for batch in item:
            _, right, task = forward(model, batch, pictures(renderer, batch), device)
            answer = task >= 0
            begins = answer & ~F.pad(answer, (1, 0))[:, :-1]
            number = begins.flatten().long().cumsum(0).view(task.shape) - 1
            n = int(begins.sum())
            wrong = torch.zeros(n, device=device).index_add_(0, number[answer], (~right[answer]).float())
            kind = task[begins].cpu()
            good += torch.bincount(kind[wrong.cpu() == 0], minlength=len(TASKS))
            total += torch.bincount(kind, minlength=len(TASKS))
    return {t: (float(g / n), int(n)) for t, g, n in zip(TASKS, good, total) if n}


def compile_parts(model: Model) -> None:
    """Compiles each block rather than the model: one small graph per shape, shared by all blocks of a kind."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024
    for block in [*model.visual.blocks, *model.model.layers]:
        block.compile(dynamic=False)


def save(
    path: Path, model: Model, ema: list[Tensor], optimizer: torch.optim.Optimizer, progress: dict[str, float]
) -> None:
    torch.save(
        {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), "progress": progress}, path
    )


def write(folder: Path, model: Model, ema: list[Tensor], config: Config, ids: dict[str, int]) -> None:
    names = [n for n, _ in model.named_parameters()]
    export(dict(zip(names, ema)), config, ids, folder)


def train(args: argparse.Namespace) -> None:
    began = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    config, ids, tokenizer_path = prepare(args.out, args.init)
    fonts = render.font_folder(args.fonts)
    checkpoint = args.out / "checkpoint.pt"
    state = torch.load(checkpoint, map_location=device, weights_only=True) if checkpoint.exists() else None
    progress = state["progress"] if state else {"seconds": 0.0, "steps": 0, "dialogues": 0, "calls": 0}
    progress["calls"] += 1
    sizes = Sizes(*args.sizes)
    stream = Stream(
        tokenizer_path, fonts, sizes, args.seed * 100 + int(progress["calls"]), args.mix, args.workers, device
    )
    renderer, model = render.Renderer(fonts, device), Model(config).to(device)
    params = list(model.parameters())
    decay = [p for p in params if p.dim() > 1]
    groups = [
        {"params": decay, "weight_decay": 0.05},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.peak, betas=(0.9, 0.98), fused=device.type == "cuda")
    ema = [p.detach().clone() for p in params]
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema = [e.detach() for e in state["ema"]]
    elif args.init:
        model.load_state_dict(imported(args.init))
        ema = [p.detach().clone() for p in params]
    loss_fn = loss_of
    if device.type == "cuda":
        compile_parts(model)
        loss_fn = torch.compile(loss_of, dynamic=False)
    print(
        f"{sum(p.numel() for p in params) / 1e6:.2f} M parameters, vocabulary {config.vocab_size}, {device}", flush=True
    )
    held_out = [next(stream) for _ in range(args.eval_items)]
    budget, before = args.minutes * 60, progress["seconds"]
    steps, dialogues = int(progress["steps"]), int(progress["dialogues"])
    shown, scored = time.time(), time.time()
    print(f"first data after {time.time() - began:.0f} s", flush=True)
    waited = 0.0
    while True:
        seconds = before + time.time() - began
        if seconds >= budget or time.time() - began >= args.stop_after:
            break
        rate = (
            args.peak
            * min(1, (steps + 1) / args.warm)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, seconds / budget))))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        t = time.time()
        item = next(stream)
        waited += time.time() - t
        losses = []
        for batch, weight in zip(item, args.weights):
            loss, _, _ = forward(model, batch, pictures(renderer, batch), device, loss_fn)
            (loss * weight).backward()
            losses.append(loss.detach())
            dialogues += len(batch["ids"])
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - min(EMA, steps / (steps + 10)))
        if time.time() - shown > args.every or steps in (1, 10, 50):
            values = " ".join(f"{v:.3f}" for v in torch.stack(losses).tolist())
            now = time.time()
            print(f"{seconds:5.0f}s step {steps} {dialogues / 1e6:.2f}M lr {rate:.1e} loss {values} waited {waited:.1f}s"
                  f" {torch.cuda.max_memory_allocated() / 2**30 if device.type == 'cuda' else 0:.0f}GiB", flush=True)  # fmt: skip
            shown, waited = now, 0.0
        if time.time() - scored > args.score_every:
            report(score(model, held_out[:1], renderer, device))
            scored = time.time()
    progress |= {"seconds": before + time.time() - began, "steps": steps, "dialogues": dialogues}
    save(checkpoint, model, ema, optimizer, progress)
    write(args.out, model, ema, config, ids)
    raw = score(model, held_out, renderer, device)
    with torch.no_grad():
        torch._foreach_copy_(params, ema)
    report(raw, "last weights ")
    report(score(model, held_out, renderer, device), "averaged weights ")
    print(f"done: {progress}, this call {time.time() - began:.0f} s", flush=True)


def report(scores: dict[str, tuple[float, int]], title: str = "") -> None:
    print(title + " ".join(f"{t} {100 * s:.1f}" for t, (s, _) in scores.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model folder, also holds the checkpoint")
    parser.add_argument("--minutes", type=float, default=19.0, help="training time over all calls")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which this call ends")
    parser.add_argument(
        "--init", type=Path, help="folder of an earlier export to begin from (its tokenizer.json is used)"
    )
    parser.add_argument("--peak", type=float, default=1.2e-3, help="highest learning rate")
    parser.add_argument("--warm", type=int, default=300, help="steps of linear warm-up")
    parser.add_argument("--mix", nargs="+", default=["text", "scene", "scene", "pair"], help="batches of one step")
    parser.add_argument("--fonts", help="folder with the DejaVu faces (default: matplotlib's)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--sizes", type=int, nargs=5, default=(512, 161, 225, 256, 353), help="see data.Sizes")
    parser.add_argument(
        "--weights", type=float, nargs="+", default=(0.24, 0.28, 0.28, 0.2), help="loss weight of each batch of the mix"
    )
    parser.add_argument("--eval-items", type=int, default=4)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--score-every", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
