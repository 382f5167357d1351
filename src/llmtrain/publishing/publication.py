"""Publishes a model: finds its source, checks it, writes the folder's files, records the publication.

weights, tokenizer, … as they are  ┐
README.md, curves.svg, config.yaml ┼─ a temporary folder ─ checked ─▶ artifacts/models/<run_id>
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
    *("time", "data", "rows", "tokens", "precision", "baseline_precision", "scores", "baseline_scores", "comparison"),
    *("definitions", "signatures"),
)
"""Keys of metrics.json that are published: none has paths of this machine or rows."""


def origin_of(source: Source, root: Path) -> Source:
    """Return the checkpoint from which `source` was exported or merged; else `source` itself."""
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
    """Return the destination, after all checks that need no model; `train` makes them at step 0.

    `name` is the run's id. Raises ConfigError with what to change; RunError if the Hub does not answer.
    """
    if (repo_id := settings.repo_id) is None:
        folder = Path(settings.to) if settings.to is not None else ARTIFACTS / name
        check_free(folder, force=force)
        return folder
    check_may_write(repo_id, private=settings.private)
    return Repository(repo_id)


def settings_of(source: Source, given: Mapping[str, Any]) -> PublishConfig:
    """Return the `publish` section of the run's config, updated by `given`. Raises ConfigError for wrong values."""
    section = source.config.publish if source.config is not None else None
    values = {**(section.model_dump() if section is not None else {}), **given}
    if "license" not in values:
        if str(values.get("to", "")).startswith(HUB):
            raise ConfigError(
                "a published model needs a licence: name it with --license (mit, apache-2.0, llama3.1, other …), or in "
                "publish.license of the config"
            )
        log.warning("no licence is named (--license, publish.license): the card says `other`; the Hub would need one")
        values["license"] = "other"
    return section_of(PublishConfig, values, name="publish")


def check_complete(source: Source, settings: PublishConfig) -> None:
    """Check the files of the model.

    Raises ConfigError for a missing file, and for a base that only this machine has; RunError for a file that was
    changed after it was saved or exported.
    """
    folder = source.folder
    if is_adapter_folder(folder):
        missing = [] if (folder / ADAPTER_WEIGHTS).is_file() else [ADAPTER_WEIGHTS]
    else:
        missing = missing_files(folder, weights=True)
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}")
    base = base_of(folder, trust_remote_code=source.trusts_code)
    if base is not None:
        reject_local_base(base_of_adapter(folder)[0], settings)
    if find_tokenizer([folder, *([base] if base else [])]) is None:
        raise ConfigError(f"{folder} has no tokenizer, without which nobody can use the model: copy it there")
    expected = json_object(folder / EXPORT_FILE, problems=[]).get("files", {})
    if source.run is not None:
        saved = json_object(folder.parent / MANIFEST, problems=[]).get("files", {})
        expected = {name.removeprefix(f"{folder.name}/"): entry for name, entry in saved.items()}
    for name, entry in files_in(folder).items():
        known = expected.get(name)
        if known is not None and known["sha256"] != entry["sha256"]:
            raise RunError(f"not published: {folder / name} was changed after it was saved (its sha256 differs)")


def reject_local_base(base: str, settings: PublishConfig) -> None:
    """Raise ConfigError if an adapter is published to the Hub, and its base is a folder of this machine."""
    if settings.repo_id is not None and settings.base_model is None and Path(base).expanduser().is_dir():
        raise ConfigError(
            f"the model is an adapter of {base}, which is only on this machine: name the base's id on the Hub "
            "(--base-model USER/NAME, publish.base_model), or merge the adapter and publish the result: llmtrain merge"
        )


# -- the folder --------------------------------------------------------------------------------------------------------


def fill_folder(
    folder: Path, *, source: Source, origin: Source, settings: PublishConfig, evaluation: Evaluation | None
) -> dict[str, Any]:
    """Write all files, and search them for secrets; return the content of publish.json.

    The model is loaded once, which checks that it can be.
    """
    card, curves = make_card(source, origin, settings, evaluation)
    (folder / CARD_FILE).write_text(render(card), encoding="utf-8")
    if card.has_curves and (picture := loss_picture(curves, title=f"Loss of {origin.name}")):
        (folder / CURVES_FILE).write_text(picture, encoding="utf-8")
    if card.config is not None:
        (folder / CONFIG_FILE).write_text(card.config, encoding="utf-8")
    if evaluation is not None:
        shown = public({key: value for key, value in evaluation.document.items() if key in EVALUATION_KEYS})
        (folder / EVALUATION_FILE).write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
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
    entry = {key: done[key] for key in names if key in done}
    on_hub = f"{str(done['to']).removeprefix(HUB_PREFIX)}@{done['revision']}" if "revision" in done else None
    if source.run is not None:
        with (source.run / RECORD).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"checkpoint": source.checkpoint, **entry}) + "\n")
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / PUBLISHED_NAME, {"model": on_hub or done["to"], "source": source.name, **entry})
