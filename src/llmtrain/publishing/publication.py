"""Publish a model: find its source, check it, write the folder's files, record it.

weights, tokenizer, … as they are ─┐
README.md, curves.svg, config.yaml ┼─ a folder beside its place ─ checked ─▶ artifacts/models/<run_id>
publish.json                       ┘
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llmtrain._version import __version__
from llmtrain.atomic import write_json
from llmtrain.config.loading.load import load_config, section_of
from llmtrain.config.sections.publishing import HUB, HUB_PREFIX, PublishConfig
from llmtrain.errors import ConfigError, RunError
from llmtrain.evaluation.folder import PUBLISHED_NAME
from llmtrain.generation.open_model import base_of, config_beside, load_language_model, trusts_code
from llmtrain.models.fetch import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of_adapter, is_adapter_folder, missing_files
from llmtrain.publishing.card import make_card
from llmtrain.publishing.exported import Source, described, files_in
from llmtrain.publishing.hub import check_may_write
from llmtrain.publishing.improvement import Evaluation
from llmtrain.publishing.model_card import CARD_FILE, CONFIG_FILE, CURVES_FILE, render
from llmtrain.publishing.place import EXPORT_FILE, PUBLISH_FILE, check_free
from llmtrain.publishing.public_text import public
from llmtrain.publishing.secret_files import check_no_secrets
from llmtrain.publishing.transformers_folder import find_tokenizer, write_companions
from llmtrain.reports.loss_picture import loss_picture
from llmtrain.runs.folders import is_run
from llmtrain.runs.json_files import json_object
from llmtrain.training.checkpoint import MANIFEST

log = logging.getLogger("llmtrain.publish")

ARTIFACTS = Path("artifacts") / "models"
RECORD = "published.jsonl"
"""File in the run's folder with a line for each publication."""
EVALUATION_FILE = "evaluation.json"
EVALUATION_KEYS = (
    *("time", "data", "rows", "tokens", "scores", "baseline_scores", "comparison", "definitions", "signatures"),
)
"""Keys of metrics.json that are published: no paths of this machine, and no rows."""


def origin_of(source: Source, root: Path) -> Source:
    """The checkpoint that `source` was made from, where it is what `export` or `merge` made of one; else `source`."""
    made_of = json_object(source.folder / EXPORT_FILE, problems=[]).get("source") or {}
    run = root.absolute() / str(made_of.get("name"))
    if source.run is not None or not is_run(run):
        return source
    folder = run / "checkpoints" / str(made_of.get("checkpoint")) / "model"
    config = config_beside(folder) or load_config(str(run / "config.yaml")).config
    return Source(folder=folder, name=run.name, run=run, config=config, trusts_code=trusts_code(config))


# -- preflight ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repository:
    """Repository on the Hub."""

    repo_id: str


def preflight(name: str, settings: PublishConfig, *, force: bool = False) -> Path | Repository:
    """Return the destination, after all checks that need no model: `train` asks at step 0. `name` is the run's id.

    Raises ConfigError with what to change; RunError where the Hub does not answer.
    """
    if (repo_id := settings.repo_id) is None:
        folder = Path(settings.to) if settings.to is not None else ARTIFACTS / name
        check_free(folder, force=force)
        return folder
    check_may_write(repo_id, private=settings.private)
    return Repository(repo_id)


def settings_of(source: Source, given: Mapping[str, Any]) -> PublishConfig:
    """The `publish` section of the run's config, with what was given. ConfigError for what is wrong in it."""
    section = source.config.publish if source.config is not None else None
    values = {**(section.model_dump() if section is not None else {}), **given}
    if "license" not in values:
        if str(values.get("to", "")).startswith(HUB):
            raise ConfigError(
                "a published model has a licence: name it with --license (mit, apache-2.0, llama3.1, other …), or in "
                "publish.license of the config"
            )
        log.warning("no licence is named (--license, publish.license): the card says `other`, and the Hub takes none")
        values["license"] = "other"
    return section_of(PublishConfig, values, name="publish")


