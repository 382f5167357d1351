"""prepare: text in, token shards out; rows in, tokenised rows in the cache out."""

from __future__ import annotations

import typer

from llmtrain.cli.options import ConfigOption, ConfigWord, Json, Overrides, read_words
from llmtrain.cli.output import Outcome, table

ROWS = (
    ("shards", "output"),
    ("documents", "documents"),
    ("training documents", "train_documents"),
    ("validation documents", "val_documents"),
    ("rejected", "rejected"),
    ("tokens", "tokens"),
    ("training tokens", "train_tokens"),
    ("validation tokens", "val_tokens"),
    ("vocabulary", "vocab_size"),
    ("seconds", "seconds"),
)
ROWS_OF_CHAT = (
    ("cache", "cache"),
    ("rows", "rows"),
    ("samples", "samples"),
    ("tokens", "tokens"),
    ("learned", "supervised_tokens"),
    ("made now", "made_now"),
    ("seconds", "seconds"),
)


def add_to(app: typer.Typer) -> None:
    """Adds this file's verb to the program."""
    app.command("prepare")(prepare)


def prepare(
    word: ConfigWord = None, overrides: Overrides = None, config: ConfigOption = None, json: Json = False
) -> Outcome:
    """Make token shards of the text that a config names, or tokenise its rows into the cache."""
    from llmtrain.config.errors import ConfigError
    from llmtrain.config.load import load_config

    ref, values = read_words(word, overrides, config)
    loaded = load_config(str(ref), values)
    if loaded.config.data.name == "chat":
        from llmtrain.data.prepare.parallel import resolve_num_workers
        from llmtrain.recipes.prepare_rows import prepare_rows

        result = prepare_rows(loaded.config, num_workers=resolve_num_workers(None))
        return Outcome(result, table(result, ROWS_OF_CHAT))
    if loaded.config.prepare is None:
        raise ConfigError(f"{loaded.source} has no prepare section, which says what to make shards of")
    from llmtrain.recipes.prepare import prepare as recipe

    result = recipe(loaded.config)
    return Outcome(result, table(result, ROWS))
