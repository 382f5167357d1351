"""What `train` does for a config with `publish`: the preflight at step 0, evaluation and publish at the end.

The evaluation runs in a process of its own: this one was part of a group of processes, which are gone by then.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.config.errors import ConfigError, RunError
from llmtrain.config.huggingface import HuggingFaceConfig
from llmtrain.config.schema import Config
from llmtrain.recipes.publish import preflight, publish, refuse_local_base

log = logging.getLogger("llmtrain.publish")

_OF_A_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which a process knows that it is one of several; and those of torchrun."""


def check_publishing(config: Config, *, run_id: str) -> None:
    """Whatever of publishing can be refused before the first step. Raises as `publish.preflight`, and ConfigError."""
    settings = config.publish
    assert settings is not None
    if settings.require_improvement is not None and not config.evaluation.files:
        raise ConfigError(
            f"publish.require_improvement {settings.require_improvement} needs rows to compare on: name files in "
            "evaluation.data"
        )
    model = config.model
    if isinstance(model, HuggingFaceConfig) and model.lora is not None:
        refuse_local_base(model.path, settings)
    place = preflight(run_id, settings)
    log.info("will be published: %s", place if isinstance(place, Path) else f"hub:{place.repo_id}")


def publish_trained(config: Config, run: Path) -> dict[str, Any]:
    """Evaluate the run's model, where the config names rows, and publish it; as `publish`.

    Raises RunError that says how to do it again: the model is there.
    """
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
