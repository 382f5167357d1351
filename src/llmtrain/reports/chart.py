"""Draws charts of counts as SVG: columns, rows of bars, points on logarithmic axes. Light and dark, no script, no font.

numbers ─ columns | shares | points ─▶ templates/chart.svg
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from llmtrain.reports.html import render
from llmtrain.reports.loss_picture import ticks

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 744, 16, 250
ROW = 24
NAMES_END = 210
"""Pixels that names of rows take on the left."""
LONGEST_NAME = 28


class Axis(NamedTuple):
    """An axis from `low` to `high`, at pixels `begin` to `end`."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, at = (math.log10(x) if self.is_log else x for x in (self.low, self.high, max(value, self.low)))
        return round(self.begin + (self.end - self.begin) * (at - low) / (high - low), 1)


def columns(bars: Sequence[tuple[str, int]], *, title: str, x_title: str, y_title: str) -> str:
    """Return a chart with a column for each label. Below a label such as `8–15` stands where it begins."""
    marks = [tick for tick in ticks(0, max((count for _, count in bars), default=1)) if tick == int(tick)]
    y = Axis(0, marks[-1], BOTTOM, TOP)
    room = (RIGHT - LEFT) / max(1, len(bars))
    step = max(1, -(-(len(bars) * 56) // (RIGHT - LEFT)))  # labels need about 56 pixels each
    drawn, texts = [], []
    for number, (label, count) in enumerate(bars):
        left, top = LEFT + room * number, y.place(count)
        box = {"x": round(left + room * 0.08, 1), "y": top, "width": round(room * 0.84, 1)}
        drawn.append({**box, "height": round(BOTTOM - top, 1), "label": f"{label}: {count:,}"})
        if number % step == 0:
            texts.append(_text(left + room / 2, BOTTOM + 18, label.partition("–")[0]))
    return _chart(title, x_title, y_title, grid=_levels(y, marks), bars=drawn, texts=[*texts, *_names_of(y, marks)])


def shares(rows: Sequence[tuple[str, float]], *, title: str) -> str:
    """Return a chart with a row for each name: its share as a bar, and in numbers."""
    most = max((share for _, share in rows), default=1) or 1
    x = Axis(0, most, NAMES_END, RIGHT - 60)
    bars, texts = [], []
    for number, (name, share) in enumerate(rows):
        top = 8 + ROW * number
        width = round(max(1.0, x.place(share) - NAMES_END), 1)
        bars.append({"x": NAMES_END, "y": top, "width": width, "height": ROW - 8, "label": f"{name}: {share:.2%}"})
        shown = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
        texts.append(_text(NAMES_END - 8, top + 13, shown, "end"))
        texts.append(_text(NAMES_END + width + 6, top + 13, f"{share:.1%}", "start"))
    return render(
        "chart.svg",
        title=title,
        width=WIDTH,
        height=16 + ROW * max(1, len(rows)),
        grid=[],
        bars=bars,
        dots=[],
        lines=[],
        texts=texts,
    )


def points(
    dots: Sequence[tuple[float, float, str]],
    *,
    title: str,
    x_title: str,
    y_title: str,
    is_log_x: bool = True,
    line: tuple[tuple[float, float], tuple[float, float]] | None = None,
) -> str:
    """Return a chart of (x, y, label) with a logarithmic y axis. `line`: two points that a straight line joins."""
    xs, ys = [dot[0] for dot in dots], [dot[1] for dot in dots]
    x_marks = _decades(xs) if is_log_x else ticks(min(xs), max(xs))
    y_marks = _decades(ys)
    x = Axis(x_marks[0], x_marks[-1], LEFT, RIGHT, is_log=is_log_x)
    y = Axis(y_marks[0], y_marks[-1], BOTTOM, TOP, is_log=True)
    ends = [(x.place(end[0]), y.place(min(end[1], y.high))) for end in line or ()]
    return _chart(
        title,
        x_title,
        y_title,
        grid=_levels(y, y_marks),
        dots=[{"x": x.place(one), "y": y.place(other), "label": label} for one, other, label in dots],
        lines=[(*ends[0], *ends[1])] if ends else [],
        texts=[*_names_of(y, y_marks), *(_text(x.place(mark), BOTTOM + 18, _short(mark)) for mark in x_marks)],
    )


def _chart(title: str, x_title: str, y_title: str, *, texts: Sequence[Any], **marks: Any) -> str:
    titles = [_text((LEFT + RIGHT) / 2, HEIGHT - 8, f"{y_title} by {x_title}")]
    shown = {"bars": [], "dots": [], "lines": [], **marks}
    return render("chart.svg", title=title, width=WIDTH, height=HEIGHT, texts=[*texts, *titles], **shown)


def _levels(y: Axis, marks: Sequence[float]) -> list[tuple[float, float, float, float]]:
    return [(LEFT, y.place(mark), RIGHT, y.place(mark)) for mark in marks]


def _names_of(y: Axis, marks: Sequence[float]) -> list[dict[str, Any]]:
    return [_text(LEFT - 8, y.place(mark) + 4, _short(mark), "end") for mark in marks]


def _text(x: float, y: float, text: str, anchor: str = "middle") -> dict[str, Any]:
    return {"x": round(x, 1), "y": round(y, 1), "text": text, "anchor": anchor}


def _decades(values: Sequence[float]) -> list[float]:
    """Return powers of ten that enclose positive values."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
