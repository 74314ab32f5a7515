"""Draws batches of pictures on the GPU (or slowly on a CPU): every shape and letter is one sprite of an atlas.

A sprite row is (tile, cx, cy, tx, ty, scale, angle, r, g, b): tile point (tx, ty) lands on picture point (cx, cy), a
tile pixel is `scale` picture pixels wide, turned clockwise by `angle`. A ground row is
(kind, r1, g1, b1, r2, g2, b2, angle, period, noise, blur, jpeg). `rows` turns pictures into both; `draw` paints them.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from world import CHARS, FONTS, SHAPES, Picture

SHAPE_TILE, SHAPE_RADII = 128, (56, 28, 14, 7)
GLYPH_TILE, GLYPH_SIZES, GLYPH_ORIGIN = 64, (40, 20), (10, 6)
SPRITE, GROUND = 10, 12


def outline(shape: str) -> list[tuple[float, float]]:
    """The polygon of a shape in the unit circle, y downwards."""
    if shape == "circle":
        return [(0.93 * math.cos(i * math.pi / 48), 0.93 * math.sin(i * math.pi / 48)) for i in range(96)]
    if shape == "square":
        return [(-0.83, -0.83), (0.83, -0.83), (0.83, 0.83), (-0.83, 0.83)]
    if shape == "triangle":
        return [(0, -0.98), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "star":
        points = [(1.0 if i % 2 == 0 else 0.42, -math.pi / 2 + i * math.pi / 5) for i in range(10)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in points]
    if shape == "heart":
        ts = [i * math.pi / 40 for i in range(80)]
        xs = [16 * math.sin(t) ** 3 for t in ts]
        ys = [-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in ts]
        return [(x / 17, (y - 2.5) / 16) for x, y in zip(xs, ys)]
    if shape == "diamond":
        return [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)]
    if shape == "cross":
        a, b = 0.33, 0.95
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    outer = [(0.95 * math.cos(t), 0.95 * math.sin(t)) for t in np.linspace(0.75, 2 * math.pi - 0.75, 60)]
    end = outer[-1]
    centre, radius = (0.55, 0.0), math.hypot(end[0] - 0.55, end[1])
    a = math.atan2(-end[1], end[0] - centre[0])
    inner = [(centre[0] + radius * math.cos(t), radius * math.sin(t)) for t in np.linspace(-a, a - 2 * math.pi, 60)]
    return outer + inner


def font_folder(flag: str | None = None) -> Path:
    """Where the DejaVu faces are: the flag, matplotlib's own copy, or Debian's fonts-dejavu."""
    candidates = [Path(flag)] if flag else []
    try:
        import matplotlib

        candidates.append(Path(matplotlib.__file__).parent / "mpl-data" / "fonts" / "ttf")
    except ImportError:
        pass
    candidates.append(Path("/usr/share/fonts/truetype/dejavu"))
    for folder in candidates:
        if all((folder / f).exists() for f in FONTS):
            return folder
    raise SystemExit(f"no folder with all of {', '.join(FONTS)}; pass --fonts or install matplotlib")


def advances(folder: Path) -> list[list[float]]:
    """Advance width of every character of every font at one pixel of font size."""
    fonts = [ImageFont.truetype(str(folder / f), 100) for f in FONTS]
    return [[font.getlength(c) / 100 for c in CHARS] for font in fonts]


def atlases(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Coverage tiles uint8: shapes [4 * 8, 128, 128] and glyphs [2 * fonts * chars, 64, 64]."""
    shapes = []
    for radius in SHAPE_RADII:
        for shape in SHAPES:
            big = Image.new("L", (SHAPE_TILE * 8,) * 2)
            centre = SHAPE_TILE * 4
            ImageDraw.Draw(big).polygon(
                [(centre + x * radius * 8, centre + y * radius * 8) for x, y in outline(shape)], fill=255
            )
            shapes.append(np.asarray(big.resize((SHAPE_TILE,) * 2, Image.Resampling.BOX)))
    glyphs = []
    for size in GLYPH_SIZES:
        for f in FONTS:
            font = ImageFont.truetype(str(folder / f), size)
            for c in CHARS:
                tile = Image.new("L", (GLYPH_TILE,) * 2)
                ImageDraw.Draw(tile).text(GLYPH_ORIGIN, c, font=font, fill=255)
                glyphs.append(np.asarray(tile))
    return np.stack(shapes), np.stack(glyphs)


