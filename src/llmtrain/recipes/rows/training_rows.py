"""The rows that a run was trained on, one after the other: what an evaluation's questions are looked for in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from llmtrain.config.chat import ChatConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import Config
from llmtrain.data.chat.faults import RowError
from llmtrain.data.chat.rows import Row, rows_of
from llmtrain.data.chat.shapes import Example, example_of
from llmtrain.recipes.rows.chat_samples import find_parts


def training_rows(config: Config) -> Iterator[tuple[Example, str]]:
    """Each row that is trained on, and its `file:line`; rows that are held out, or that are none, are left out.

    Raises ConfigError where the data are no rows, or are not there any more.
    """
    if not isinstance(config.data, ChatConfig):
        raise ConfigError(f"the training data are {config.data.name}, not rows")
    for part in find_parts(config.data).training:
        for row in rows_of(part.sources):
            if isinstance(row, Row):
                with suppress(RowError):
                    example = example_of(row.values, text_column=config.data.text_column)
                    if part.select is None or part.select(example):
                        yield example, row.source
