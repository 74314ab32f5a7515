"""Scores sightline-tiny on held-out pictures and held-out phrasings: a Markdown table, one row per gate.

    python training/evaluate.py --base-url http://127.0.0.1:30000/v1 --n 200     # any OpenAI-compatible server
    python training/evaluate.py --transformers src/sightline/demo/sightline-tiny  # the same set through transformers

Pictures are drawn by Pillow (training draws with torch), in sizes from 96 to 640 pixels a side, as PNG or JPEG bytes.
Words come from a list that training never shows. Answers are compared by the facts they state, in order: colours,
shapes, numbers, places, yes/no, quoted strings; strings exactly, letter case included. A description is right if it
names exactly the objects that are there, whatever their order.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import dialogue
import numpy as np
import phrases
import render
import talk
import world
from dialogue import Turn
from lexicon import HELD_OUT_WORDS
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from world import Picture

SIZES = (
    (128, 128),
    (96, 160),
    (160, 120),
    (160, 160),
    (200, 100),
    (256, 256),
    (320, 240),
    (512, 512),
    (640, 480),
    (480, 640),
    (640, 360),
)
MAX_PIXELS = 160 * 160
NUMBERS = {w: str(i) for i, w in enumerate(dialogue.NUMBER)}
FACTS = re.compile(
    r'"([^"]*)"|\b(' + "|".join(
        [*world.COLORS, *(s + "(?:es|s)?" for s in world.SHAPES), *(w for w in NUMBERS if w != "no"), r"\d+", "yes", "no", "both", "neither",
         "first", "second", "more", "same", "different", "left", "right", "above", "below", "top", "bottom", "center", "corner"]
    ) + r")\b", re.IGNORECASE)  # fmt: skip


@dataclass(slots=True)
class Case:
    """One conversation whose last answer counts; `right` judges it."""

    gate: str
    messages: list[dict]
    expected: str
    right: Callable[[str], bool]


def facts(text: str) -> list[str]:
    """The stated facts in order; quoted strings keep their letter case."""
    found = []
    for quoted, word in FACTS.findall(text):
        word = word.lower()
        if word:
            word = NUMBERS.get(word, word)
            word = next((s for s in world.SHAPES if word.startswith(s)), word)
        found.append(word or f'"{quoted}"')
    return found


def objects(text: str) -> Counter[tuple[str, ...]]:
    """What a description names: (count, colour, shape) groups and strings, whatever their order."""
    noun = r"\b(a|an|\w+) (?:small |medium |large )?(" + "|".join(world.COLORS) + ") (" + "|".join(world.SHAPES) + ")"
    found = Counter((NUMBERS.get(n.lower(), "1"), c, s) for n, c, s in re.findall(noun, text))
    found.update(("text", t) for t in re.findall(r'"([^"]*)"', text))
    found.update(("text", t) for t in re.findall(r"number (\d+)", text))
    return found


def paint(pic: Picture, rng: Random, folder: Path) -> Image.Image:
    """The picture by Pillow, four times oversampled, or not at all as in many people's test pictures."""
    over = 1 if rng.random() < 0.2 else 4
    bg = pic.bg
    y, x = np.mgrid[0 : pic.h, 0 : pic.w] + 0.5
    u, v = x * math.cos(bg.angle) + y * math.sin(bg.angle), y * math.cos(bg.angle) - x * math.sin(bg.angle)
    wave = np.sin(u * 2 * math.pi / bg.period / max(1, pic.w / 160))
    noise = Image.fromarray((np.random.default_rng(rng.randrange(1 << 30)).random((6, 6)) * 255).astype(np.uint8))
    soft = np.asarray(noise.resize((pic.w, pic.h), Image.Resampling.BICUBIC)) / 255.0
    t = (
        np.zeros_like(u),
        (u - u.min()) / (u.max() - u.min()),
        (wave > 0) * 1.0,
        soft,
        (wave * np.sin(v / 9) > 0) * 1.0,
    )[bg.kind]
    ground = np.asarray(bg.c1) * (1 - t[..., None]) + np.asarray(bg.c2) * t[..., None]
    img = Image.fromarray((ground * 255).round().astype(np.uint8)).resize(
        (pic.w * over, pic.h * over), Image.Resampling.NEAREST
    )
    pen = ImageDraw.Draw(img)
    for o in pic.objs:
        c, s = math.cos(o.angle), math.sin(o.angle)
        for extra, rgb in ((pic.outline, (0.05, 0.05, 0.05)), (0.0, o.rgb)):
            if extra or rgb is o.rgb:
                r = o.radius + extra
                points = [
                    ((o.x + r * (c * px - s * py)) * over, (o.y + r * (s * px + c * py)) * over)
                    for px, py in render.outline(o.shape)
                ]
                pen.polygon(points, fill=tuple(round(k * 255) for k in rgb))
    img = img.resize((pic.w, pic.h), Image.Resampling.BOX)
    for line in pic.texts:
        mask = Image.new("L", img.size)
        font = ImageFont.truetype(str(folder / world.FONTS[line.font]), line.px)
        ImageDraw.Draw(mask).text((line.x, line.y), line.string, font=font, fill=255)
        if line.angle:
            centre = (line.x + line.w / 2, line.y + 0.585 * line.px)
            mask = mask.rotate(-math.degrees(line.angle), Image.Resampling.BICUBIC, center=centre)
        img.paste(tuple(round(k * 255) for k in line.rgb), mask=mask)
    return img.filter(ImageFilter.GaussianBlur(0.5)) if rng.random() < 0.1 else img


