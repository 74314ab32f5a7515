"""Drawings of measurements as an SVG. Text, so no plotting library is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from sightline.bench.report import percentile

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 220, 50, 34, 36
_COLOURS = ("#1f5fbf", "#2a8f2a", "#d08000", "#c02020")


def distributions(title: str, measured: Mapping[str, Sequence[float]]) -> str:
    """Which share of the measurements was at most so large: one panel for each non-empty series, with its median, 90th and 99th
    percentile marked."""
    panels = [
        _panel(name, sorted(values), i) for i, (name, values) in enumerate((n, v) for n, v in measured.items() if v)
    ]
    return _drawing(title, panels)


def lines(title: str, axis: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """One panel with a line for each series of (x, part); x > 0 on a logarithmic axis, the part as a percentage."""
    points = [point for line in series.values() for point in line]
    most = max([part for _, part in points] + [0.01])
    least = min([part for _, part in points] + [0.0])
    low, high = (math.log(f(x for x, _ in points)) for f in (min, max)) if points else (0.0, 0.0)
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - 20

    def at(x: float, part: float) -> tuple[float, float]:
        across = (math.log(x) - low) / (high - low) if high > low else 0.0
        return _LEFT + across * (right - _LEFT), bottom - (part - least) / (most - least) * (bottom - _TOP)

    parts = [f'<path d="M{_LEFT},{_TOP}V{bottom}H{right}" fill="none" stroke="black"/>']
    for part in {least, 0.0, most}:
        y = at(math.exp(low), part)[1]
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{part:.0%}</text>')
    for x in sorted({x for x, _ in points}):
        parts.append(f'<text x="{at(x, 0)[0]:.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 32}" text-anchor="end">{escape(axis)}</text>')
    for i, (name, line) in enumerate(series.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{_LEFT + 10}" y="{_TOP + 4 + 15 * i}" fill="{colour}">{escape(name)}</text>')
    return _drawing(title, [f'<g transform="translate(0,30)">{"".join(parts)}</g>'])


def _drawing(title: str, panels: Sequence[str]) -> str:
    height = 30 + _HEIGHT * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="10" y="20" font-size="13">{escape(title)}</text>{"".join(panels)}</svg>\n'
    )


def _panel(name: str, ordered: list[float], index: int) -> str:
    most = ordered[-1] or 1.0
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - 20

    def at(value: float, share: float) -> str:
        return f"{_LEFT + value / most * (right - _LEFT):.1f},{bottom - share * (bottom - _TOP):.1f}"

    # a few hundred points draw any distribution
    shares = [i / min(400, len(ordered)) for i in range(min(400, len(ordered)) + 1)]
    line = " ".join(at(percentile(ordered, share), share) for share in shares)
    parts = [
        f'<text x="{_LEFT}" y="{_TOP - 10}">{escape(name)}, of {len(ordered)}</text>',
        f'<path d="M{_LEFT},{_TOP}V{bottom}H{right}" fill="none" stroke="black"/>',
        f'<text x="{_LEFT - 8}" y="{_TOP + 4}" text-anchor="end">100%</text>',
        f'<text x="{_LEFT - 8}" y="{bottom + 4}" text-anchor="end">0%</text>',
        f'<text x="{_LEFT}" y="{bottom + 16}" text-anchor="middle">0</text>',
        f'<text x="{right}" y="{bottom + 16}" text-anchor="end">{most:.1f}</text>',
        f'<polyline points="{line}" fill="none" stroke="#1f5fbf" stroke-width="2"/>',
    ]
    for share, colour in ((0.5, "#2a8f2a"), (0.9, "#d08000"), (0.99, "#c02020")):
        value = percentile(ordered, share)
        x, _, y = at(value, share).partition(",")
        # on the side that has room
        side, shift = ("start", 6) if float(x) < _WIDTH / 3 else ("end", -6)
        parts += [
            f'<path d="M{x},{y}V{bottom}" stroke="{colour}" stroke-dasharray="3,3"/>',
            f'<text x="{float(x) + shift:.1f}" y="{float(y) + 12:.1f}" fill="{colour}" text-anchor="{side}">'
            f"p{share * 100:.0f} {value:.1f}</text>",
        ]
    return f'<g transform="translate(0,{30 + index * _HEIGHT})">{"".join(parts)}</g>'
