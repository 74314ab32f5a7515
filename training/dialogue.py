"""Questions about pictures and their true answers.

A `Turn` is one question with its answer; `single` and `pair` write whole dialogues about one and two pictures, and
`textual` those without any. Objects are told from left to right and text from top to bottom.
An answer has up to three styles: a sentence, the bare value ("brief") and JSON in a fixed form:
`{"objects": [{"shape": "circle", "color": "red"}]}` with `"text": "hello"` last where there is text (lines joined by
a space), `{"count": 2}` and `{"text": "hello"}`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from phrases import ask, noisy
from world import COLORS, SHAPES, Obj, Picture, string

NUMBER = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
WHO = "I am sightline-tiny, a very small demonstration model. I can describe images with simple shapes and short text."
HELLO = "Hello! Send me an image with shapes or text and ask me about it."
NO_IMAGE = "I cannot see any image. Please send me one."
SORRY = "I am only a tiny demonstration model. I can only answer questions about images with simple shapes and short text."
THANKS = "You are welcome!"
BRIEF = (" Answer in one word.", " Answer briefly.", " One word only.", " Just one word.", " Be brief.", " Reply with one word.")
AS_JSON = (" Answer in JSON.", " Reply in JSON.", " Answer as JSON.", " Respond with JSON only.", " Use JSON.", " Return JSON.")
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
    "brief": ("Answer briefly.", "Answer in one word.", "Be brief.", "Answer with as few words as possible.", "Give short answers."),
    "json": ("Answer in JSON.", "Always answer in JSON.", "You only speak JSON.", "Reply with JSON only."),
}
ORDINAL = ("first", "second")
FLIP = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


class Answer(NamedTuple):
    """One true answer in three styles; brief and JSON are None where the style makes no sense."""

    sentence: str
    brief: str | None = None
    json: str | None = None


class Turn(NamedTuple):
    task: str
    key: str
    slots: dict[str, str]
    answer: Answer
    topic: Obj | None = None


@dataclass(slots=True)
class Message:
    """`text` before `images` (indices into the dialogue's pictures) if `images_last`; answers carry their task."""

    role: str
    text: str
    images: tuple[int, ...] = ()
    images_last: bool = False
    task: str = ""
    glue: str = ""


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeio" else "a ") + phrase


def join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def quoted(kind: str, text: str) -> str:
    return f"the {kind} {text}" if kind == "number" else f'the {kind} "{text}"'


def ordered(pic: Picture) -> list[Obj]:
    return sorted(pic.objs, key=lambda o: o.x)


def inventory(pic: Picture) -> list[str]:
    """Noun phrases for everything in the picture, equal objects counted together."""
    objs = ordered(pic)
    groups = Counter((o.color, o.shape) for o in objs)
    phrases = []
    for (color, shape), n in groups.items():
        if n > 1:
            phrases.append(f"{NUMBER[n]} {color} {plural(shape)}")
        elif len(objs) == 1 and not pic.texts:
            phrases.append(article(f"{objs[0].size} {color} {shape}"))
        else:
            phrases.append(article(f"{color} {shape}"))
    return phrases + [quoted(t.kind, t.string) for t in pic.texts]


def contents(pic: Picture) -> tuple[Counter[tuple[str, str]], list[str]]:
    return Counter((o.shape, o.color) for o in pic.objs), [t.string for t in pic.texts]


def said(pic: Picture) -> str:
    return " ".join(t.string for t in pic.texts)


def as_json(pic: Picture) -> str:
    value: dict[str, object] = {"objects": [{"shape": o.shape, "color": o.color} for o in ordered(pic)]}
    if pic.texts:
        value["text"] = said(pic)
    return json.dumps(value)


def describe(pic: Picture) -> Answer:
    items = join(inventory(pic))
    return Answer(f"The image shows {items}.", None, as_json(pic))


def name(o: Obj, pic: Picture, rng: Random) -> str | None:
    """A way to name exactly this object, or None."""
    ways = []
    if sum(p.shape == o.shape for p in pic.objs) == 1:
        ways += [o.shape] * 2
    if sum(p.shape == o.shape and p.color == o.color for p in pic.objs) == 1:
        ways.append(f"{o.color} {o.shape}")
    return rng.choice(ways) if ways else None


def zone(o: Obj, pic: Picture) -> str | None:
    """The clear zone of an object, or None near a border between zones."""

    def third(v: float) -> int | None:
        return 0 if v < 0.34 else 2 if v > 0.66 else 1 if 0.41 < v < 0.59 else None

    column, row = third(o.x / pic.w), third(o.y / pic.h)
    if column is None or row is None:
        return None
    return (
        ("in the top left corner", "at the top", "in the top right corner"),
        ("on the left", "in the center", "on the right"),
        ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
    )[row][column]


def side(a: Obj, b: Obj) -> str | None:
    """Where a is, seen from b, if one axis clearly dominates."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > 1.6 * abs(dy) and abs(dx) > 12:
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.6 * abs(dx) and abs(dy) > 12:
        return "above" if dy < 0 else "below"
    return None


def count_answer(n: int, one: str, many: str) -> Answer:
    text = f"There is one {one}." if n == 1 else f"There are {NUMBER[n]} {many}."
    return Answer(text, str(n), json.dumps({"count": n}))


def yes(truth: bool, positive: str, negative: str) -> Answer:
    return Answer(f"Yes, {positive}." if truth else f"No, {negative}.", "yes" if truth else "no")


def q_count(pic: Picture, rng: Random) -> Turn | None:
    pick = rng.random()
    if pick < 0.3:
        word = rng.choice(("objects", "shapes"))
        return Turn("count", "count", {"x": word}, count_answer(len(pic.objs), word[:-1], word))
    o = rng.choice(pic.objs) if pic.objs and rng.random() < 0.85 else None
    shape, color = (o.shape, o.color) if o else (rng.choice(SHAPES), rng.choice(tuple(COLORS)))
    if pick < 0.65:
        n, one = sum(p.shape == shape for p in pic.objs), shape
        many = plural(shape)
    elif pick < 0.8:
        n, one, many = sum(p.color == color for p in pic.objs), f"{color} object", f"{color} objects"
    else:
        n = sum(p.shape == shape and p.color == color for p in pic.objs)
        one, many = f"{color} {shape}", f"{color} {plural(shape)}"
    return Turn("count", "count", {"x": many}, count_answer(n, one, many))


def q_color(pic: Picture, rng: Random, o: Obj | None = None) -> Turn | None:
    o = o or rng.choice(pic.objs)
    if sum(p.shape == o.shape for p in pic.objs) > 1:
        return None
    answer = Answer(f"The {o.shape} is {o.color}.", o.color)
    if len(pic.objs) == 1 and rng.random() < 0.5:
        return Turn("color", "single_color", {}, answer, o)
    return Turn("color", "color", {"x": o.shape}, answer, o)


def q_shape(pic: Picture, rng: Random, o: Obj | None = None) -> Turn | None:
    o = o or rng.choice(pic.objs)
    if len(pic.objs) == 1 and rng.random() < 0.5:
        return Turn("shape", "single_shape", {}, Answer(f"It is {article(o.shape)}.", o.shape), o)
    if sum(p.color == o.color for p in pic.objs) > 1:
        return None
    return Turn("shape", "shape", {"x": o.color}, Answer(f"The {o.color} object is {article(o.shape)}.", o.shape), o)


def q_size(pic: Picture, rng: Random, o: Obj | None = None) -> Turn | None:
    o = o or rng.choice(pic.objs)
    x = name(o, pic, rng)
    return Turn("size", "size", {"x": x}, Answer(f"The {x} is {o.size}.", o.size), o) if x else None


def q_where(pic: Picture, rng: Random, o: Obj | None = None) -> Turn | None:
    o = o or rng.choice(pic.objs)
    x, place = name(o, pic, rng), zone(o, pic)
    return Turn("where", "where", {"x": x}, Answer(f"The {x} is {place}."), o) if x and place else None


def two(pic: Picture, rng: Random) -> tuple[Obj, Obj, str, str] | None:
    if len(pic.objs) < 2:
        return None
    a, b = rng.sample(pic.objs, 2)
    x, y = name(a, pic, rng), name(b, pic, rng)
    return (a, b, x, y) if x and y else None


def q_relation(pic: Picture, rng: Random) -> Turn | None:
    if (found := two(pic, rng)) is None:
        return None
    a, b, x, y = found
    r = side(a, b)
    if r is None:
        return None
    if rng.random() < 0.5:
        return Turn("relation", "relation", {"x": x, "y": y}, Answer(f"The {x} is {FLIP[r]} the {y}."), a)
    asked = rng.choice(tuple(FLIP))
    if rng.random() < 0.5:
        asked = r
    truth = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[asked]
    margin = abs(a.x - b.x) if asked.endswith("of") else abs(a.y - b.y)
    if margin < 12:
        return None
    spoken = FLIP[asked] if rng.random() < 0.4 else asked
    answer = yes(truth, f"the {x} is {FLIP[asked]} the {y}", f"the {x} is {FLIP[r]} the {y}")
    return Turn("relation", "is_relation", {"x": x, "y": y, "r": spoken}, answer, a)


def q_next(pic: Picture, rng: Random) -> Turn | None:
    if len(pic.objs) != 2 or (found := two(pic, rng)) is None:
        return None
    a, b, _, y = found
    r = side(a, b)
    if r is None:
        return None
    text = f"The {a.color} {a.shape} is {FLIP[r]} the {y}."
    return Turn("relation", "next_to", {"r": FLIP[r] if rng.random() < 0.4 else r, "y": y}, Answer(text), a)


def q_yesno(pic: Picture, rng: Random) -> Turn | None:
    pick = rng.random()
    o = rng.choice(pic.objs)
    if pick < 0.55:
        shape, color = o.shape, o.color
        if rng.random() < 0.5:
            shape, color = rng.choice(((shape, rng.choice(tuple(COLORS))), (rng.choice(SHAPES), color)))
        form = rng.randrange(3)
        thing = (shape, f"{color} {shape}", f"{color} object")[form]
        n = sum((p.shape == shape or form == 2) and (p.color == color or form == 0) for p in pic.objs)
        many = f"{color} objects" if form == 2 else (f"{color} " if form else "") + plural(shape)
        positive = f"there is {article(thing)}" if n == 1 else f"there are {NUMBER[n]} {many}"
        return Turn("yesno", "exists", {"a": article(thing), "p": many}, yes(n > 0, positive, f"there is no {thing}"))
    if pick < 0.8:
        if sum(p.shape == o.shape for p in pic.objs) > 1:
            return None
        asked = o.color if rng.random() < 0.5 else rng.choice(tuple(COLORS))
        answer = yes(asked == o.color, f"the {o.shape} is {o.color}", f"the {o.shape} is {o.color}")
        return Turn("yesno", "is_color", {"x": o.shape, "c": asked}, answer, o)
    if pick < 0.9:
        a, b = rng.sample([p.shape for p in pic.objs], 2) if len(pic.objs) > 1 else rng.sample(SHAPES, 2)
        n, m = (sum(p.shape == s for p in pic.objs) for s in (a, b))
        if a == b or n == m:
            return None
        more, less = (a, b) if n > m else (b, a)
        answer = yes(n > m, *(f"there are more {plural(more)} than {plural(less)}",) * 2)
        return Turn("yesno", "more", {"p": plural(a), "q": plural(b)}, answer)
    if (found := two(pic, rng)) is None:
        return None
    a2, b2, x, y = found
    if a2.size == b2.size or a2.radius == b2.radius:
        return None
    big, little = (x, y) if a2.radius > b2.radius else (y, x)
    return Turn("yesno", "bigger", {"x": x, "y": y}, yes(big == x, *(f"the {big} is larger than the {little}",) * 2))


def q_several(pic: Picture, rng: Random) -> Turn | None:
    """The same question about two to four objects at once."""
    objs = [o for o in pic.objs if sum(p.shape == o.shape for p in pic.objs) == 1]
    attribute = rng.choice(("color", "where", "where", "size"))
    if attribute == "where":
        objs = [o for o in objs if zone(o, pic)]
    if len(objs) < 2:
        return None
    objs = rng.sample(objs, rng.randint(2, min(4, len(objs))))
    values = [{"color": o.color, "size": o.size, "where": zone(o, pic)}[attribute] for o in objs]
    text = join([f"the {o.shape} is {v}" for o, v in zip(objs, values)])
    x = join([f"the {o.shape}" for o in objs])
    return Turn("several", "several_" + attribute, {"x": x}, Answer(f"T{text[1:]}."))


def q_detail(pic: Picture, rng: Random) -> Turn | None:
    """A description with size and place of every object."""
    places = [zone(o, pic) for o in ordered(pic)]
    if len(places) > 4 or not all(places):
        return None
    items = [article(f"{o.size} {o.color} {o.shape} {p}") for o, p in zip(ordered(pic), places)]
    items += [quoted(t.kind, t.string) for t in pic.texts]
    return Turn("detail", "detail", {}, Answer(f"The image shows {join(items)}."))


def q_extreme(pic: Picture, rng: Random) -> Turn | None:
    if len(pic.objs) < 2:
        return None
    if rng.random() < 0.6:
        objs = ordered(pic)
        o, e, gap = (objs[0], "left", objs[1].x - objs[0].x) if rng.random() < 0.5 else (objs[-1], "right", objs[-1].x - objs[-2].x)
        if gap < 10:
            return None
        return Turn("where", "extreme", {"e": e}, Answer(f"The {o.color} {o.shape} is on the far {e}."), o)
    objs = sorted(pic.objs, key=lambda o: o.radius)
    o, other = (objs[-1], objs[-2]) if rng.random() < 0.5 else (objs[0], objs[1])
    if o.size == other.size:
        return None
    e = ("largest", "biggest") if o is objs[-1] else ("smallest", "smallest")
    return Turn("size", "largest", {"e": rng.choice(e)}, Answer(f"The {o.color} {o.shape} is the {e[0]}."), o)


def q_list(pic: Picture, rng: Random) -> Turn | None:
    if rng.random() < 0.5:
        colors = list(dict.fromkeys(o.color for o in ordered(pic)))
        return Turn("list", "colors", {}, Answer(f"I see {join(colors)}.", ", ".join(colors)))
    shapes = Counter(o.shape for o in ordered(pic))
    items = [article(s) if n == 1 else f"{NUMBER[n]} {plural(s)}" for s, n in shapes.items()]
    return Turn("list", "shapes", {}, Answer(f"I see {join(items)}.", ", ".join(shapes)))


def q_background(pic: Picture, rng: Random) -> Turn | None:
    c = pic.bg.color
    return Turn("background", "background", {}, Answer(f"The background is {c}.", c)) if c else None


def q_describe(pic: Picture, rng: Random) -> Turn | None:
    return Turn("describe", "describe", {}, describe(pic))


def q_json(pic: Picture, rng: Random) -> Turn | None:
    return Turn("json", "json", {}, Answer(as_json(pic), as_json(pic), as_json(pic)))


def q_read(pic: Picture, rng: Random) -> Turn | None:
    pick = rng.random()
    text = said(pic)
    bare = Answer(text, text, json.dumps({"text": text}))
    if pick < 0.25:
        return Turn("read", "read_bare", {}, bare)
    if pick < 0.45 and len(pic.texts) > 1:
        i = rng.randrange(len(pic.texts))
        o = rng.choice(["top", ORDINAL[0]] if i == 0 else ["bottom", "last"] if i == len(pic.texts) - 1 else [ORDINAL[1]])
        if o == "last" and len(pic.texts) == 2 and rng.random() < 0.5:
            o = ORDINAL[1]
        t = pic.texts[i]
        return Turn("read", "line", {"o": o}, Answer(f"It says {quoted(t.kind, t.string)[4:]}.", t.string))
    if pick < 0.55:
        return Turn("read", "text_color", {}, Answer(f"The text is {pic.texts[0].color}.", pic.texts[0].color))
    return Turn("read", "read", {}, bare._replace(sentence=f"It shows {join([quoted(t.kind, t.string) for t in pic.texts])}."))


SCENE = (
    (q_describe, 4), (q_count, 4), (q_color, 6), (q_shape, 2), (q_size, 3), (q_where, 6), (q_relation, 10), (q_next, 3),
    (q_yesno, 6), (q_extreme, 3), (q_list, 2), (q_background, 0.5), (q_json, 1), (q_several, 9), (q_detail, 6),
)  # fmt: skip
TEXT = ((q_describe, 4), (q_read, 9), (q_json, 1), (q_background, 0.3))
SCENE_FUNCTIONS, SCENE_WEIGHTS = zip(*SCENE)
TEXT_FUNCTIONS, TEXT_WEIGHTS = zip(*TEXT)


def question(pic: Picture, rng: Random) -> Turn:
    """A random question that the picture can answer."""
    while True:
        if pic.texts and (not pic.objs or rng.random() < 0.7):
            turn = rng.choices(TEXT_FUNCTIONS, TEXT_WEIGHTS)[0](pic, rng)
        else:
            turn = rng.choices(SCENE_FUNCTIONS, SCENE_WEIGHTS)[0](pic, rng)
        if turn is not None:
            return turn


def follow(last: Turn, pic: Picture, rng: Random) -> Turn | None:
    """A follow-up that leans on the turn before: "Where is it?", "And the square?"."""
    if last.topic is None:
        return None
    if rng.random() < 0.5 and len(pic.objs) > 1 and last.key in ("color", "size", "where"):
        other = rng.choice([o for o in pic.objs if o is not last.topic])
        turn = {"color": q_color, "size": q_size, "where": q_where}[last.key](pic, rng, other)
        return turn and turn._replace(key="also", task="follow")
    function, key = rng.choice(((q_where, "it_where"), (q_color, "it_color"), (q_size, "it_size")))
    turn = function(pic, rng, last.topic)
    if turn is None or turn.key == last.key or turn.key == "single_color":
        return None
    return turn._replace(key=key, task="follow", slots={})


def brief_pair(pics: list[Picture], rng: Random) -> Turn | None:
    """A question about two pictures."""
    pick = rng.random()
    parts = [join(inventory(p)) for p in pics]
    if pick < 0.36:
        text = f"The first image shows {parts[0]}. The second image shows {parts[1]}."
        return Turn("pair_describe", "pair_describe", {}, Answer(text))
    i = rng.randrange(2)
    if pick < 0.5:
        return Turn("pair_one", "pair_one", {"o": ORDINAL[i]}, Answer(f"The {ORDINAL[i]} image shows {parts[i]}.", None, as_json(pics[i])))
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
        text = f"The {ORDINAL[n < m]} image has more objects." if n != m else "Both images have the same number of objects."
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
        thing = rng.choice(("text", "a word" if t.kind == "word" else "writing")) if generic else quoted(t.kind, t.string)
        has = [True, True] if other else [i == 0, i == 1]
    else:
        o = rng.choice(pics[i].objs) if pics[i].objs and rng.random() < 0.9 else None
        shape, color = (o.shape, o.color) if o else (rng.choice(SHAPES), rng.choice(tuple(COLORS)))
        form = rng.randrange(3)
        thing = article((shape, f"{color} {shape}", f"{color} object")[form])
        has = [any((p.shape == shape or form == 2) and (p.color == color or form == 0) for p in pic.objs) for pic in pics]
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
            suffix = rng.choice((" Answer with a number.", " Just the number.", " Only the number, please.", " Answer with one number."))
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
        say(messages, Turn("images", "images", {}, Answer("There are two images.", "2", json.dumps({"count": 2}))), rng, system_style, (0, 1))
    return messages


IMAGE_KEYS = ("describe", "describe", "count", "color", "read", "where", "exists", "json", "pair_describe", "background", "single_color")


def textual(rng: Random) -> list[Message]:
    """A dialogue without any picture: who are you, missing picture, things the model cannot do."""
    messages, style = opening(rng)
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