def encoded(img: Image.Image, rng: Random) -> str:
    """A data URL, PNG or JPEG."""
    buffer = io.BytesIO()
    kind = "jpeg" if rng.random() < 0.4 else "png"
    img.save(buffer, kind, **({"quality": rng.randint(60, 95)} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


class Exam:
    """Makes the cases of every gate."""

    def __init__(self, seed: int, folder: Path, held_out: bool) -> None:
        self.held_out = held_out
        self.rng, self.folder, self.advance = Random(seed), folder, render.advances(folder)

    def size(self) -> tuple[int, int]:
        w, h = self.rng.choice(SIZES)
        return h, w

    def scene(self, wanted: list[tuple[str, str]] | None = None) -> Picture:
        return world.scene(self.rng, *self.size(), wanted)

    def text(self, kind: str) -> Picture:
        """One line, at least 20 pixels high after the picture was fitted into 160 x 160 pixels."""
        rng = self.rng
        while True:
            if kind == "word":
                string = world.cased(rng, rng.choice(HELD_OUT_WORDS))
            else:
                string = str(rng.randrange(10 ** (n := rng.randint(1, 6)))).zfill(n)
            h, w = self.size()
            scale = min(1.0, math.sqrt(MAX_PIXELS / (h * w)))
            pic = world.text_picture(rng, h, w, self.advance, [(string, kind)], (20 / scale, 40 / scale))
            if pic.texts[0].px * scale >= 20 and not pic.objs:
                return pic

    def say(self, turn: Turn, pics: list[Picture]) -> dict:
        text = phrases.ask(turn.key, self.rng, held_out=self.held_out, **turn.slots)
        parts = [
            {"type": "image_url", "image_url": {"url": encoded(paint(p, self.rng, self.folder), self.rng)}}
            for p in pics
        ]
        words = {"type": "text", "text": text}
        return {"role": "user", "content": [*parts, words] if self.rng.random() < 0.7 else [words, *parts]}

    def case(self, gate: str, turn: Turn, pics: list[Picture]) -> Case:
        sentence = turn.answer.sentence
        wanted = facts(sentence)
        return Case(gate, [self.say(turn, pics)], sentence, lambda a: facts(a) == wanted)

    def pick(self, gate: str, functions: tuple, make: Callable[[], Picture]) -> Case:
        while True:
            pic = make()
            turn = self.rng.choice(functions)(pic, self.rng)
            if turn is not None:
                return self.case(gate, turn, [pic])

    def single(self) -> Case:
        functions = (dialogue.q_color, dialogue.q_shape, dialogue.q_describe)
        return self.pick("single object: shape, colour", functions, lambda: self.scene(world.kinds(self.rng, 1)))

    def count(self) -> Case:
        return self.pick("counts to six", (dialogue.q_count,), self.scene)

    def relation(self, n: int) -> Case:
        def make() -> Picture:
            colors = self.rng.sample(tuple(world.COLORS), n)
            return self.scene(list(zip(self.rng.sample(world.SHAPES, n), colors)))

        functions = (dialogue.q_relation, dialogue.q_relation, dialogue.q_next) if n == 2 else (dialogue.q_relation,)
        case = self.pick(f"relative position, {n} objects", functions, make)
        wanted = facts(case.expected)
        if wanted[0] in ("yes", "no"):
            case.right = lambda a: facts(a)[:1] == wanted[:1]
        return case

    def where(self) -> Case:
        return self.pick("place in the picture", (dialogue.q_where,), self.scene)

    def yesno(self) -> Case:
        case = self.pick("yes/no", (dialogue.q_yesno,), self.scene)
        wanted = facts(case.expected)[:1]
        case.right = lambda a: facts(a)[:1] == wanted
        return case

    def read(self, kind: str) -> Case:
        pic = self.text(kind)
        string = pic.texts[0].string
        turn = Turn("read", self.rng.choice(("read", "read", "read_bare")), {}, dialogue.Answer(string))
        gate = "words of 3 to 8 letters" if kind == "word" else "numbers of 1 to 6 digits"

        def right(answer: str) -> bool:
            if kind == "word":
                return (re.findall(r'"([^"]*)"', answer) or [answer.strip()]) == [string]
            return (re.findall(r"\d+", answer)) == [string]

        return Case(gate, [self.say(turn, [pic])], string, right)

    def describe(self) -> Case:
        pic = self.scene()
        turn = Turn("describe", "describe", {}, dialogue.describe(pic))
        wanted = objects(turn.answer.sentence)
        return Case("scene description", [self.say(turn, [pic])], turn.answer.sentence, lambda a: objects(a) == wanted)

    def pair(self) -> Case:
        from data import partner

        rng = self.rng
        while True:
            first = self.scene() if rng.random() < 0.7 else self.text(rng.choice(("word", "number")))
            second = partner(rng, first, *self.size(), self.advance) if rng.random() < 0.5 else self.scene()
            if any(t.px * min(1, math.sqrt(MAX_PIXELS / (second.h * second.w))) < 20 for t in second.texts):
                continue
            turn = talk.brief_pair([first, second], rng)
            if turn is None or turn.task == "images":
                continue
            case = self.case("two pictures", turn, [first, second])
            if turn.task in ("pair_describe", "pair_one"):
                halves = [objects(p) for p in turn.answer.sentence.split("The second image")]
                if turn.key in ("pair_describe", "pair_one"):
                    case.right = lambda a, halves=halves: [objects(p) for p in a.split("The second image")] == halves
            return case

    def json(self) -> Case:
        pic = self.scene()
        turn = dialogue.q_json(pic, self.rng)
        assert turn is not None
        wanted = Counter((o.shape, o.color) for o in pic.objs)

        def right(answer: str) -> bool:
            try:
                return Counter((o["shape"], o["color"]) for o in json.loads(answer)["objects"]) == wanted
            except (ValueError, KeyError, TypeError):
                return False

        return Case("JSON of the objects", [self.say(turn, [pic])], turn.answer.sentence, right)

    def follow(self) -> Case:
        while True:
            pic = self.scene()
            first = self.rng.choice((dialogue.q_color, dialogue.q_where, dialogue.q_size))(pic, self.rng)
            turn = first and dialogue.follow(first, pic, self.rng)
            if not first or not turn:
                continue
            messages = [
                self.say(first, [pic]),
                {"role": "assistant", "content": first.answer.sentence},
                self.say(turn, []),
            ]
            messages[2]["content"] = messages[2]["content"][0]["text"]
            sentence = turn.answer.sentence
            return Case(
                "follow-up question",
                messages,
                sentence,
                lambda a, value=sentence.split(" is ")[-1]: a.split(" is ")[-1] == value,
            )

    def no_image(self) -> Case:
        text = phrases.ask(self.rng.choice(("describe", "read", "json")), self.rng, held_out=self.held_out)
        expected = talk.NO_IMAGE
        return Case("no picture given", [{"role": "user", "content": text}], expected, lambda a: a == expected)


GATES: dict[str, tuple[Callable[[Exam], Case], str]] = {
    "single": (Exam.single, "98"),
    "count": (Exam.count, "95"),
    "relation2": (lambda e: e.relation(2), "95"),
    "relation3": (lambda e: e.relation(3), "95"),
    "where": (Exam.where, "95"),
    "yesno": (Exam.yesno, "95"),
    "words": (lambda e: e.read("word"), "95"),
    "numbers": (lambda e: e.read("number"), "97"),
    "describe": (Exam.describe, "90"),
    "pair": (Exam.pair, "90"),
    "json": (Exam.json, "-"),
    "follow": (Exam.follow, "-"),
    "no_image": (Exam.no_image, "-"),
}


def by_server(base_url: str, model: str) -> Callable[[list[dict]], str]:
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key="none", timeout=120)

    def answer(messages: list[dict]) -> str:
        reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=200)  # type: ignore[arg-type]
        return reply.choices[0].message.content or ""

    return answer


