"""Draws the loss of a run as a picture: one small SVG, light and dark, with no script and no font in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmtrain.reports.html import render

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 744, 16, 260
_NUM_TICKS = 6


def loss_picture(curves: Mapping[str, Any], *, title: str) -> str | None:
    """Return the SVG of train/loss and val/loss, as `as_drawn` gives curves; None where there is none of them."""
    train, val = (_points(curves.get(name)) for name in ("train/loss", "val/loss"))
    points = train + val
    if not points:
        return None
    x_ticks = ticks(0, max(step for step, _ in points))
    y_ticks = ticks(min(value for _, value in points), max(value for _, value in points))
    lowest, highest = y_ticks[0], y_ticks[-1]

    def x_of(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * step / x_ticks[-1], 1)

    def y_of(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - lowest) / (highest - lowest), 1)

    train, val = ([(x_of(step), y_of(value)) for step, value in curve] for curve in (train, val))
    return render(
        "loss.svg",
        title=title,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        bottom=BOTTOM,
        x_ticks=[(f"{tick:,.0f}", x_of(tick)) for tick in x_ticks],
        y_ticks=[(f"{tick:g}", y_of(tick)) for tick in y_ticks],
        lines=[(name, line) for name, line, fewest in (("train", train, 1), ("val", val, 2)) if len(line) >= fewest],
        dots=val,
        shown=[name for name, curve in (("training (line)", train), ("validation (dots)", val)) if curve],
    )


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers that lie 1, 2 or 5 times a power of ten apart and enclose `low` and `high`."""
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