def rows(
    pic: Picture, advance: list[list[float]]
) -> tuple[list[list[float]], list[list[float]], list[list[float]], list[float]]:
    """Outline, shape and glyph sprite rows and the ground row of one picture."""
    edges, shapes, glyphs = [], [], []
    half = SHAPE_TILE / 2
    for o in pic.objs:
        for out, extra, rgb in ((edges, pic.outline, (0.05, 0.05, 0.05)), (shapes, 0.0, o.rgb)):
            if out is edges and not extra:
                continue
            radius = o.radius + extra
            level = max(i for i, r in enumerate(SHAPE_RADII) if r >= 0.8 * radius or i == 0)
            out.append(
                [
                    level * len(SHAPES) + SHAPES.index(o.shape),
                    o.x,
                    o.y,
                    half,
                    half,
                    radius / SHAPE_RADII[level],
                    o.angle,
                    *rgb,
                ]
            )
    for t in pic.texts:
        level = 0 if t.px > 27 else 1
        scale = t.px / GLYPH_SIZES[level]
        base = (level * len(FONTS) + t.font) * len(CHARS)
        mx, my = t.x + t.w / 2, t.y + 0.585 * t.px
        c, s = math.cos(t.angle), math.sin(t.angle)
        x = t.x
        for char in t.string:
            i = CHARS.index(char)
            dx, dy = x - mx, t.y - my
            glyphs.append([base + i, mx + c * dx - s * dy, my + s * dx + c * dy, *GLYPH_ORIGIN, scale, t.angle, *t.rgb])
            x += advance[t.font][i] * t.px
    bg, r = pic.bg, pic.rough
    ground = [bg.kind, *bg.c1, *bg.c2, bg.angle, bg.period, r.get("noise", 0), r.get("blur", 0), r.get("jpeg", 0)]
    return edges, shapes, glyphs, ground