def check_complete(source: Source, settings: PublishConfig) -> None:
    """ConfigError for a file that is missing, or a base that nobody else has; RunError for a file that is not what was
    saved or exported."""
    folder = source.folder
    if is_adapter_folder(folder):
        missing = [] if (folder / ADAPTER_WEIGHTS).is_file() else [ADAPTER_WEIGHTS]
    else:
        missing = missing_files(folder, weights=True)
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}")
    base = base_of(folder, trust_remote_code=source.trusts_code)
    if base is not None:
        refuse_local_base(base_of_adapter(folder)[0], settings)
    if find_tokenizer([folder, *([base] if base else [])]) is None:
        raise ConfigError(f"{folder} has no tokenizer, and nobody can use a model without one: put it there")
    expected = json_object(folder / EXPORT_FILE, problems=[]).get("files", {})
    if source.run is not None:
        saved = json_object(folder.parent / MANIFEST, problems=[]).get("files", {})
        expected = {name.removeprefix(f"{folder.name}/"): about for name, about in saved.items()}
    for name, about in files_in(folder).items():
        known = expected.get(name)
        if known is not None and known["sha256"] != about["sha256"]:
            raise RunError(f"not published: {folder / name} is not what was saved (its sha256 is another one)")


def refuse_local_base(base: str, settings: PublishConfig) -> None:
    """ConfigError where an adapter goes to the Hub, and its base is a folder that nobody else has."""
    if settings.repo_id is not None and settings.base_model is None and Path(base).expanduser().is_dir():
        raise ConfigError(
            f"the model is an adapter of {base}, which is on this machine alone: name the base's id on the Hub "
            "(--base-model USER/NAME, publish.base_model), or publish the whole: llmtrain merge"
        )


# -- the folder --------------------------------------------------------------------------------------------------------


def fill_folder(
    folder: Path, *, source: Source, origin: Source, settings: PublishConfig, evaluation: Evaluation | None
) -> dict[str, Any]:
    """Write all files, and look through them; returns publish.json. Loading the model once shows that it can be."""
    card, curves = make_card(source, origin, settings, evaluation)
    (folder / CARD_FILE).write_text(render(card), encoding="utf-8")
    if card.has_curves and (picture := loss_picture(curves, title=f"Loss of {origin.name}")):
        (folder / CURVES_FILE).write_text(picture, encoding="utf-8")
    if card.config is not None:
        (folder / CONFIG_FILE).write_text(card.config, encoding="utf-8")
    if evaluation is not None:
        told = public({key: value for key, value in evaluation.document.items() if key in EVALUATION_KEYS})
        (folder / EVALUATION_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    for path in sorted(path for path in source.folder.iterdir() if path.is_file()):
        if path.name not in (CARD_FILE, PUBLISH_FILE):
            shutil.copyfile(path, folder / path.name)
    if settings.base_model is not None and is_adapter_folder(folder):
        described_adapter = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        described_adapter["base_model_name_or_path"] = settings.base_model
        (folder / ADAPTER_CONFIG).write_text(json.dumps(described_adapter, indent=2) + "\n", encoding="utf-8")
    # What was made of a run has the very code that this run was told to trust: its files have just been compared.
    trusted = source.trusts_code or origin.trusts_code
    opened = load_language_model(source.folder, device=torch.device("cpu"), trust_remote_code=trusted)
    base = base_of(source.folder, trust_remote_code=trusted)
    sources = [source.folder, *([base] if base else [])]
    write_companions(folder, sources=sources, eos_ids=opened.stop_ids(chat=opened.chats))
    document = {
        "source": {**described(source), "run": origin.name if origin.run is not None else None},
        "license": settings.license,
        "base_model": card.base_model,
        "comparison": dict(card.comparison),
        "required_improvement": settings.require_improvement,
        "files": files_in(folder),
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
    }
    write_json(folder / PUBLISH_FILE, document)
    check_no_secrets(folder)
    return document


def record(source: Source, done: Mapping[str, Any], *, root: Path) -> None:
    """Record the publication in the run, and as the baseline that `eval --baseline last-published` finds."""
    names = ("to", "revision", "url", "published", "license", "required_improvement")
    about = {key: done[key] for key in names if key in done}
    on_hub = f"{str(done['to']).removeprefix(HUB_PREFIX)}@{done['revision']}" if "revision" in done else None
    if source.run is not None:
        with (source.run / RECORD).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"checkpoint": source.checkpoint, **about}) + "\n")
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / PUBLISHED_NAME, {"model": on_hub or done["to"], "source": source.name, **about})
