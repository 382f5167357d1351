"""Arguments and options that several commands share: CONFIG, key=value, MODEL, --json; and --resume without a value.

Every option for a path of this machine has the callback `local`, which rejects addresses such as s3://bucket/x. One for
a path or an address has the callback `readable`, one for the folder of all runs `stored`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from llmtrain.errors import ConfigError
from llmtrain.local_paths import ADDRESS, LOCAL, STORE, checked_path

NEWEST = "latest"


def local(parameter: typer.CallbackParam, value: Any) -> Any:
    """Return the value of an option or argument: a path, several, or None. Raises ConfigError for an address."""
    return _checked(parameter, value, LOCAL)


def readable(parameter: typer.CallbackParam, value: Any) -> Any:
    """Return the value of an option or argument: a path or an address, several, or None. Raises ConfigError."""
    return _checked(parameter, value, ADDRESS)


def stored(parameter: typer.CallbackParam, value: Any) -> Any:
    """Return the value of an option or argument: a path, or the address of a store of runs. Raises ConfigError."""
    return _checked(parameter, value, STORE)


def _checked(parameter: typer.CallbackParam, value: Any, kind: dict[str, Any]) -> Any:
    if value is None:
        return None
    name = parameter.opts[0]
    key = name if name.startswith("-") else str(parameter.metavar)
    if isinstance(value, str):
        return checked_path(value, kind, key=key)
    return [checked_path(path, kind, key=key) for path in value]


ConfigWord = Annotated[
    str | None,
    typer.Argument(metavar="CONFIG", callback=local, help="A YAML or JSON file, or the name of a config that ships."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values for keys of the config: trainer.max_steps=100.")
]
ConfigOption = Annotated[
    str | None, typer.Option("--config", metavar="PATH", callback=local, help="The same as CONFIG.")
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        callback=readable,
        help="A run, a checkpoint, a model or adapter folder or its address, or owner/name on the Hub.",
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")
]
RootDir = Annotated[
    str, typer.Option("--root-dir", metavar="DIR", callback=stored, help="Folder of all runs, or its address.")
]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Give a prompt as a user's turn; the default is how the model was tuned."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr.")]


def read_words(
    word: str | None, overrides: Sequence[str] | None, option: str | None, *, required: bool = True
) -> tuple[str | None, list[str]]:
    """Return CONFIG, from the first word or --config, and the overrides.

    Raises ConfigError if both are given, or if neither is given and one is required.
    """
    from llmtrain.config.loading.overrides import looks_like_override

    rest = list(overrides or [])
    if word is not None and looks_like_override(word):
        rest.insert(0, word)
        word = None
    if word is not None and option is not None:
        raise ConfigError(f"CONFIG is given twice: {word} and --config {option}; remove one")
    ref = option if word is None else word
    if ref is None and required:
        from llmtrain.config.loading.load import shipped_configs

        raise ConfigError(
            f"CONFIG is missing: a YAML or JSON file, or one of those that ship ({', '.join(shipped_configs())})"
        )
    return ref, rest


def read_config_or_run(word: str | None, overrides: Sequence[str] | None, option: str | None) -> tuple[str, list[str]]:
    """Return CONFIG and the overrides as `read_words` does; a run or a checkpoint is replaced by its config.yaml.

    Runs are searched in output.root_dir. The name of a shipped config means that config.
    """
    from pathlib import Path

    from llmtrain.config.loading.load import FILE_ENDINGS, shipped_configs

    ref, values = read_words(word, overrides, option)
    assert ref is not None
    if ref.endswith(FILE_ENDINGS) or ref in shipped_configs():
        return ref, values
    from llmtrain.runs.folders import config_to_read

    named = [value.partition("=")[2] for value in values if value.startswith("output.root_dir=")]
    return config_to_read(ref, Path(named[-1] if named else "runs")), values


def name_resume(argv: Sequence[str]) -> list[str]:
    """Give a `--resume` without a value the value `latest`, since Typer has no option whose value may be left out.

    The word after --resume is its value unless it starts with a dash, is key=value, or has the ending of a config file.
    """
    words = list(argv)
    if words[:1] != ["train"] and words[:3] != ["launch", "ssh", "train"]:
        return words
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else "-"
        if word == "--resume" and (following.startswith("-") or _is_config_or_override(following)):
            words[index] = f"--resume={NEWEST}"
    return words


def _is_config_or_override(word: str) -> bool:
    from llmtrain.config.loading.overrides import looks_like_override

    return looks_like_override(word) or word.endswith((".yaml", ".yml", ".json"))
