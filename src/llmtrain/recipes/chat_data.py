"""The rows of a fine-tuning run: found, tokenised once into a cache, opened for training and validation.

    files, datasets ─ find_rows ─→ samples_of ─→ cache, by content, tokenizer, template and options ─→ ChatData

The main process makes what is missing; the others wait, and map the same files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config.chat import ChatConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.sources import WeightedSource
from llmtrain.data.chat.batches import ChatFormat
from llmtrain.data.chat.cache import SampleStore, ensure_samples, samples_folder
from llmtrain.data.chat.data import ChatData, ChatValidation, chat_facts
from llmtrain.data.chat.faults import Faults, RowError
from llmtrain.data.chat.holdout import ValidationPrompts, is_held_out
from llmtrain.data.chat.key import samples_key
from llmtrain.data.chat.row_files import RowDataset, RowFile, find_rows
from llmtrain.data.chat.rows import Row, rows_of
from llmtrain.data.chat.sample import Sample
from llmtrain.data.chat.samples import Select, conclude, samples_of
from llmtrain.data.chat.shapes import Example, example_of
from llmtrain.data.chat.tally import Tally
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.tokenizers import folder_fingerprint
from llmtrain.distributed.engine import Engine

log = logging.getLogger("llmtrain.data")

_OPTIONS = ("seq_len", "truncation", "supervise", "text_column", "on_error", "val_fraction")
"""Keys of ChatConfig that change what a row's samples are."""


@dataclass(frozen=True)
class OpenedRows:
    """A run's rows, ready to be drawn."""

    training: ChatData
    validation: ChatValidation | None
    template: ChatTemplate
    """What made text of the turns: it goes along with the model."""


def open_rows(config: ChatConfig, *, tokenizer_folder: Path, seed: int, engine: Engine) -> OpenedRows:
    """The rows that `config` names, tokenised by the tokenizer in `tokenizer_folder`.

    Raises ConfigError with every fault of the rows by `file:line`, and where there is no row to train on.
    """
    tokenizer = _fast_tokenizer(tokenizer_folder)
    template = ChatTemplate(tokenizer, file=config.chat_template)
    maker = _Maker(config, template, cache_dir=Path(config.cache_dir).expanduser())
    with engine.main_first():
        validation = maker.validation()
        stores = maker.training()
    chat_format = ChatFormat(
        seq_len=config.seq_len,
        packing=config.packing,
        mask_documents=config.mask_documents,
        pad_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
    )
    about: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "tokenizer": tokenizer_folder,
        "tokenizer_sha256": folder_fingerprint(str(tokenizer_folder)),
    }
    weights = [source.weight for source in _sources(config) if source.weight is not None]
    training = ChatData(
        facts=chat_facts(stores, name=_named(config.train), **about),
        stores=stores,
        weights=weights or None,
        format=chat_format,
        seed=seed,
        rank=engine.rank,
        world_size=engine.world_size,
        num_workers=config.num_workers,
    )
    if validation is None:
        return OpenedRows(training, None, template)
    facts = chat_facts([validation], name=_named(config.val or config.train), **about)
    return OpenedRows(training, ChatValidation(facts=facts, store=validation, format=chat_format), template)


@dataclass(frozen=True)
class _Source:
    paths: Sequence[str]
    weight: float | None


def _sources(config: ChatConfig) -> list[_Source]:
    """One pool of all paths without weights; with weights, each for itself."""
    listed = [config.train] if isinstance(config.train, str) else config.train
    weighted = [_Source([source.path], source.weight) for source in listed if isinstance(source, WeightedSource)]
    return weighted or [_Source([source for source in listed if isinstance(source, str)], None)]


class _Maker:
    """Makes the samples of each part of the data, or finds them made."""

    def __init__(self, config: ChatConfig, template: ChatTemplate, *, cache_dir: Path) -> None:
        self._config = config
        self._template = template
        self._cache_dir = cache_dir
        self._held_out_rows: list[RowFile | RowDataset] | None = None
        """Where validation rows come from, if there are any."""

    def validation(self) -> SampleStore | None:
        """Rows of their own, or those held out of the training rows."""
        config = self._config
        if config.val is not None:
            self._held_out_rows = find_rows(config.val, key="data.val", default_split="validation")
            return self._samples(self._held_out_rows, key="data.val", part="all", select=None)
        if not config.val_fraction:
            return None
        paths = [path for source in _sources(config) for path in source.paths]
        self._held_out_rows = find_rows(paths, key="data.train")
        return self._samples(self._held_out_rows, key="data.val_fraction", part="held out", select=self._is_held_out)

    def training(self) -> list[SampleStore]:
        """A store a source."""
        stores = []
        for source in _sources(self._config):
            rows = find_rows(source.paths, key="data.train")
            if self._config.val is not None:
                stores.append(self._beside_validation(rows))
            elif self._config.val_fraction:
                stores.append(self._samples(rows, key="data.train", part="kept", select=self._is_kept))
            else:
                stores.append(self._samples(rows, key="data.train", part="all", select=None))
        return stores

    def _beside_validation(self, rows: list[RowFile | RowDataset]) -> SampleStore:
        """Training rows, among which the prompts of the validation rows are looked for."""
        prompts = ValidationPrompts()

        def look(example: Example, source: str) -> bool:
            if not prompts.num_prompts:
                self._collect(prompts)
            prompts.look_for(example, source)
            return True

        beside = samples_key(self._held_out_rows or [], template=self._template, options={})["rows"]
        return self._samples(
            rows,
            key="data.train",
            part=f"beside validation rows {beside}",
            select=look,
            warnings=lambda: [w for w in [prompts.warning()] if w],
        )

    def _collect(self, prompts: ValidationPrompts) -> None:
        for row in rows_of(self._held_out_rows or []):
            if isinstance(row, Row):  # its faults were told when it was read for the first time
                with suppress(RowError):
                    prompts.add(example_of(row.values, text_column=self._config.text_column), row.source)

    def _is_held_out(self, example: Example, source: str) -> bool:
        return is_held_out(example, self._config.val_fraction)

    def _is_kept(self, example: Example, source: str) -> bool:
        return not is_held_out(example, self._config.val_fraction)

    def _samples(
        self,
        rows: list[RowFile | RowDataset],
        *,
        key: str,
        part: str,
        select: Select | None,
        warnings: Callable[[], Sequence[str]] = tuple,
    ) -> SampleStore:
        made = False

        def make() -> Iterator[Sample]:
            nonlocal made
            made = True
            tally, faults = Tally(), Faults()
            yield from samples_of(
                rows_of(rows), template=self._template, config=self._config, tally=tally, faults=faults, select=select
            )
            conclude(tally, faults, key=key, config=self._config)

        options = {name: getattr(self._config, name) for name in _OPTIONS}
        made_from = samples_key(rows, template=self._template, options={**options, "part": part})
        folder = samples_folder(self._cache_dir, made_from)
        store = ensure_samples(folder, key=made_from, make=make, notes=warnings)
        log.info("%s: %s samples %s", key, f"{len(store):,}", "made" if made else f"found in {folder}")
        for warning in store.manifest.notes:
            log.warning("%s: %s", key, warning)
        return store


def _fast_tokenizer(folder: Path) -> Any:
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


def _named(paths: object) -> str:
    if isinstance(paths, str):
        return paths
    assert isinstance(paths, list)
    return ", ".join(path if isinstance(path, str) else path.path for path in paths)
