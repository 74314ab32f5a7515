"""What can be in a picture: coloured shapes, words and numbers, and where they are.

Everything here is plain Python over ``random.Random``: a picture is a small description (`Picture`) which
`render.py` draws on the GPU and `evaluate.py` draws with Pillow, and which `dialogue.py` asks questions about.
Lengths are in pixels of the final picture; x grows to the right and y downwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random

from lexicon import GRAMMAR_WORDS, WORDS

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "moon")
SIZES = ("small", "medium", "large")
RADIUS = {"small": (0.065, 0.09), "medium": (0.12, 0.16), "large": (0.21, 0.28)}  # of sqrt(width * height)
# Each named colour is the convex hull of a few RGB anchors (CSS names included); hulls do not touch each other.
COLORS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (205, 20, 30), (230, 45, 45)),
    "orange": ((255, 165, 0), (255, 120, 10), (245, 140, 40)),
    "yellow": ((255, 255, 0), (250, 215, 30), (255, 235, 80)),
    "green": ((0, 128, 0), (30, 200, 60), (0, 255, 0), (40, 110, 60)),
    "blue": ((0, 0, 255), (30, 80, 220), (30, 50, 150), (40, 120, 240)),
    "purple": ((128, 0, 128), (100, 30, 165), (150, 60, 200)),
    "pink": ((255, 192, 203), (255, 105, 180), (250, 150, 190)),
    "brown": ((139, 69, 19), (110, 65, 30), (150, 90, 45)),
    "black": ((0, 0, 0), (28, 28, 28), (15, 15, 22)),
    "white": ((255, 255, 255), (240, 240, 240), (250, 250, 244)),
    "gray": ((128, 128, 128), (110, 112, 115), (150, 150, 150)),
}
FONTS = tuple(
    f"DejaVu{f}.ttf"
    for f in (
        "Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique",
        "SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique",
        "Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic",
    )
)  # fmt: skip
CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:-!?$%"
RGB = tuple[float, float, float]


@dataclass(slots=True)
class Obj:
    """One shape; `radius` is its half extent."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: RGB


@dataclass(slots=True)
class Text:
    """One line of text whose advance box is (x, y, w, 1.17 * px) before it is turned by `angle` about its centre."""

    string: str
    kind: str  # word | number | letter | text
    font: int
    px: float
    x: float
    y: float
    w: float
    angle: float
    rgb: RGB
    color: str


@dataclass(slots=True)
class Background:
    """Kind 0 flat, 1 gradient, 2 stripes, 3 soft noise, 4 checks; `color` is None where it has no plain name."""

    kind: int
    c1: RGB
    c2: RGB
    angle: float
    period: float
    color: str | None


@dataclass(slots=True)
class Picture:
    h: int
    w: int
    objs: list[Obj]
    texts: list[Text]
    bg: Background
    outline: float = 0.0  # width in pixels of a dark outline around every shape
    rough: dict[str, float] = field(default_factory=dict)  # noise, blur, jpeg: see render.py


def mix(rng: Random, color: str) -> RGB:
    """A random member of a named colour, channels in 0..1."""
    anchors = COLORS[color]
    weights = [rng.random() ** 2 + 1e-3 for _ in anchors]
    total = sum(weights) * 255
    r, g, b = (sum(w * a[c] for w, a in zip(weights, anchors)) / total for c in range(3))
    return r, g, b


def distance(a: RGB, b: RGB) -> float:
    return math.dist(a, b)


def luminance(c: RGB) -> float:
    return 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2]


def background(rng: Random, colors: list[RGB], texts: list[RGB]) -> Background:
    """A background on which every given colour can be seen."""

    def clear(c: RGB) -> bool:
        return all(distance(c, o) > 0.34 for o in colors) and all(abs(luminance(c) - luminance(t)) > 0.3 for t in texts)

    kind = rng.choices((0, 1, 2, 3, 4), (50, 20, 9, 14, 7))[0]
    for attempt in range(40):
        name: str | None = None
        pick = rng.random()
        if pick < 0.3:
            name = "white"
        elif pick < 0.55 or attempt > 20:
            name = rng.choice(tuple(COLORS))
        if name is not None:
            c1 = mix(rng, name)
        else:
            c1 = (rng.random(), rng.random(), rng.random())
            if rng.random() < 0.5:  # pastel
                c1 = tuple(0.65 + 0.35 * c for c in c1)  # type: ignore[assignment]
        if not clear(c1):
            continue
        spread = 0.0 if kind == 0 else (0.35 if name is None else 0.1)
        c2: RGB = tuple(min(1.0, max(0.0, c + rng.uniform(-spread, spread))) for c in c1)  # type: ignore[assignment]
        if clear(c2) and clear(tuple((a + b) / 2 for a, b in zip(c1, c2))):  # type: ignore[arg-type]
            return Background(kind, c1, c2, rng.uniform(0, 6.283), rng.uniform(10, 40), name)
    dark = texts + colors
    c = min(((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.5, 0.5, 0.5)), key=lambda c: -min(distance(c, o) for o in dark))
    name = {1.0: "white", 0.0: "black", 0.5: "gray"}[c[0]]
    return Background(0, c, c, 0.0, 20.0, name)


