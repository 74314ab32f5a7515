"""Questions about one picture and their true answers.

Objects are told from left to right and text from top to bottom.
An answer has up to three styles: a sentence, the bare value ("brief") and JSON in a fixed form:
`{"objects": [{"shape": "circle", "color": "red"}]}` with `"text": "hello"` last where there is text (lines joined by
a space), `{"count": 2}` and `{"text": "hello"}`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from random import Random
from typing import NamedTuple

from world import COLORS, SHAPES, Obj, Picture

NUMBER = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
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


def margin(pic: Picture) -> float:
    """How far apart two things must be for a question about their order; 12 pixels in a picture of 128 x 128."""
    return 12 / 128 * math.sqrt(pic.h * pic.w)


def side(a: Obj, b: Obj, least: float) -> str | None:
    """Where a is, seen from b, if one axis clearly dominates."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > 1.6 * abs(dy) and abs(dx) > least:
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.6 * abs(dx) and abs(dy) > least:
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
    r = side(a, b, margin(pic))
    if r is None:
        return None
    if rng.random() < 0.5:
        return Turn("relation", "relation", {"x": x, "y": y}, Answer(f"The {x} is {FLIP[r]} the {y}."), a)
    asked = rng.choice(tuple(FLIP))
    if rng.random() < 0.5:
        asked = r
    truth = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[asked]
    if (abs(a.x - b.x) if asked.endswith("of") else abs(a.y - b.y)) < margin(pic):
        return None
    spoken = FLIP[asked] if rng.random() < 0.4 else asked
    answer = yes(truth, f"the {x} is {FLIP[asked]} the {y}", f"the {x} is {FLIP[r]} the {y}")
    return Turn("relation", "is_relation", {"x": x, "y": y, "r": spoken}, answer, a)


def q_next(pic: Picture, rng: Random) -> Turn | None:
    if len(pic.objs) != 2 or (found := two(pic, rng)) is None:
        return None
    a, b, _, y = found
    r = side(a, b, margin(pic))
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
        o, e, gap = (
            (objs[0], "left", objs[1].x - objs[0].x)
            if rng.random() < 0.5
            else (objs[-1], "right", objs[-1].x - objs[-2].x)
        )
        if gap < margin(pic):
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
        o = rng.choice(
            ["top", ORDINAL[0]] if i == 0 else ["bottom", "last"] if i == len(pic.texts) - 1 else [ORDINAL[1]]
        )
        if o == "last" and len(pic.texts) == 2 and rng.random() < 0.5:
            o = ORDINAL[1]
        t = pic.texts[i]
        return Turn("read", "line", {"o": o}, Answer(f"It says {quoted(t.kind, t.string)[4:]}.", t.string))
    if pick < 0.55:
        return Turn("read", "text_color", {}, Answer(f"The text is {pic.texts[0].color}.", pic.texts[0].color))
    return Turn(
        "read", "read", {}, bare._replace(sentence=f"It shows {join([quoted(t.kind, t.string) for t in pic.texts])}.")
    )


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
