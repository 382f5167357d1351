"""The Python API: what `import llmtrain` offers, over the same verbs that the commands call. docs/python.md shows it.

`llmtrain/__init__.py` hands these names on when they are asked for, so that importing the package stays light.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.model import DecoderConfig
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.distributed.native_bf16 import with_computing_dtype
from llmtrain.errors import ConfigError
from llmtrain.generation.language_model import LanguageModel
from llmtrain.generation.open_model import device_named, open_model
from llmtrain.generation.precision import autocast_dtype
from llmtrain.models.folder import read_model_config
from llmtrain.models.weights import read_decoder
from llmtrain.verbs import evaluate as evaluation
from llmtrain.verbs import prepare as preparation
from llmtrain.verbs import train as training

AnyPath = str | os.PathLike[str]


def train(
    config: AnyPath | None = None, *, overrides: Sequence[str] = (), resume: str | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Train what a config describes, or go on with a run; returns the summary, with the run's and the model's folder.

    Args:
        config: a YAML or JSON file, or the name of a config that ships. A resumed run has its own.
        overrides: `key=value`, as on the command line: `["trainer.max_steps=50"]`.
        resume: a run id, run folder, checkpoint folder, or `latest`.
        dry_run: five forward steps, and no run is written.

    Raises:
        ConfigError: a mistake in what was asked for. Preempted, WillFailAgain, RunError: how else a run may end.
    """
    loaded = load_config(os.fspath(config), overrides) if config is not None else None
    return training.train(loaded, resume=resume, overrides=overrides, dry_run=dry_run)


def prepare(config: AnyPath, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Make the token shards that a config's `prepare` section describes, or tokenise its rows (data.name: chat);
    returns what was made.

    Raises ConfigError for a mistake in the config, bad files and lines; RunError when the disk is full.
    """
    return preparation.prepare(load_config(os.fspath(config), overrides))


def evaluate(
    model: AnyPath = "latest",
    *,
    data: Sequence[str] = (),
    config: AnyPath | None = None,
    overrides: Sequence[str] = (),
    steps: int | None = None,
    batch_size: int | None = None,
    root_dir: str | None = None,
) -> dict[str, Any]:
    """Loss (nats a token), perplexity and bits per byte of a model on `data`, or on its run's validation data.

    Of rows that ask something it also answers them, and compares a tuned model with its base; returns what
    metrics.json has (docs/evaluation.md).

    Args:
        data: rows or token shards; `evaluation.data` when not given.
        config: a file with an `evaluation` section, which says the rest; the run's own when not given.
        overrides: `key=value`, as on the command line: `["evaluation.max_new_tokens=64"]`.
        steps: batches of a loss; all when not given.

    Raises:
        ConfigError: what is not there, and what does not go together.
    """
    settings = {"data": list(data) or None, "batch_size": batch_size}
    return evaluation.evaluate(
        os.fspath(model),
        config=os.fspath(config) if config is not None else None,
        overrides=overrides,
        settings={name: value for name, value in settings.items() if value is not None},
        steps=steps,
        root_dir=root_dir,
    )


def load_model(
    model: AnyPath = "latest", *, device: str = "auto", root_dir: str = "runs", trust_remote_code: bool = False
) -> LanguageModel:
    """The model and the tokenizer of a run, a checkpoint, a model or adapter folder, or of owner/name on the Hub.

    `latest` is the newest run's. `trust_remote_code`: run the Python code that comes with the model. Raises ConfigError
    if there is none.
    """
    return open_model(os.fspath(model), root_dir=root_dir, device=device, trust_remote_code=trust_remote_code)


def load_decoder(
    config: DecoderConfig | Mapping[str, Any] | AnyPath,
    weights: AnyPath,
    *,
    tokenizer: AnyPath | None = None,
    device: str = "auto",
) -> LanguageModel:
    """A decoder from its config and a safetensors file, and a tokenizer from its folder.

    Args:
        config: the `model` section as an object or a mapping; a config file or the name of one that ships; or the
            `config.json` of a model folder.
        weights: tensors under our names or, where the config fits one, those of a layout of transformers. What
            torch.compile and DDP put before names is taken away, and a tied output may be there or not.

    Raises:
        ConfigError: tensors are missing, too many or of another shape, all of which it names; or what was given cannot
            be read.
    """
    place = device_named(device)
    decoder = with_computing_dtype(read_decoder(_decoder_config(config), Path(weights), device=place), place)
    found = load_tokenizer(tokenizer) if tokenizer is not None else None
    return LanguageModel(
        model=decoder.eval(),
        tokenizer=found,
        encoder=None,
        eos_ids=frozenset() if found is None else frozenset([found.eos_id]),
        folder=Path(weights).absolute().parent,
        autocast=autocast_dtype(place),
    )


def _decoder_config(config: DecoderConfig | Mapping[str, Any] | AnyPath) -> DecoderConfig:
    if isinstance(config, DecoderConfig):
        return config
    if isinstance(config, Mapping):
        try:
            return DecoderConfig.model_validate(config)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"model.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if Path(config).name == "config.json":
        return read_model_config(Path(config).parent)[0]
    return load_config(os.fspath(config)).config.decoder(wanted_by="load_decoder")
