"""The loss of a run as a picture: one small SVG, light and dark, with no script and no font in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 744, 16, 260
_STYLE = (
    "text{fill:#44516a}.grid{stroke:#d5dbe6}.train{fill:none;stroke:#4668a8;stroke-width:1.6}"
    ".val{fill:none;stroke:#c2571a;stroke-width:2}.dot{fill:#c2571a}"
    "@media (prefers-color-scheme: dark){text{fill:#b8c5dd}.grid{stroke:#3a455a}.train{stroke:#8fb0ee}"
    ".val{stroke:#f0a06a}.dot{fill:#f0a06a}}"
)
_NUM_TICKS = 6


def loss_picture(curves: Mapping[str, Any], *, title: str) -> str | None:
    """The SVG of train/loss and val/loss, as `as_drawn` gives curves; None where there is none of them."""
    train, val = (_points(curves.get(name)) for name in ("train/loss", "val/loss"))
    if not train and not val:
        return None
    points = train + val
    x_ticks = ticks(0, max(step for step, _ in points))
    y_ticks = ticks(min(value for _, value in points), max(value for _, value in points))
    lowest, highest = y_ticks[0], y_ticks[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * step / x_ticks[-1]
        return round(x, 1), round(BOTTOM - (BOTTOM - TOP) * (value - lowest) / (highest - lowest), 1)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        'font-size="12">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
    ]
    for tick in y_ticks:
        y = place(0, tick)[1]
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        lines.append(f'<text x="{place(tick, lowest)[0]}" y="{BOTTOM + 18}" text-anchor="middle">{tick:,.0f}</text>')
    if train:
        lines.append(f'<path class="train" d="{_path([place(*point) for point in train])}"/>')
    if len(val) > 1:
        lines.append(f'<path class="val" d="{_path([place(*point) for point in val])}"/>')
    lines += [f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>' for x, y in (place(*point) for point in val)]
    named = " · ".join(name for name, shown in (("training (line)", train), ("validation (dots)", val)) if shown)
    lines.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">loss by step: {named}</text>')
    return "\n".join([*lines, "</svg>\n"])


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, the first not over `low` and the last not under `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _points(curve: Any) -> list[tuple[float, float]]:
    if not curve:
        return []
    pairs = zip(curve["step"], curve["value"], strict=True)
    return [(float(step), float(value)) for step, value in pairs]


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in places)
