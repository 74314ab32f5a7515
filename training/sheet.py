"""Saves a contact sheet of rendered training pictures with a question each: `python sheet.py out.png`."""

from __future__ import annotations

import sys
from random import Random

import data
import dialogue
import numpy as np
import render
import talk
import torch
from PIL import Image, ImageDraw
from world import Picture, scene, text_picture


def draw_batch(renderer: render.Renderer, pics: list[Picture], advance: list[list[float]]) -> np.ndarray:
    """Pictures of one size as uint8 [b, h, w, 3]."""
    p = data.to_device(data.pack(pics, advance), renderer.shapes.device)
    assert isinstance(p, dict)
    img = renderer.draw([(p[f"layer{i}"], p[f"owner{i}"]) for i in range(3)], p["ground"], *p["size"])
    return (img * 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def main(path: str, seed: int = 5) -> None:
    torch.set_num_threads(1)
    folder = render.font_folder()
    advance, rng = render.advances(folder), Random(seed)
    renderer = render.Renderer(folder, "cuda" if torch.cuda.is_available() else "cpu")
    sheet = Image.new("RGB", (5 * 340, 5 * 250), "white")
    pen = ImageDraw.Draw(sheet)
    for i in range(25):
        h, w = rng.choice(data.BUCKETS)
        pic = scene(rng, h, w) if i % 2 else text_picture(rng, h, w, advance)
        x, y = i % 5 * 340, i // 5 * 250
        sheet.paste(Image.fromarray(draw_batch(renderer, [pic], advance)[0]), (x, y))
        lines = [m.text for m in talk.single(pic, rng)][-4:]
        pen.multiline_text(
            (x, y + 195),
            "\n".join(t[:56] for t in [dialogue.describe(pic).sentence, *lines]),
            fill="black",
            font_size=10,
        )
    sheet.save(path)


if __name__ == "__main__":
    main(sys.argv[1])
