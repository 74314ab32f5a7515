"""Distributions as an SVG: which share of the measurements was at most so large. Text, so no plotting library is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from sightline.bench.report import percentile

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 220, 50, 34, 36


def distributions(title: str, measured: Mapping[str, Sequence[float]]) -> str:
    """One panel for each non-empty series, with its median, 90th and 99th percentile marked."""
    panels = [
        _panel(name, sorted(values), i) for i, (name, values) in enumerate((n, v) for n, v in measured.items() if v)
    ]
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
