"""`publish`, top to bottom: preflight → card → files → checks → the place → the run's record and the new baseline.

`train` does the same for a config with `publish`: the preflight at step 0, an evaluation and this at its end. The
evaluation runs in a process of its own: the training process was part of a group of processes, which are gone by then.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.publishing import HUB_PREFIX
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError, RunError
from llmtrain.publishing.exported import find_source
from llmtrain.publishing.hub import upload
from llmtrain.publishing.improvement import check_improvement, find_evaluation
from llmtrain.publishing.place import new_folder, passing_folder
from llmtrain.publishing.publication import (
    check_complete,
    fill_folder,
    origin_of,
    preflight,
    record,
    reject_local_base,
    settings_of,
)
from llmtrain.runs.stores import runs_folder

log = logging.getLogger("llmtrain.publish")

_OF_A_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which a process knows that it is one of several; and those of torchrun."""


def publish(
    model: str,
    *,
    given: Mapping[str, Any],
    root_dir: str = "runs",
    force: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Publish what `model` names, to a folder or the Hub; returns what is in its publish.json, and where it is.

    `given` are keys of the `publish` section that win over those of the run's config. Raises ConfigError for what is
    missing or wrong, before anything is written; RunError where it is refused (no gain, a secret, a damaged file), or
    the Hub does not answer.
    """
    source = find_source(model, root_dir=root_dir, trust_remote_code=trust_remote_code)
    origin = origin_of(source, runs_folder(root_dir))
    settings = settings_of(origin, given)
    evaluation = find_evaluation(
        [*([origin.run / "eval"] if origin.run is not None else []), runs_folder(root_dir).absolute() / "eval"],
        models=[source.folder, origin.folder],
    )
    if settings.require_improvement is not None:
        check_improvement(evaluation, settings.require_improvement, how=f"llmtrain eval {model} --data FILE")
    check_complete(source, settings)
    place = preflight(origin.name, settings, force=force)
    fill = partial(fill_folder, source=source, origin=origin, settings=settings, evaluation=evaluation)
    if isinstance(place, Path):
        with new_folder(place, force=force) as folder:
            document = fill(folder)
        done = {"to": str(place.absolute()), **document}
    else:
        with passing_folder(origin.name) as folder:
            document = fill(folder)
            uploaded = upload(folder, place.repo_id, message=f"Publish {origin.name}")
        done = {"to": f"{HUB_PREFIX}{place.repo_id}", "revision": uploaded.revision, "url": uploaded.url, **document}
    record(origin, done, root=runs_folder(root_dir))
    return done


def check_publishing(config: Config, *, run_id: str) -> None:
    """Check what can be checked before the first step. Raises as `preflight`, and ConfigError for missing rows."""
    settings = config.publish
    assert settings is not None
    if settings.require_improvement is not None and not config.evaluation.files:
        raise ConfigError(
            f"publish.require_improvement {settings.require_improvement} needs rows to compare on: name files in "
            "evaluation.data"
        )
    model = config.model
    if isinstance(model, HuggingFaceConfig) and model.lora is not None:
        reject_local_base(model.path, settings)
    place = preflight(run_id, settings)
    log.info("will be published: %s", place if isinstance(place, Path) else f"hub:{place.repo_id}")


def publish_trained(config: Config, run: Path) -> dict[str, Any]:
    """Evaluate the run's model, where the config names rows, and publish it; as `publish`.

    Raises RunError that says how to do it again: the model is there.
    """
    gc.collect()  # compiled blocks hold themselves: the memory of what was trained is for the model that is loaded now
    root = config.output.root_dir
    try:
        if config.evaluation.files:
            _evaluate(run, root)
        return publish(str(run), given={}, root_dir=root)
    except (ConfigError, RunError) as error:
        raise RunError(
            f"the model is trained ({run / 'model'}), but {error}. To publish it: llmtrain publish {run}"
        ) from error


def _evaluate(run: Path, root: str) -> None:
    command = [sys.executable, "-m", "llmtrain", "eval", str(run), "--root-dir", root]
    done = subprocess.run(command, env=_alone(os.environ), stdout=subprocess.PIPE, text=True, check=False)
    log.info("%s", done.stdout.strip())
    if done.returncode:
        raise RunError(f"it could not be evaluated (exit code {done.returncode}; {' '.join(command[2:])})")


def _alone(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environ.items()
        if name not in _OF_A_GROUP and not name.startswith("TORCHELASTIC_")
    }
