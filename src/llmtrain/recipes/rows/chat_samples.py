"""The rows that a config names, as samples: found, and tokenised once into a cache. No model, and no training.

    files, datasets ─ find_rows ─→ RowPart … ─ samples_of ─┬─→ cache, by content, tokenizer, template and options
                                                           └─→ whoever looks at them (`inspect`)

Which tokenizer it is, and what is made of the rows, stands in the config alone; `chat_data` opens them for a run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmtrain.config.chat import ChatConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.huggingface import HuggingFaceConfig
from llmtrain.config.schema import Config
from llmtrain.config.sources import WeightedSource
from llmtrain.data.chat.cache import Account, SampleStore, ensure_samples, samples_folder
from llmtrain.data.chat.faults import Faults, RowError
from llmtrain.data.chat.holdout import ValidationPrompts, is_held_out, is_kept, prompt_hash
from llmtrain.data.chat.key import samples_key
from llmtrain.data.chat.row_files import RowDataset, RowFile, find_rows
from llmtrain.data.chat.rows import Row, rows_of
from llmtrain.data.chat.sample import Sample
from llmtrain.data.chat.samples import OnPrompt, SampleMaker, Select, conclude, samples_of
from llmtrain.data.chat.shapes import example_of
from llmtrain.data.chat.tally import Tally
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.models.hub import fetch_tokenizer
from llmtrain.training.runs import find_model, model_to_begin_from

log = logging.getLogger("llmtrain.data")

_OPTIONS = ("seq_len", "truncation", "supervise", "text_column", "on_error", "val_fraction")
"""Keys of ChatConfig that change what a row's samples are."""
_MANY_BYTES = 1 << 24
_MANY_ROWS = 50_000
"""From here on it is worth while to start processes, which takes them some seconds."""


@dataclass(frozen=True, kw_only=True)
class RowPart:
    """Rows that become one store of samples: one source's, or those that validate."""

    key: str
    """The config's, for messages."""
    sources: Sequence[RowFile | RowDataset]
    select: Select | None
    chosen: str
    """What `select` does, in a word."""

    @property
    def about(self) -> str:
        """For messages, and to know the samples again."""
        first, more = self.sources[0].name, len(self.sources) - 1
        names = f"{first} and {more:,} more" if more else first
        return f"{self.key} ({names}{'' if self.select is None else ', ' + self.chosen})"

    @property
    def are_many(self) -> bool:
        """Whether processes would be done sooner. Remote files are not read several times."""
        num_bytes, num_rows = 0, 0
        for source in self.sources:
            if isinstance(source, RowDataset):
                num_rows += len(source.dataset)
            elif source.size is None:
                return False
            else:
                num_bytes += source.size
        return num_bytes >= _MANY_BYTES or num_rows >= _MANY_ROWS


@dataclass(frozen=True)
class RowParts:
    """All rows of a config."""

    training: Sequence[RowPart]
    """One of all paths without weights; with weights, one of each."""
    validation: RowPart | None
    weights: Sequence[float] | None
    """Of the training parts."""


def find_parts(config: ChatConfig) -> RowParts:
    """What there is at the paths of `config`. Raises ConfigError where there is nothing to read."""
    listed = [config.train] if isinstance(config.train, str) else config.train
    weights = [source.weight for source in listed if isinstance(source, WeightedSource)]
    paths = [source.path if isinstance(source, WeightedSource) else source for source in listed]
    groups = [[path] for path in paths] if weights else [paths]
    select = partial(is_kept, fraction=config.val_fraction) if config.val_fraction else None
    training = [
        RowPart(key="data.train", sources=find_rows(group, key="data.train"), select=select, chosen="kept")
        for group in groups
    ]
    validation = None
    if config.val is not None:
        found = find_rows(config.val, key="data.val", default_split="validation")
        validation = RowPart(key="data.val", sources=found, select=None, chosen="all")
    elif config.val_fraction:
        validation = RowPart(
            key="data.val_fraction",
            sources=find_rows(paths, key="data.train"),
            select=partial(is_held_out, fraction=config.val_fraction),
            chosen="held out",
        )
    return RowParts(training, validation, weights or None)