def rough(rng: Random) -> dict[str, float]:
    """Noise amplitude, blur weight and JPEG quantiser step (0 is none), each absent in most pictures."""
    return {
        "noise": rng.choice((0.0, 0.0, rng.uniform(0, 0.03), rng.uniform(0, 0.06))),
        "blur": rng.choice((0.0, 0.0, 0.0, rng.uniform(0.2, 1.0))),
        "jpeg": rng.choice((0.0, 0.0, rng.uniform(0.2, 1.0), rng.uniform(0.2, 2.0))),
    }


def place(rng: Random, pic: Picture, radius: float) -> tuple[float, float] | None:
    """A free spot for a shape, or None; mostly near the middle of one of the nine zones."""
    margin = radius + 2
    if 2 * margin >= min(pic.h, pic.w):
        return None
    for _ in range(25):
        if rng.random() < 0.75:
            x = pic.w * (rng.choice((0.18, 0.5, 0.82)) + rng.uniform(-0.06, 0.06))
            y = pic.h * (rng.choice((0.18, 0.5, 0.82)) + rng.uniform(-0.06, 0.06))
        else:
            x, y = rng.uniform(0, pic.w), rng.uniform(0, pic.h)
        x, y = min(max(x, margin), pic.w - margin), min(max(y, margin), pic.h - margin)
        if any(math.hypot(x - o.x, y - o.y) < (radius + o.radius) * 1.02 + 3 for o in pic.objs):
            continue
        if all(gap(x, y, t) > radius + 2 for t in pic.texts):
            return x, y
    return None


def gap(x: float, y: float, t: Text) -> float:
    """Distance from a point to a line of text (to the bounding box of the turned box)."""
    h = 1.17 * t.px
    c, s = abs(math.cos(t.angle)), abs(math.sin(t.angle))
    half_w, half_h = (t.w * c + h * s) / 2, (t.w * s + h * c) / 2
    dx = max(abs(x - t.x - t.w / 2) - half_w, 0.0)
    dy = max(abs(y - t.y - h / 2) - half_h, 0.0)
    return math.hypot(dx, dy)


def add(rng: Random, pic: Picture, shape: str, color: str, size: str) -> bool:
    low, high = RADIUS[size]
    radius = min(rng.uniform(low, high) * math.sqrt(pic.h * pic.w), 0.46 * min(pic.h, pic.w))
    spot = place(rng, pic, radius)
    if spot is None:
        return False
    angle = rng.choice((0.0, rng.uniform(-0.22, 0.22)))
    pic.objs.append(Obj(shape, color, size, *spot, radius, angle, mix(rng, color)))
    return True


def kinds(rng: Random, n: int) -> list[tuple[str, str]]:
    """n (shape, colour) pairs: often all different, sometimes sharing a shape, a colour or both."""
    shapes, colors = rng.sample(SHAPES, min(n, len(SHAPES))), rng.sample(tuple(COLORS), n)
    sharing = rng.random()
    if sharing < 0.15:
        shapes = [shapes[0]] * n
    elif sharing < 0.3:
        colors = [colors[0]] * n
    elif sharing < 0.5:
        shapes = [rng.choice(shapes) for _ in range(n)]
        colors = [rng.choice(colors) for _ in range(n)]
    return list(zip(shapes, colors))


def finish(rng: Random, pic: Picture) -> Picture:
    pic.bg = background(rng, [o.rgb for o in pic.objs], [t.rgb for t in pic.texts])
    if pic.objs and luminance(pic.bg.c1) > 0.35 and rng.random() < 0.2:
        pic.outline = rng.uniform(1.0, 2.2)
    pic.rough = rough(rng)
    return pic


EMPTY = Background(0, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 0.0, 20.0, "white")