def by_transformers(folder: str) -> Callable[[list[dict]], str]:
    """float32 on a CPU; the processor is put together by hand since the video half of the real one needs torchvision."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    torch.set_num_threads(1)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessor.from_pretrained(folder)
    pad = model.config.image_token_id

    def answer(messages: list[dict]) -> str:
        parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
        urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
        images = [Image.open(io.BytesIO(base64.b64decode(u.split(",", 1)[1]))).convert("RGB") for u in urls]
        pixels = processor(images=images, return_tensors="pt") if images else {}
        counts = iter(pixels["image_grid_thw"].prod(-1) // 4) if images else iter(())
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        full = torch.tensor([[i for t in ids for i in ([t] * int(next(counts)) if t == pad else [t])]])
        kinds = (full == pad).int()
        with torch.inference_mode():
            out = model.generate(input_ids=full, attention_mask=torch.ones_like(full), mm_token_type_ids=kinds, **pixels, max_new_tokens=200, do_sample=False)  # fmt: skip
        return tokenizer.decode(out[0, full.shape[1] :], skip_special_tokens=True)

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--model", default="sightline-tiny")
    parser.add_argument("--transformers", metavar="DIR", help="score this folder with transformers instead of a server")
    parser.add_argument("--n", type=int, default=200, help="cases per gate")
    parser.add_argument(
        "--phrasing", choices=("held-out", "training"), default="held-out", help="whose wordings to ask with"
    )
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--only", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--fonts")
    parser.add_argument("--parallel", type=int, default=4, help="requests at a time (server only)")
    parser.add_argument("--show", type=int, default=2, help="wrong answers to print per gate")
    args = parser.parse_args()
    answer = by_transformers(args.transformers) if args.transformers else by_server(args.base_url, args.model)
    pool = ThreadPoolExecutor(1 if args.transformers else args.parallel)
    print("| gate | wanted | right | cases |\n|---|---|---|---|", flush=True)
    began, wrong = time.time(), []
    for gate in args.only:
        make, goal = GATES[gate]
        exam = Exam(args.seed, render.font_folder(args.fonts), args.phrasing == "held-out")
        cases = [make(exam) for _ in range(args.n)]
        answers = list(pool.map(lambda c: answer(c.messages), cases))
        marks = [c.right(a) for c, a in zip(cases, answers)]
        print(f"| {cases[0].gate} | {goal} | **{100 * sum(marks) / len(marks):.1f} %** | {len(cases)} |", flush=True)
        wrong += [f"{gate}: wanted {c.expected!r}, got {a!r}" for c, a, m in zip(cases, answers, marks) if not m][
            : args.show
        ]
    print(f"\n{time.time() - began:.0f} s", *wrong, sep="\n")


if __name__ == "__main__":
    main()