class Samples:
    """Makes the samples of each part of a config's rows, or finds them made."""

    def __init__(self, config: ChatConfig, template: ChatTemplate, parts: RowParts, *, num_workers: int) -> None:
        """`num_workers` processes make the samples where rows are many; 0: none."""
        self._config = config
        self._template = template
        self._num_workers = num_workers
        self._parts = parts
        self._prompts: ValidationPrompts | None = None

    def read(self, part: RowPart, *, tally: Tally, faults: Faults) -> Iterator[Sample]:
        """The samples of a part, made now; what happens to the rows is counted as they are taken."""
        prompts = self._watched(part)
        on_prompt: OnPrompt | None = prompts.look_for if prompts else None
        maker = SampleMaker(self._template, self._config, part.select, wants_prompts=on_prompt is not None)
        return samples_of(
            partial(rows_of, part.sources),
            maker,
            tally=tally,
            faults=faults,
            on_prompt=on_prompt,
            num_workers=self._num_workers if part.are_many else 0,
        )

    def warnings(self, part: RowPart) -> tuple[str, ...]:
        """What should not be, after `read`: prompts of validation rows that stand in the part as well."""
        warning = self._prompts.warning() if self._prompts and part in self._parts.training else None
        return (warning,) if warning else ()

    def ensure(self, part: RowPart) -> tuple[SampleStore, bool]:
        """The samples of a part in the cache, and whether they were made now. Says what happened to the rows.

        Raises ConfigError with every fault of the rows by `file:line`, and where none is left.
        """
        tally, faults = Tally(), Faults()
        made = False

        def make() -> Iterator[Sample]:
            nonlocal made
            made = True
            yield from self.read(part, tally=tally, faults=faults)
            conclude(tally, faults, key=part.key, config=self._config)

        def account() -> Account:
            found = account_of(tally, faults, config=self._config)
            return found.model_copy(update={"warnings": (*found.warnings, *self.warnings(part))})

        options = {name: getattr(self._config, name) for name in _OPTIONS}
        made_from = samples_key(part.sources, template=self._template, options={**options, "part": self._named(part)})
        folder = samples_folder(Path(self._config.cache_dir).expanduser(), made_from)
        store = ensure_samples(folder, key=made_from, make=make, about=part.about, account=account)
        log.info("%s: %s samples %s", part.key, f"{len(store):,}", "made" if made else f"found in {folder}")
        for note in store.manifest.account.notes:
            log.info("%s: %s", part.key, note)
        for warning in store.manifest.account.warnings:
            log.warning("%s: %s", part.key, warning)
        return store, made

    def _named(self, part: RowPart) -> str:
        """What the samples depend on besides rows and options: the validation rows, for what is said of them."""
        beside = self._parts.validation
        if part.select is not None or beside is None or part not in self._parts.training:
            return part.chosen
        return f"beside {samples_key(beside.sources, template=self._template, options={})['rows']}"

    def _watched(self, part: RowPart) -> ValidationPrompts | None:
        """The prompts of the validation rows, if they have to be looked for among the rows of `part`: those that were
        held out by their hash cannot stand there."""
        beside = self._parts.validation
        if beside is None or beside.select is not None or part not in self._parts.training:
            return None
        self._prompts = prompts = ValidationPrompts()
        for row in rows_of(beside.sources):
            if isinstance(row, Row):  # its faults are told where it is read to become a sample
                with suppress(RowError):
                    prompts.add(prompt_hash(example_of(row.values, text_column=self._config.text_column)), row.source)
        return prompts


def account_of(tally: Tally, faults: Faults, *, config: ChatConfig) -> Account:
    """What to say of rows that were read."""
    lines = tally.lines(seq_len=config.seq_len, truncation=config.truncation)
    left_out = f"{faults.count:,} rows are left out (data.on_error: skip):"
    warnings = ("\n  ".join([left_out, *faults.lines()]),) if faults.count else ()
    return Account(rows=tally.rows, notes=tuple(lines), warnings=warnings)


def tokenizer_folder_of(config: Config) -> Path:
    """The folder of the tokenizer of a config with rows, fetched from the Hub if need be: no weights are needed.

    Raises ConfigError when none is named or it cannot be had.
    """
    assert isinstance(config.data, ChatConfig)
    model, root = config.model, Path(config.output.root_dir)
    if not isinstance(model, HuggingFaceConfig):
        if config.data.tokenizer is not None:
            return fetch_tokenizer(config.data.tokenizer, local_files_only=False)
        if model.init_from is not None:
            return fetch_tokenizer(str(find_model(model.init_from, root)), local_files_only=True)
        raise ConfigError("data.tokenizer: the decoder has no tokenizer of its own; name a folder or a Hub id")
    named = config.data.tokenizer or model.tokenizer
    if named is not None:
        return fetch_tokenizer(named, local_files_only=model.local_files_only)
    path = model_to_begin_from(model.path, root)
    return fetch_tokenizer(path, revision=model.revision, local_files_only=model.local_files_only)


def load_fast_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises ConfigError where there is none that knows which text its tokens stand for."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(f"data.tokenizer: {folder} holds no tokenizer that can be read ({first})") from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"data.tokenizer: {folder} has no tokenizer.json, and without one nobody knows which text a token stands "
            "for: convert it with transformers, or name another tokenizer"
        )
    return tokenizer
