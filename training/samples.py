"""Draws the six bundled sample pictures and writes golden.json: `python training/samples.py`.

Every golden answer is written here by hand as the truth, and the file is only written if the model gives exactly these
answers greedily (asked through transformers on a CPU, or through a server with --base-url).
"""

from __future__ import annotations

import argparse
import base64
import json
import math
from pathlib import Path
from random import Random

import evaluate
import render
import world
from world import Background, Obj, Picture, Text

DEMO = Path(__file__).parent.parent / "src" / "sightline" / "demo"


def rgb(value: str) -> world.RGB:
    r, g, b = (int(value[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return r, g, b


def obj(shape: str, color: str, size: str, x: float, y: float, radius: float, value: str, angle: float = 0.0) -> Obj:
    return Obj(shape, color, size, x, y, radius, angle, rgb(value))


def line(string: str, kind: str, font: str, px: float, w: int, h: int, value: str, advance: list[list[float]]) -> Text:
    """One line in the middle of a picture."""
    index = world.FONTS.index(f"DejaVu{font}.ttf")
    width = sum(advance[index][world.CHARS.index(c)] for c in string) * px
    return Text(string, kind, index, px, (w - width) / 2, (h - 1.17 * px) / 2, width, 0.0, rgb(value), "")


def ground(kind: int, c1: str, c2: str = "", angle: float = math.pi / 2, period: float = 24.0) -> Background:
    return Background(kind, rgb(c1), rgb(c2 or c1), angle, period, None)


def pictures(advance: list[list[float]]) -> dict[str, Picture]:
    stars = [(60, 56), (150, 84), (252, 52), (92, 172), (206, 178)]
    return {
        "shapes.png": Picture(240, 320, [
            obj("circle", "red", "large", 66, 120, 46, "e02424"),
            obj("square", "blue", "medium", 164, 122, 40, "2350d8"),
            obj("triangle", "green", "large", 262, 118, 46, "1e9e4a"),
        ], [], ground(0, "ffffff")),
        "counting.png": Picture(240, 320, [
            *(obj("star", "yellow", "small", x, y, 24, "ffd83a", 0.1 * (i - 2)) for i, (x, y) in enumerate(stars)),
            obj("moon", "white", "medium", 282, 150, 27, "f6f6f2"),
        ], [], ground(1, "0b1030", "1c2350")),
        "positions.png": Picture(256, 256, [
            obj("heart", "pink", "medium", 50, 52, 34, "ff69b4"),
            obj("diamond", "purple", "medium", 206, 206, 36, "6d28b8"),
        ], [], ground(1, "f3efe4", "dfe9ef")),
        "word.png": Picture(128, 256, [], [line("Hello", "word", "Serif-Bold", 46, 256, 128, "1d3a8a", advance)], ground(1, "fdf6e3", "f3e2c0")),
        "number.png": Picture(128, 256, [], [line("2026", "number", "Sans-Bold", 46, 256, 128, "ffffff", advance)], ground(0, "1c7c54")),
        "photo.jpg": Picture(480, 640, [
            obj("circle", "orange", "large", 150, 170, 96, "f58a1f"),
            obj("cross", "gray", "medium", 330, 330, 72, "6e7073", 0.12),
            obj("star", "red", "large", 505, 165, 100, "d21f2c", -0.1),
        ], [], ground(3, "dfeee0", "b9d9ea")),
    }  # fmt: skip


ORDER = "I have two very different images. They are not related at all. Please describe the first image in one sentence, and then describe the second image in another sentence."
GOLDEN: list[tuple[str, list[tuple[str, list[str]]], str]] = [
    ("scene", [("What's in this image?", ["shapes.png"])], "The image shows a red circle, a blue square and a green triangle."),
    ("counting", [("How many stars are there?", ["counting.png"])], "There are five stars."),
    ("place", [("Where is the heart?", ["positions.png"])], "The heart is in the top left corner."),
    ("yes or no", [("Is there a purple diamond in the image?", ["positions.png"])], "Yes, there is a purple diamond."),
    ("word", [("What does it say?", ["word.png"])], 'It shows the word "Hello".'),
    ("number", [("What number is shown? Answer with the number only.", ["number.png"])], "2026"),
    ("large picture", [("Describe this image.", ["photo.jpg"])], "The image shows an orange circle, a gray cross and a red star."),
    ("two pictures", [(ORDER, ["shapes.png", "word.png"])],
     'The first image shows a red circle, a blue square and a green triangle. The second image shows the word "Hello".'),
    ("which picture", [("Which image has a star?", ["word.png", "counting.png"])], "The second image has a star."),
    ("follow-up", [("What color is the circle?", ["shapes.png"]), ("The circle is red.", []), ("And the square?", [])], "The square is blue."),
    ("json", [("What is in this image? Answer in JSON.", ["positions.png"])],
     '{"objects": [{"shape": "heart", "color": "pink"}, {"shape": "diamond", "color": "purple"}]}'),
    ("no picture", [("What's in this image?", [])], "I cannot see any image. Please send me one."),
]  # fmt: skip


def messages(turns: list[tuple[str, list[str]]]) -> list[dict]:
    out: list[dict] = []
    for i, (text, names) in enumerate(turns):
        parts = [{"type": "image", "image": n} for n in names]
        out.append(
            {
                "role": ("user", "assistant")[i % 2],
                "content": [*parts, {"type": "text", "text": text}] if parts else text,
            }
        )
    return out


def with_urls(talk: list[dict], folder: Path) -> list[dict]:
    def part(p: dict) -> dict:
        if p["type"] != "image":
            return p
        data = base64.b64encode((folder / p["image"]).read_bytes()).decode()
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/{'jpeg' if p['image'].endswith('jpg') else 'png'};base64,{data}"},
        }

    return [m if isinstance(m["content"], str) else {**m, "content": [part(p) for p in m["content"]]} for m in talk]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", help="ask this server instead of transformers")
    parser.add_argument("--fonts")
    args = parser.parse_args()
    folder = DEMO / "samples"
    folder.mkdir(exist_ok=True)
    fonts = render.font_folder(args.fonts)
    rng = Random(10)
    rng.random = lambda: 0.5  # type: ignore[method-assign]  # always oversampled, never blurred
    for name, pic in pictures(render.advances(fonts)).items():
        img = evaluate.paint(pic, rng, fonts)
        img.save(folder / name, **({"quality": 90} if name.endswith("jpg") else {"optimize": True}))
    answer = (
        evaluate.by_server(args.base_url, "sightline-tiny")
        if args.base_url
        else evaluate.by_transformers(str(DEMO / "sightline-tiny"))
    )
    wrong = 0
    for name, turns, expected in GOLDEN:
        given = answer(with_urls(messages(turns), folder))
        wrong += given != expected
        print("right" if given == expected else "WRONG", name, repr(given), sep="  ")
    if wrong:
        raise SystemExit(f"{wrong} answers differ from the truth; golden.json is left as it was")
    entries = [{"name": n, "messages": messages(t), "answer": a} for n, t, a in GOLDEN]
    (DEMO / "golden.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
