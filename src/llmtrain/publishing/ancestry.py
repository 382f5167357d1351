"""Builds the tree of everything that a model was made from, back to the text, with what has changed since.

published folder ─▶ run ─┬─▶ checkpoint
                         ├─▶ base model ─▶ the run that made it ─▶ …
                         ├─▶ tokenizer
                         └─▶ training data, validation data ─▶ inputs
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llmtrain.atomic import file_sha256
from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.manifest import read_manifest
from llmtrain.data.prepare.inputs import inputs_are_here
from llmtrain.data.prepare.reuse import differences, options_as_today
from llmtrain.distributed.limits import usable_cores
from llmtrain.errors import ConfigError
from llmtrain.publishing.place import EXPORT_FILE, PUBLISH_FILE
from llmtrain.runs.folders import is_run
from llmtrain.runs.json_files import json_object
from llmtrain.runs.lineage import Ingredient, hashed_files, read_lineage
from llmtrain.training.checkpoint import CheckpointError, verify
from llmtrain.training.setup.ingredients import MODEL_FILES

DEEPEST: Final = 20
"""Longest chain of models that is followed."""
Node = dict[str, Any]
"""Keys: kind, name, facts (label → text), problems (sentences), made_from (nodes)."""


def _node(kind: str, name: str, facts: dict[str, Any], made_from: list[Node], problems: list[str]) -> Node:
    known = {label: str(value) for label, value in facts.items() if value is not None}
    return {"kind": kind, "name": name, "facts": known, "problems": problems, "made_from": made_from}


class Ancestry:
    """Builds the nodes. Runs that a published model only names are searched in `root`; `check` finds changes."""

    def __init__(self, root: Path, *, check: bool) -> None:
        self.root, self.check = root, check
        self._changed: dict[str, list[str]] = {}
        """Differences between shards and their text, by folder, since training and validation data share both."""

    def model(self, folder: Path, *, depth: int = 0) -> Node:
        """Return the node of a model's folder: of a run, exported, published, or of unknown origin."""
        run = folder.parent.parent.parent
        if is_run(run):
            return self._run(run, checkpoint=folder.parent, depth=depth)
        for file, kind in ((PUBLISH_FILE, "published model"), (EXPORT_FILE, "exported model")):
            if (folder / file).is_file():
                return self._made_of_run(folder, kind, file, depth=depth)
        facts = {"folder": folder, "files": "; ".join(_shown(hashed_files(folder, MODEL_FILES)))}
        return _node("model", folder.name, facts, [], [])

    def _made_of_run(self, folder: Path, kind: str, file: str, *, depth: int) -> Node:
        problems: list[str] = []
        record = json_object(folder / file, problems=problems)
        source = record.get("source") or {}
        facts = {"folder": folder, "made of": f"{source.get('name')} {source.get('checkpoint') or ''}".strip()}
        if self.check:
            hashes = {name: entry["sha256"] for name, entry in (record.get("files") or {}).items()}
            problems += Ingredient(kind=kind, name=folder.name, folder=str(folder), files=hashes).changes()
        run = self.root / str(source.get("run") or source.get("name"))
        if not is_run(run):
            problems += [f"{run}: no such run here, so its ingredients are not known"]
            return _node(kind, folder.name, facts, [], problems)
        checkpoint = run / "checkpoints" / str(source.get("checkpoint"))
        return _node(kind, folder.name, facts, [self._run(run, checkpoint=checkpoint, depth=depth)], problems)

    def _run(self, run: Path, *, checkpoint: Path, depth: int) -> Node:
        problems: list[str] = []
        meta = json_object(run / "meta.json", problems=problems)
        code = (meta.get("git") or {}).get("code") or {}
        facts = {
            "folder": run,
            "checkpoint": checkpoint.name,
            "began": meta.get("time"),
            "commit": f"{code['sha']}{' with changes' if code.get('dirty') else ''}" if code.get("sha") else None,
            "llmtrain": (meta.get("versions") or {}).get("llmtrain"),
            "config": f"sha256 {file_sha256(run / 'config.yaml')[:16]}…",
        }
        if not checkpoint.is_dir():
            problems.append(f"{checkpoint}: the checkpoint is not kept any more")
        elif self.check:
            try:
                verify(checkpoint)
            except CheckpointError as error:
                problems.append(str(error))
        made_from = [self._ingredient(found, depth=depth) for found in read_lineage(run, problems=problems)]
        return _node("run", run.name, facts, made_from, problems)

    def _ingredient(self, found: Ingredient, *, depth: int) -> Node:
        facts: dict[str, Any] = {"folder": found.folder, "revision": found.revision}
        facts["files"] = "; ".join(_shown(found.files)) or None
        facts |= {label: _short(value) for label, value in found.facts.items() if label != "inputs"}
        below = [
            _node("input", entry["path"], {"files": entry["files"], "sha256": f"{entry['sha256'][:16]}…"}, [], [])
            for entry in found.facts.get("inputs", [])
        ]
        folder = Path(found.folder) if found.folder else None
        if found.kind == "base model" and folder is not None and folder.is_dir() and depth < DEEPEST:
            origin = self.model(folder, depth=depth + 1)
            below += [origin] if origin["kind"] != "model" else []
        problems = [*found.changes(), *self._changed_inputs(found)] if self.check else []
        return _node(found.kind, found.name, facts, below, problems)

    def _changed_inputs(self, found: Ingredient) -> list[str]:
        if found.folder is None or not found.facts.get("inputs"):
            return []
        if found.folder not in self._changed:
            self._changed[found.folder] = _changed_inputs(found, Path(found.folder))
        return self._changed[found.folder]


def _changed_inputs(found: Ingredient, folder: Path) -> list[str]:
    """Return the differences between the text from which shards were made and the present text, which is hashed."""
    paths = [entry["path"] for entry in found.facts["inputs"]]
    try:
        recorded = options_as_today(found.facts["options"])
        asked = {key: value for key, value in recorded.items() if key in PrepareConfig.model_fields}
        options = PrepareConfig.model_validate({**asked, "input": paths, "output": str(folder)})
        if not inputs_are_here(options):
            return [f"{', '.join(paths)}: not all of this text is here any more"]
        return differences(read_manifest(folder), folder=folder, options=options, num_workers=usable_cores())
    except (ConfigError, ValueError) as error:
        return [str(error)]


def _shown(files: Mapping[str, str], *, most: int = 3) -> list[str]:
    shown = [f"{name} {sha256[:16]}…" for name, sha256 in list(files.items())[:most]]
    return [*shown, f"{len(files) - most} more"] if len(files) > most else shown


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(entry)}" for key, entry in value.items() if entry not in (None, [], {}))
    if isinstance(value, list):
        return ("; " if any(isinstance(entry, dict) for entry in value) else ", ").join(map(_short, value))
    return str(value)
