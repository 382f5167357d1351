"""Draws the graph of bigrams as SVG: tokens as circles, the more frequent the larger; bigrams as arrows, as thick."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmtrain.reports.html import render

WIDTH, HEIGHT = 760, 560
MARGIN = 56
SMALLEST, LARGEST = 8.0, 24.0
THINNEST, THICKEST = 0.8, 5.0
BEND = 0.16
"""Height of an arrow's curve as a share of its length, so that a → b and b → a lie apart."""
LONGEST_NAME = 14


def bigram_picture(drawn: Mapping[str, Any], *, title: str) -> str:
    """Return the SVG. `drawn` is what `describe_bigrams` says is to be drawn."""
    most = max((token["transitions"] for token in drawn["tokens"]), default=1)
    strongest = max((edge["count"] for edge in drawn["edges"]), default=1)
    places = _places(drawn["tokens"])
    tokens = []
    for token in drawn["tokens"]:
        x, y = places[token["id"]]
        radius = _between(SMALLEST, LARGEST, math.sqrt(token["transitions"] / most))
        name = shown_token(token["token"], longest=LONGEST_NAME)
        label = f"{name}: {token['transitions']:,} transitions"
        tokens.append(
            {"id": token["id"], "x": x, "y": y, "text_y": y + 4, "radius": radius, "name": name, "label": label}
        )
    radii = {token["id"]: token["radius"] for token in tokens}
    edges = []
    for edge in drawn["edges"]:
        width = _between(THINNEST, THICKEST, math.sqrt(edge["count"] / strongest))
        a, b = edge["from_id"], edge["to_id"]
        label = f"{shown_token(edge['from'])} → {shown_token(edge['to'])}: {edge['count']:,}"
        path, head = _loop(places[a], radii[a]) if a == b else _arrow(places[a], places[b], radii[a], radii[b], width)
        edges.append({"path": path, "head": head, "width": width, "label": label})
    return render("bigrams.svg", title=title, width=WIDTH, height=HEIGHT, tokens=tokens, edges=edges)


def shown_token(text: str, *, longest: int = 40) -> str:
    """Return a token as people see it: blanks and line ends as signs, cut to `longest` characters."""
    signs = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\ufeff", "\\ufeff")
    signs = "".join("\ufffd" if ord(one) & 0xFFFE == 0xFFFE else one for one in signs[: longest + 1])
    return signs if len(signs) <= longest else signs[: longest - 1] + "…"


def _places(tokens: list[Mapping[str, Any]]) -> dict[int, tuple[float, float]]:
    """Return the pixels of each token: the drawing filled with the places that the layout gave."""
    found = {}
    spans = []
    for axis, size in (("x", WIDTH), ("y", HEIGHT)):
        values = [token[axis] for token in tokens]
        low, high = min(values), max(values)
        spans.append((low, (size - 2 * MARGIN) / (high - low) if high > low else 0.0))
    (x_low, x_scale), (y_low, y_scale) = spans
    for token in tokens:
        x, y = MARGIN + (token["x"] - x_low) * x_scale, MARGIN + (token["y"] - y_low) * y_scale
        found[token["id"]] = (round(x, 1), round(y, 1))
    return found


def _arrow(a: tuple[float, float], b: tuple[float, float], begin: float, end: float, width: float) -> tuple[str, str]:
    """Return the curve from the rim of a circle to that of another, and its head."""
    length = math.dist(a, b) or 1.0
    ux, uy = (b[0] - a[0]) / length, (b[1] - a[1]) / length
    middle = ((a[0] + b[0]) / 2 - uy * BEND * length, (a[1] + b[1]) / 2 + ux * BEND * length)
    arriving = math.dist(middle, b) or 1.0
    vx, vy = (b[0] - middle[0]) / arriving, (b[1] - middle[1]) / arriving
    size = 5 + width
    tip = (b[0] - vx * (end + 1), b[1] - vy * (end + 1))
    neck = (tip[0] - vx * size, tip[1] - vy * size)
    start = (a[0] + ux * begin, a[1] + uy * begin)
    path = f"M{_at(start)}Q{_at(middle)} {_at(neck)}"
    sides = [(neck[0] - vy * size / 2, neck[1] + vx * size / 2), (neck[0] + vy * size / 2, neck[1] - vx * size / 2)]
    return path, f"M{_at(tip)}L{_at(sides[0])}L{_at(sides[1])}Z"


def _loop(place: tuple[float, float], radius: float) -> tuple[str, str]:
    """Return the curve of a token that follows itself, above its circle, and its head."""
    x, y = place
    top = y - radius
    tip = (x + radius * 0.5, top + radius * 0.13)
    start, left, right = (x - radius * 0.5, tip[1]), (x - radius * 1.2, top - 26), (x + radius * 1.2, top - 26)
    path = f"M{_at(start)}C{_at(left)} {_at(right)} {_at(tip)}"
    return path, f"M{_at(tip)}L{_at((tip[0] - 1, tip[1] - 9))}L{_at((tip[0] + 7, tip[1] - 6))}Z"


def _between(low: float, high: float, share: float) -> float:
    return round(low + (high - low) * share, 1)


def _at(point: tuple[float, float]) -> str:
    return f"{point[0]:.1f} {point[1]:.1f}"
