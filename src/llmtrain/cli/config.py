"""validate, print-config, list-configs, version: commands that need no torch."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Annotated

import typer

from llmtrain._version import __version__
from llmtrain.cli.options import ConfigOption, ConfigWord, Json, Overrides, read_config_or_run
from llmtrain.cli.output import Outcome
from llmtrain.reports.blocks import Lines, Values
from llmtrain.screen import counted

if TYPE_CHECKING:
    from llmtrain.config.sections.data import DataConfig
    from llmtrain.config.sections.schema import Config, ModelConfig


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to the program."""
    app.command("validate")(validate)
    app.command("print-config")(print_config)
    app.command("list-configs")(list_configs)
    app.command("version")(version)


def validate(
    word: ConfigWord = None, overrides: Overrides = None, config: ConfigOption = None, json: Json = False
) -> Outcome:
    """Check a config, and show what it would run."""
    from llmtrain.config.loading.load import load_config

    ref, values = read_config_or_run(word, overrides, config)
    loaded = load_config(ref, values)
    summary = summarise(loaded.config)
    document = {"valid": True, "config": loaded.source, "summary": summary}
    return Outcome(document, [Lines(f"{loaded.source} is valid", summary)])


def print_config(
    word: ConfigWord = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of configs, for editors.")] = False,
    json: Json = False,
) -> Outcome:
    """Print a config with every default filled in."""
    from llmtrain.cli.output import json_document
    from llmtrain.config.loading.load import json_schema, load_config, to_yaml

    if schema:
        document = json_schema()
        return Outcome(document, json_document(document))
    ref, values = read_config_or_run(word, overrides, config)
    loaded = load_config(ref, values)
    return Outcome(loaded.config.model_dump(mode="json"), to_yaml(loaded.config).rstrip("\n"))


def list_configs(json: Json = False) -> Outcome:
    """List the configs that ship with the package."""
    from llmtrain.config.loading.load import shipped_configs

    found = shipped_configs()
    document = [{"name": name, "about": about} for name, about in found.items()]
    return Outcome(document, [Values(list(found.items()))])


def version(json: Json = False) -> Outcome:
    """Print the versions of llmtrain, Python and torch."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "not installed"
    versions = {"llmtrain": __version__, "python": platform.python_version(), "torch": torch}
    return Outcome(versions, f"llmtrain {__version__} (Python {versions['python']}, torch {torch})")


def summarise(config: Config) -> list[str]:
    """Return two lines that describe a run of this config."""
    model, data, trainer = config.model, config.data, config.trainer
    if trainer.max_epochs is not None:
        length = f"{trainer.max_epochs:g} epochs"
    elif trainer.max_tokens is not None:
        length = f"{counted(trainer.max_tokens, 'token')}"
    elif trainer.max_steps is not None or trainer.max_minutes is None:
        length = f"{counted(trainer.max_steps, 'step')}" if trainer.max_steps else "10,000 steps"
    else:
        length = ""
    if trainer.max_minutes is not None:
        length += f"{', at most ' if length else ''}{trainer.max_minutes:g} minutes"
    batch = (
        f"{trainer.global_batch_size}"
        if trainer.global_batch_size
        else f"{trainer.micro_batch_size * (trainer.grad_accum_steps or 1)} (on each device)"
    )
    return [
        f"model: {model_in_words(model)}",
        f"training: {length} of {batch} × {counted(data.seq_len, 'token')} from {_source_in_words(data)}, "
        f"{config.optimizer.name} at {config.optimizer.lr:g}, {config.scheduler.name} schedule",
    ]


def model_in_words(model: ModelConfig) -> str:
    """Return the kind of the model, and its size or origin."""
    from llmtrain.config.sections.model import DecoderConfig
    from llmtrain.config.sections.own import OwnModelConfig

    if isinstance(model, OwnModelConfig):
        return f"{model.name}, your own"
    if isinstance(model, DecoderConfig):
        return f"decoder, {counted(model.num_layers, 'layer')}, {model.d_model} wide"
    return f"{model.name}, {model.path}, {f'LoRA of rank {model.lora.r}' if model.lora else 'all weights'}"


def _source_in_words(data: DataConfig) -> str:
    """Return the source of the training data; of several sources, the first and the number of the others."""
    if data.name == "synthetic":
        return "random tokens"
    train = getattr(data, "path", getattr(data, "train", data.name))
    paths = [getattr(source, "path", source) for source in ([train] if isinstance(train, str) else train)]
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