def scene(rng: Random, h: int, w: int, wanted: list[tuple[str, str]] | None = None) -> Picture:
    """A picture of one to six shapes; `wanted` names their (shape, colour) pairs."""
    pic = Picture(h, w, [], [], EMPTY)
    mode = rng.random()
    if wanted is None:
        if mode < 0.15:
            wanted = kinds(rng, 1)
        elif mode < 0.7:
            wanted = kinds(rng, rng.choice((2, 2, 2, 3, 3, 4)))
        else:
            total, wanted = rng.randint(2, 6), []
            groups = kinds(rng, rng.randint(1, 3))
            while len(wanted) < total:
                wanted.append(groups[len(wanted)] if len(wanted) < len(groups) else rng.choice(groups))
    sizes = SIZES if len(wanted) <= 3 else SIZES[:2] if len(wanted) <= 4 else ("small", "small", "medium")
    for shape, color in wanted:
        _ = add(rng, pic, shape, color, rng.choice(sizes)) or add(rng, pic, shape, color, "small")
    if not pic.objs:
        add(rng, pic, "circle", "red", "small")
    return finish(rng, pic)


SYLLABLES = [a + b for a in "b c d f g h k l m n p r s t v w z ch sh st tr br gr pl".split() for b in "aeiou"]


def string(rng: Random) -> tuple[str, str]:
    """(text, kind): words of a list, invented words, random letters, numbers, codes, single letters."""
    pick = rng.random()
    if pick < 0.3:  # numbers
        if rng.random() < 0.1:
            a, b = rng.randint(0, 99), rng.randint(0, 99)
            return rng.choice((f"{a}.{b:02d}", f"${a}", f"{a}%", f"{a % 24}:{b % 60:02d}", f"-{a}")), "number"
        n = rng.randint(1, 6)
        return "".join(rng.choice("0123456789") for _ in range(n)), "number"
    if pick < 0.36:
        return rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijkmnqrty"), "letter"
    if pick < 0.41:
        code = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ23456789") for _ in range(rng.randint(3, 7)))
        return (code, "text") if not code.isalpha() and not code.isdigit() else (code[0] + "7" + code[1:], "text")
    if pick < 0.58:
        word = rng.choice(WORDS if rng.random() < 0.85 else GRAMMAR_WORDS)
    elif pick < 0.76:
        word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 4)))
        word = (word + rng.choice(("", "", "n", "r", "s", "t", "l", "ck", "y")))[:8]
    else:
        word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))
    return cased(rng, word) + ("!" if rng.random() < 0.01 else ""), "word"


def cased(rng: Random, word: str) -> str:
    pick = rng.random()
    return word.upper() if pick < 0.28 else word.capitalize() if pick < 0.5 else word.lower()


def text_picture(
    rng: Random,
    h: int,
    w: int,
    advance: list[list[float]],
    strings: list[tuple[str, str]] | None = None,
    px: tuple[float, float] = (14, 44),
) -> Picture:
    """A picture of one to three lines of text, sometimes with one or two shapes beside them.

    `advance[font][char]` is the advance width of a character at one pixel of font size.
    """
    pic = Picture(h, w, [], [], EMPTY)
    if strings is None:
        strings = [string(rng) for _ in range(rng.choices((1, 2, 3), (64, 27, 9))[0])]
    font = rng.randrange(len(FONTS))
    color = rng.choice(tuple(COLORS)) if rng.random() < 0.6 else rng.choice(("black", "black", "white"))
    rgb = mix(rng, color)
    angle = rng.uniform(-0.1, 0.1) if rng.random() < 0.3 else 0.0
    widths = [sum(advance[font][CHARS.index(c)] for c in s) for s, _ in strings]
    lean = 1 + abs(math.sin(angle)) * 4
    size = min(rng.uniform(*px), (w - 6) / max(widths), (h - 4) / (1.25 * len(strings) * lean))
    pitch = size * rng.uniform(1.17, 1.5)
    if pitch * len(strings) * lean > h - 4:
        pitch = size * 1.17
    room = h - pitch * len(strings)
    slack = room / 2 - abs(math.sin(angle)) * max(widths) * size / 2
    top = room / 2 + rng.uniform(-1, 1) * max(slack, 0)
    aligned = rng.random() < 0.5
    left = rng.uniform(3, max(3.0, w - 3 - max(widths) * size))
    for i, ((s, kind), width) in enumerate(zip(strings, widths)):
        x = left if aligned else left + (max(widths) - width) * size / 2
        pic.texts.append(Text(s, kind, font, size, x, top + i * pitch, width * size, angle, rgb, color))
    if rng.random() < 0.25:
        for shape, c in kinds(rng, rng.choice((1, 1, 2))):
            add(rng, pic, shape, c, rng.choice(SIZES[:2]))
    return finish(rng, pic)
