"""`lineage`: where a model came from, and whether all of it is still there unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.generation.open_model import locate_model
from llmtrain.publishing.ancestry import Ancestry, Node
from llmtrain.reports.lineage_picture import lineage_picture
from llmtrain.runs.stores import runs_folder


def lineage(ref: str, *, root_dir: str = "runs", check: bool = False, picture: str | None = None) -> dict[str, Any]:
    """Return the tree of what the model `ref` was made from; with `check`, compare every file with its hash.

    `picture`: an SVG file to draw the tree into. Raises ConfigError for a model that does not exist, or a picture that
    cannot be written.
    """
    tree = Ancestry(runs_folder(root_dir), check=check)
    root = tree.model(locate_model(ref, root_dir=root_dir))
    if picture is not None:
        try:
            Path(picture).write_text(lineage_picture(root), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{picture}: cannot be written ({error.strerror}); name another file") from None
    problems = [problem for node in _walk(root) for problem in node["problems"]]
    return {"lineage": root, "checked": check, "unchanged": not problems if check else None, "problems": problems}


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node["made_from"]:
        yield from _walk(child)
