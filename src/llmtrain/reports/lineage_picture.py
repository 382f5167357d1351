"""Draws the lineage of a model as a picture: one SVG, light and dark, with no script in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from llmtrain.reports.html import render

ROW, BOX, INDENT, WIDTH = 62, 48, 28, 760
LONGEST: Final = 88
"""Characters of a line that fit into the widest box."""


def lineage_picture(root: Mapping[str, Any]) -> str:
    """Return the SVG of a tree of nodes {kind, name, facts, problems, made_from}: a box a node, indented by depth."""
    boxes: list[dict[str, Any]] = []
    for number, (node, depth, parent) in enumerate(_rows(root)):
        facts = [
            f"{label} {node['facts'][label]}"
            for label in ("checkpoint", "commit", "revision", "files", "sha256")
            if label in node["facts"]
        ]
        boxes.append(
            {
                "x": 10 + INDENT * depth,
                "y": 10 + ROW * number,
                "parent_y": None if parent is None else 10 + ROW * parent + BOX,
                "title": _cut(f"{node['kind']}: {node['name']}", depth),
                "line": _cut(node["problems"][0] if node["problems"] else " · ".join(facts), depth),
                "wrong": bool(node["problems"]),
            }
        )
    return render("lineage.svg", width=WIDTH, height=20 + ROW * len(boxes), boxes=boxes, box=BOX, indent=INDENT)


def _rows(root: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], int, int | None]]:
    """Yield each node, its depth, and the number of the row of its parent; a parent before its children."""
    stack: list[tuple[Mapping[str, Any], int, int | None]] = [(root, 0, None)]
    number = 0
    while stack:
        node, depth, parent = stack.pop()
        yield node, depth, parent
        stack += [(child, depth + 1, number) for child in reversed(node["made_from"])]
        number += 1


def _cut(text: str, depth: int) -> str:
    """Shorten a line to what fits into a box at this depth."""
    longest = max(20, LONGEST - 4 * depth)
    return text if len(text) <= longest else text[: longest - 1] + "…"
