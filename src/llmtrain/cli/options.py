"""What several verbs read from the command line in the same way: CONFIG, key=value, --json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from llmtrain.config.errors import ConfigError

ConfigWord = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG", help="A YAML or JSON file, or the name of a config that ships.", show_default=False
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values for keys of it: trainer.max_steps=100.", show_default=False),
]
ConfigOption = Annotated[
    str | None, typer.Option("--config", metavar="PATH", help="The same as CONFIG.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and all else on stderr.")]


def read_words(
    word: str | None, overrides: Sequence[str] | None, option: str | None, *, required: bool = True
) -> tuple[str | None, list[str]]:
    """CONFIG, which is the first word or --config, and the overrides.

    Raises ConfigError for both, and for neither where one is required.
    """
    from llmtrain.config.overrides import looks_like_override

    rest = list(overrides or [])
    if word is not None and looks_like_override(word):
        rest.insert(0, word)
        word = None
    if word is not None and option is not None:
        raise ConfigError(f"CONFIG is given twice: {word} and --config {option}; remove one")
    ref = option if word is None else word
    if ref is None and required:
        from llmtrain.config.load import shipped_configs

        raise ConfigError(
            f"CONFIG is missing: a YAML or JSON file, or one of those that ship ({', '.join(shipped_configs())})"
        )
    return ref, rest