def sprites(atlas: torch.Tensor, row: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Coverage [m, h, w] of m sprite rows [m, 10]."""
    size = atlas.shape[-1]
    _, cx, cy, tx, ty, scale, angle = row[:, :7].unbind(1)
    c, s = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack(
        [
            torch.stack([c * w / size, s * h / size, (c * (w / 2 - cx) + s * (h / 2 - cy) + tx) * 2 / size - 1], 1),
            torch.stack([-s * w / size, c * h / size, (-s * (w / 2 - cx) + c * (h / 2 - cy) + ty) * 2 / size - 1], 1),
        ],
        1,
    )
    tiles = atlas[row[:, 0].long()][:, None].float() / 255
    grid = F.affine_grid(theta, [len(row), 1, h, w], align_corners=False)
    return F.grid_sample(tiles, grid, align_corners=False)[:, 0]


def paint(
    img: torch.Tensor, atlas: torch.Tensor, row: torch.Tensor, owner: torch.Tensor, one_color: bool
) -> torch.Tensor:
    """Lays sprites (which do not overlap inside one layer) over img [b, 3, h, w]; owner [m] names the picture.

    `one_color` says that all sprites of a picture have one colour, which is much cheaper.
    """
    if len(row) == 0:
        return img
    alpha = sprites(atlas, row, *img.shape[2:])
    cover = torch.zeros_like(img[:, 0]).index_add_(0, owner, alpha).clamp_(max=1)[:, None]
    if one_color:
        ink = torch.zeros(len(img), 3, device=img.device)
        ink[owner] = row[:, 7:10]
        return torch.lerp(img, ink[:, :, None, None], cover)
    color = torch.zeros_like(img).index_add_(0, owner, alpha[:, None] * row[:, 7:10, None, None])
    return img * (1 - cover) + torch.minimum(color, cover)


def backdrop(ground: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """Backgrounds [b, 3, h, w] of ground rows [b, 12]."""
    b, dev = len(ground), ground.device
    kind, angle, period = (ground[:, i, None, None] for i in (0, 7, 8))
    y, x = torch.meshgrid(torch.arange(h, device=dev) + 0.5, torch.arange(w, device=dev) + 0.5, indexing="ij")
    u = x * angle.cos() + y * angle.sin()
    v = y * angle.cos() - x * angle.sin()
    soft = F.interpolate(torch.rand(b, 1, 7, 7, device=dev), (h, w), mode="bicubic", align_corners=True)[:, 0]
    gradient = (((x - w / 2) * angle.cos() + (y - h / 2) * angle.sin()) / math.hypot(h, w) + 0.5).clamp(0, 1)
    wave = torch.sin(u * (2 * math.pi) / period)
    stripes = (wave * 6).clamp(-0.5, 0.5) + 0.5
    checks = (wave * torch.sin(v * (2 * math.pi) / period) * 6).clamp(-0.5, 0.5) + 0.5
    t = torch.where(
        kind == 1, gradient, torch.where(kind == 2, stripes, torch.where(kind == 3, soft.clamp(0, 1), checks))
    )
    t = torch.where(kind == 0, 0.0, t)[:, None]
    return ground[:, 1:4, None, None] * (1 - t) + ground[:, 4:7, None, None] * t


QUANT = torch.tensor([16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
                      14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
                      49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99]).view(8, 8) / 255  # fmt: skip


def jpeg(img: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Quantises 8x8 DCT blocks of YCbCr as JPEG does; step [b] scales Annex K's luminance table."""
    b, _, h, w = img.shape
    dev = img.device
    k = torch.arange(8, device=dev, dtype=torch.float32)
    dct = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) * 0.5
    dct[0] *= 0.5**0.5
    to = torch.tensor([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]], device=dev)
    ycc = torch.einsum("ij,bjhw->bihw", to, img)
    blocks = ycc.view(b, 3, h // 8, 8, w // 8, 8).transpose(3, 4)
    q = QUANT.to(dev) * step.view(-1, 1, 1, 1, 1, 1).clamp(min=1e-3)
    q = q * torch.tensor([1.0, 1.6, 1.6], device=dev).view(1, 3, 1, 1, 1, 1)
    blocks = dct.T @ (torch.round(dct @ blocks @ dct.T / q) * q) @ dct
    out = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(to), blocks.transpose(3, 4).reshape(b, 3, h, w))
    return torch.where(step.view(-1, 1, 1, 1) > 0, out, img)


class Renderer:
    """Holds the atlases on a device."""

    def __init__(self, folder: Path, device: str | torch.device) -> None:
        shapes, glyphs = atlases(folder)
        self.shapes, self.glyphs = torch.tensor(shapes, device=device), torch.tensor(glyphs, device=device)

    @torch.no_grad()
    def draw(
        self, layers: list[tuple[torch.Tensor, torch.Tensor]], ground: torch.Tensor, h: int, w: int
    ) -> torch.Tensor:
        """Pictures [b, 3, h, w] in 0..1, rounded to 8 bits; layers are (rows, owner) of outlines, shapes and glyphs."""
        img = backdrop(ground, h, w)
        for atlas, (row, owner), one_color in zip((self.shapes, self.shapes, self.glyphs), layers, (True, False, True)):
            img = paint(img, atlas, row, owner, one_color)
        weight = ground[:, 10].view(-1, 1, 1, 1)
        img = torch.lerp(img, F.avg_pool2d(F.pad(img, (1, 1, 1, 1), mode="replicate"), 3, 1), weight)
        img = img + torch.randn_like(img) * ground[:, 9].view(-1, 1, 1, 1)
        shift = (int(torch.randint(0, 8, ())), int(torch.randint(0, 8, ())))
        img = jpeg(img.roll(shift, (2, 3)), ground[:, 11]).roll((-shift[0], -shift[1]), (2, 3))
        return (img.clamp(0, 1) * 255).round() / 255
