"""Whole dialogues: questions about two pictures, and what user, system and assistant say in turn.

`single` and `pair` write dialogues about one and two pictures, `textual` those without any.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from dialogue import (
    ORDINAL,
    Answer,
    Turn,
    article,
    as_json,
    contents,
    describe,
    follow,
    inventory,
    join,
    plural,
    q_color,
    q_count,
    question,
    quoted,
)
from phrases import ask, noisy
from world import COLORS, SHAPES, Picture, string

WHO = "I am sightline-tiny, a very small demonstration model. I can describe images with simple shapes and short text."
HELLO = "Hello! Send me an image with shapes or text and ask me about it."
NO_IMAGE = "I cannot see any image. Please send me one."
SORRY = (
    "I am only a tiny demonstration model. I can only answer questions about images with simple shapes and short text."
)
THANKS = "You are welcome!"
BRIEF = (
    " Answer in one word.",
    " Answer briefly.",
    " One word only.",
    " Just one word.",
    " Be brief.",
    " Reply with one word.",
)
AS_JSON = (
    " Answer in JSON.",
    " Reply in JSON.",
    " Answer as JSON.",
    " Respond with JSON only.",
    " Use JSON.",
    " Return JSON.",
)
SYSTEMS = {
    "sentence": (
        "You are a helpful assistant.",
        "You are a helpful assistant.",
        "You are a friendly assistant.",
        "Answer the questions about the image.",
        "Answer in full sentences.",
        "You are an assistant that looks at images and tells the truth.",
        "You are a helpful language and vision assistant.",
        "Be polite and precise.",
    ),
    "brief": (
        "Answer briefly.",
        "Answer in one word.",
        "Be brief.",
        "Answer with as few words as possible.",
        "Give short answers.",
    ),
    "json": ("Answer in JSON.", "Always answer in JSON.", "You only speak JSON.", "Reply with JSON only."),
}


@dataclass(slots=True)
class Message:
    """`text` before `images` (indices into the dialogue's pictures) if `images_last`; answers carry their task."""

    role: str
    text: str
    images: tuple[int, ...] = ()
    images_last: bool = False
    task: str = ""
    glue: str = ""


def brief_pair(pics: list[Picture], rng: Random) -> Turn | None:
    """A question about two pictures."""
    pick = rng.random()
    parts = [join(inventory(p)) for p in pics]
    if pick < 0.36:
        text = f"The first image shows {parts[0]}. The second image shows {parts[1]}."
        return Turn("pair_describe", "pair_describe", {}, Answer(text))
    i = rng.randrange(2)
    if pick < 0.5:
        return Turn(
            "pair_one",
            "pair_one",
            {"o": ORDINAL[i]},
            Answer(f"The {ORDINAL[i]} image shows {parts[i]}.", None, as_json(pics[i])),
        )
    if pick < 0.66:
        return pair_which(pics, rng)
    if pick < 0.8:
        same = contents(pics[0]) == contents(pics[1])
        return Turn("pair_same", "pair_same", {}, Answer(
            "Yes, both images show the same objects." if same else "No, the images are different.", None
        ))  # fmt: skip
    if pick < 0.87:
        n, m = (len(p.objs) for p in pics)
        if not n and not m:
            return None
        text = (
            f"The {ORDINAL[n < m]} image has more objects."
            if n != m
            else "Both images have the same number of objects."
        )
        return Turn("pair_more", "pair_more", {}, Answer(text, ORDINAL[n < m] if n != m else None))
    if pick < 0.9:
        return Turn("images", "images", {}, Answer("There are two images.", "2", json.dumps({"count": 2})))
    if not pics[i].objs:
        return None
    turn = rng.choice((q_count, q_color))(pics[i], rng)
    if turn is None or turn.key == "single_color":
        return None
    key = "pair_count" if turn.key == "count" else "pair_color"
    return turn._replace(key=key, task="pair_one", slots={**turn.slots, "o": ORDINAL[i]}, topic=None)


def pair_which(pics: list[Picture], rng: Random) -> Turn | None:
    i = rng.randrange(2)
    if pics[i].texts and (not pics[i].objs or rng.random() < 0.4):
        t = pics[i].texts[0]
        other = any(u.string == t.string for u in pics[1 - i].texts)
        generic = rng.random() < 0.4 and not pics[1 - i].texts
        thing = (
            rng.choice(("text", "a word" if t.kind == "word" else "writing")) if generic else quoted(t.kind, t.string)
        )
        has = [True, True] if other else [i == 0, i == 1]
    else:
        o = rng.choice(pics[i].objs) if pics[i].objs and rng.random() < 0.9 else None
        shape, color = (o.shape, o.color) if o else (rng.choice(SHAPES), rng.choice(tuple(COLORS)))
        form = rng.randrange(3)
        thing = article((shape, f"{color} {shape}", f"{color} object")[form])
        has = [
            any((p.shape == shape or form == 2) and (p.color == color or form == 0) for p in pic.objs) for pic in pics
        ]
    if all(has):
        answer = Answer(f"Both images have {thing}.", "both")
    elif not any(has):
        answer = Answer(f"Neither image has {thing}.", "neither")
    else:
        answer = Answer(f"The {ORDINAL[has[1]]} image has {thing}.", ORDINAL[has[1]])
    return Turn("pair_which", "pair_which", {"a": thing}, answer)


def spoken(turn: Turn, style: str, rng: Random, system: bool) -> tuple[str, str]:
    """The question as the user types it and the answer in the wanted style."""
    text = noisy(ask(turn.key, rng, **turn.slots), rng)
    value = getattr(turn.answer, style)
    if style == "sentence" or value is None or turn.key in ("read_bare", "json"):
        return text, turn.answer.sentence if value is None or style == "sentence" else value
    if not system:
        suffix = rng.choice(BRIEF if style == "brief" else AS_JSON)
        if style == "brief" and turn.answer.brief in ("yes", "no") and rng.random() < 0.5:
            suffix = rng.choice((" Answer yes or no.", " Yes or no?", " Only yes or no."))
        elif style == "brief" and turn.task == "count" and rng.random() < 0.7:
            suffix = rng.choice(
                (" Answer with a number.", " Just the number.", " Only the number, please.", " Answer with one number.")
            )
        text += suffix
    return text, value


def pick_style(rng: Random, system_style: str) -> str:
    if system_style != "sentence":
        return system_style
    return rng.choices(("sentence", "brief", "json"), (80, 14, 6))[0]


def opening(rng: Random) -> tuple[list[Message], str]:
    """An optional system message and the style it asks for."""
    style = rng.choices(("sentence", "brief", "json"), (70, 18, 12))[0] if rng.random() < 0.35 else ""
    if not style:
        return [], "sentence"
    return [Message("system", rng.choice(SYSTEMS[style]))], style


def say(messages: list[Message], turn: Turn, rng: Random, system_style: str, images: tuple[int, ...] = ()) -> None:
    style = pick_style(rng, system_style)
    text, answer = spoken(turn, style, rng, system_style != "sentence")
    last = bool(images) and rng.random() < 0.3
    glue = "\n" if images and rng.random() < 0.12 else ""
    messages += [Message("user", text, images, last, glue=glue), Message("assistant", answer, task=turn.task)]


def single(pic: Picture, rng: Random, turns: int = 12) -> list[Message]:
    """A dialogue about one picture; the caller cuts it where its room ends."""
    messages, system_style = opening(rng)
    if rng.random() < 0.02:
        messages += [Message("user", noisy(ask("greet", rng), rng)), Message("assistant", HELLO, task="chat")]
    last: Turn | None = None
    asked: set[str] = set()
    for i in range(turns):
        turn = follow(last, pic, rng) if last and rng.random() < 0.3 else None
        turn = turn or question(pic, rng)
        if rng.random() < 0.01:
            turn = Turn("images", "images", {}, Answer("There is one image.", "1", json.dumps({"count": 1})))
        elif rng.random() < 0.01 and i:
            turn = Turn("chat", "thanks", {}, Answer(THANKS))
        if turn.answer.sentence in asked:
            continue
        asked.add(turn.answer.sentence)
        first = not any(m.images for m in messages)
        say(messages, turn, rng, system_style, (0,) if first else ())
        last = turn
    return messages


def pair(pics: list[Picture], rng: Random, turns: int = 6) -> list[Message]:
    """A dialogue about two pictures, sent together or one after the other."""
    messages, system_style = opening(rng)
    if rng.random() < 0.2:
        say(messages, question(pics[0], rng), rng, system_style, (0,))
        turn = question(pics[1], rng) if rng.random() < 0.5 else Turn("describe", "also_image", {}, describe(pics[1]))
        if turn.key != "also_image" and turn.task != "describe":
            turn = Turn("describe", "describe", {}, describe(pics[1]))
        say(messages, turn, rng, system_style, (1,))
    asked: set[str] = set()
    for _ in range(turns):
        turn2 = brief_pair(pics, rng)
        if turn2 is None or turn2.answer.sentence in asked:
            continue
        asked.add(turn2.answer.sentence)
        first = not any(m.images for m in messages)
        say(messages, turn2, rng, system_style, (0, 1) if first else ())
    if not any(m.images for m in messages):
        say(
            messages,
            Turn("images", "images", {}, Answer("There are two images.", "2", json.dumps({"count": 2}))),
            rng,
            system_style,
            (0, 1),
        )
    return messages


IMAGE_KEYS = (
    "describe",
    "describe",
    "count",
    "color",
    "read",
    "where",
    "exists",
    "json",
    "pair_describe",
    "background",
    "single_color",
)


def textual(rng: Random) -> list[Message]:
    """A dialogue without any picture: who are you, missing picture, things the model cannot do."""
    messages, _ = opening(rng)
    for _ in range(rng.randint(1, 3)):
        key, answer = rng.choice((
            ("greet", HELLO), ("who", WHO), ("thanks", THANKS), ("other", SORRY), ("image", NO_IMAGE), ("image", NO_IMAGE),
        ))  # fmt: skip
        task = "no_image" if key == "image" else "chat"
        if key == "image":
            key = rng.choice(IMAGE_KEYS)
        shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
        slots = {"x": plural(shape) if key == "count" else shape, "a": article(f"{color} {shape}"), "p": plural(shape)}
        text = noisy(ask(key, rng, **slots), rng)
        if rng.random() < 0.05:
            text = text[:-1] + " " + string(rng)[0] + text[-1:]
        messages += [Message("user", text), Message("assistant", answer, task=task)]
    return messages
