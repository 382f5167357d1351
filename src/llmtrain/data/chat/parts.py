"""The rows that a config names, in parts: one for each source of a mixture, and one that validates.

data.train ─ find_rows ─▶ training parts ┬─▶ prepare_rows.py: each becomes a store of samples
data.val, data.val_fraction ─▶ validation part ┘

Rows are held out by the hash of their prompts, so few rows, or rows that share one prompt, may all fall on one side.
Then all of them are for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.schema import Config
from llmtrain.data.chat.holdout import is_held_out, is_kept, prompt_of
from llmtrain.data.chat.sample_maker import Select
from llmtrain.data.chat.shapes import Example, example_of
from llmtrain.data.config_mixture import source_groups
from llmtrain.data.files.datasets import RowDataset
from llmtrain.data.files.find import DataFile, RowSource, find_rows
from llmtrain.data.files.read import Row, rows_of
from llmtrain.data.files.row_faults import RowError
from llmtrain.data.mixture import MixtureSpec
from llmtrain.errors import ConfigError
from llmtrain.screen import counted

_MANY_BYTES = 1 << 24
_MANY_ROWS = 50_000
"""Number of rows from which on processes pay for their start, which takes some seconds."""


@dataclass(frozen=True, kw_only=True)
class RowPart:
    """Rows that become one store of samples: those of one source, or those that validate."""

    key: str
    """The config's, for messages."""
    sources: Sequence[DataFile | RowDataset]
    select: Select | None
    chosen: str
    """Name of the choice that `select` makes."""

    @property
    def about(self) -> str:
        """Description of the part, for messages and for the key of the cache."""
        first, more = self.sources[0].name, len(self.sources) - 1
        names = f"{first} and {more:,} more" if more else first
        return f"{self.key} ({names}{'' if self.select is None else ', ' + self.chosen})"

    @property
    def are_many(self) -> bool:
        """Return whether several processes would be faster. Remote files are not read several times."""
        num_bytes, num_rows = 0, 0
        for source in self.sources:
            if isinstance(source, RowDataset):
                num_rows += len(source.dataset)
            elif source.size is None or source.remote is not None:
                return False
            else:
                num_bytes += source.size
        return num_bytes >= _MANY_BYTES or num_rows >= _MANY_ROWS


@dataclass(frozen=True)
class RowParts:
    """All rows of a config."""

    training: Sequence[RowPart]
    """One of all paths where these are not mixed; in a mixture, one of each source."""
    validation: RowPart | None
    mixture: MixtureSpec | None
    """Mixture of the training parts; None if there is one, without a limit."""
    not_divided: str | None = None
    """Why no rows are held out, where data.val_fraction asks for some; for a warning."""

    @property
    def all(self) -> list[RowPart]:
        """The validation part first: its faults are found before the many rows of training are tokenised."""
        return [*([self.validation] if self.validation else []), *self.training]


def find_parts(config: ChatConfig) -> RowParts:
    """Find what there is at the paths of `config`. Raises ConfigError where there is nothing to read."""
    found = source_groups(config)
    paths = [path for group in found.groups for path in group]
    not_divided = _not_divided(find_rows(paths, key="data.train"), config) if config.val_fraction else None
    divides = config.val_fraction > 0 and not_divided is None
    select = partial(is_kept, fraction=config.val_fraction) if divides else None
    training = [
        RowPart(key="data.train", sources=find_rows(group, key="data.train"), select=select, chosen="kept")
        for group in found.groups
    ]
    validation = None
    if config.val is not None:
        held_out = find_rows(config.val, key="data.val", default_split="validation")
        validation = RowPart(key="data.val", sources=held_out, select=None, chosen="all")
    elif divides:
        validation = RowPart(
            key="data.val_fraction",
            sources=find_rows(paths, key="data.train"),
            select=partial(is_held_out, fraction=config.val_fraction),
            chosen="held out",
        )
    return RowParts(training, validation, found.mixture, not_divided)


def _not_divided(sources: Sequence[RowSource], config: ChatConfig) -> str | None:
    """Return why the rows cannot be divided into training and validation; None where both have some.

    Reading ends when each side has a row, which is near the beginning unless there are few rows.
    """
    num_rows = {True: 0, False: 0}
    first, same_prompt = None, True
    for example, _ in examples_in(sources, config):
        num_rows[is_held_out(example, config.val_fraction)] += 1
        if all(num_rows.values()):
            return None
        first = first or prompt_of(example)
        same_prompt = same_prompt and first == prompt_of(example)
    if not any(num_rows.values()):
        return None  # each row has a fault, which is reported where it is read to become a sample
    side = "all" if num_rows[True] else "none"
    why = "have one prompt" if same_prompt else "are few"
    return (
        f"data.val_fraction: {config.val_fraction} holds out {side} of {counted(sum(num_rows.values()), 'row')}, "
        f"which {why}: the run trains on all of them, without validation; name other rows in data.val to have one"
    )


def examples_in(sources: Sequence[RowSource], config: ChatConfig) -> Iterator[tuple[Example, str]]:
    """Yield the rows without a fault, each with its `file:line`; those with one are skipped."""
    for row in rows_of(sources):
        if isinstance(row, Row):
            with suppress(RowError):
                yield example_of(row.values, text_column=config.text_column), row.source


def training_rows(config: Config) -> Iterator[tuple[Example, str]]:
    """Yield each row that a run of `config` trains on, and its `file:line`: an evaluation looks for its questions here.

    Rows that are held out, or that have a fault, are left out. Raises ConfigError where the data are no rows, or are
    not there any more.
    """
    if not isinstance(config.data, ChatConfig):
        raise ConfigError(f"the training data are {config.data.name}, not rows")
    for part in find_parts(config.data).training:
        for example, source in examples_in(part.sources, config.data):
            if part.select is None or part.select(example):
                yield example, source
