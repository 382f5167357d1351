"""validate, print-config, list-configs, version: what can be said without torch."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Annotated

import typer

from llmtrain._version import __version__
from llmtrain.cli.options import ConfigOption, ConfigWord, Json, Overrides, read_words
from llmtrain.cli.output import Outcome

if TYPE_CHECKING:
    from llmtrain.config.schema import Config, ModelConfig


def add_to(app: typer.Typer) -> None:
    """Adds this file's verbs to the program."""
    app.command("validate")(validate)
    app.command("print-config")(print_config)
    app.command("list-configs")(list_configs)
    app.command("version")(version)


def validate(
    word: ConfigWord = None, overrides: Overrides = None, config: ConfigOption = None, json: Json = False
) -> Outcome:
    """Check a config, and say what it would run."""
    from llmtrain.config.load import load_config

    ref, values = read_words(word, overrides, config)
    loaded = load_config(str(ref), values)
    summary = summarise(loaded.config)
    text = "\n".join([f"{loaded.source} is valid", *(f"  {line}" for line in summary)])
    return Outcome({"valid": True, "config": loaded.source, "summary": summary}, text)


def print_config(
    word: ConfigWord = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of configs, for editors.")] = False,
    json: Json = False,
) -> Outcome:
    """Print a config with every default filled in."""
    from llmtrain.cli.output import json_document
    from llmtrain.config.load import json_schema, load_config, to_yaml

    if schema:
        document = json_schema()
        return Outcome(document, json_document(document))
    ref, values = read_words(word, overrides, config)
    loaded = load_config(str(ref), values)
    return Outcome(loaded.config.model_dump(mode="json"), to_yaml(loaded.config).rstrip("\n"))


def list_configs(json: Json = False) -> Outcome:
    """List the configs that ship with the package."""
    from llmtrain.config.load import shipped_configs

    found = shipped_configs()
    width = max(map(len, found))
    lines = [f"{name:<{width}}  {about}".rstrip() for name, about in found.items()]
    return Outcome([{"name": name, "about": about} for name, about in found.items()], "\n".join(lines))


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
    """In two lines, what a run of this config would do."""
    model, data, trainer = config.model, config.data, config.trainer
    source = "random tokens" if data.name == "synthetic" else _sources(getattr(data, "path", data.train))
    if trainer.max_epochs is not None:
        length = f"{trainer.max_epochs:g} epochs"
    elif trainer.max_tokens is not None:
        length = f"{trainer.max_tokens:,} tokens"
    else:
        length = f"{trainer.max_steps:,} steps" if trainer.max_steps else "10,000 steps"
    batch = (
        f"{trainer.global_batch_size}"
        if trainer.global_batch_size
        else f"{trainer.micro_batch_size * (trainer.grad_accum_steps or 1)} (on each device)"
    )
    return [
        f"model: {model.name}, {_size(model)}",
        f"training: {length} of {batch} × {data.seq_len} tokens from {source}, "
        f"{config.optimizer.name} at {config.optimizer.lr:g}, {config.scheduler.name} schedule",
    ]


def _size(model: ModelConfig) -> str:
    if model.name == "decoder":
        return f"{model.num_layers} layers, {model.d_model} wide"
    return f"{model.path}, {f'LoRA of rank {model.lora.r}' if model.lora else 'all weights'}"


def _sources(train: object) -> str:
    if isinstance(train, str):
        return train
    assert isinstance(train, list)
    paths = [source if isinstance(source, str) else source.path for source in train]
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
