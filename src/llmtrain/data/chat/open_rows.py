"""The rows of a fine-tuning run, opened for training and validation.

The main process tokenises what is missing in the cache (prepare_rows.py); the others wait, and map the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.sources import used_paths
from llmtrain.data.batches import DataFacts, TrainingSet, ValidationSet
from llmtrain.data.chat.cache import SampleStore
from llmtrain.data.chat.items import RowItems
from llmtrain.data.chat.parts import find_parts
from llmtrain.data.chat.prepare_rows import PreparedRows, warn_of
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.chat.tokenizer import load_fast_tokenizer
from llmtrain.data.mixture import MixtureSpec
from llmtrain.data.tokenizers import folder_fingerprint
from llmtrain.distributed.engine import Engine


@dataclass(frozen=True)
class OpenedRows:
    """A run's rows, ready to be drawn."""

    training: TrainingSet
    validation: ValidationSet | None
    template: ChatTemplate
    """Template that rendered the turns; it goes along with the model."""


def open_rows(config: ChatConfig, *, tokenizer_folder: Path, seed: int, engine: Engine) -> OpenedRows:
    """Open the rows that `config` names, tokenised by the tokenizer in `tokenizer_folder`.

    Raises ConfigError with every fault of the rows by `file:line`, and where there is no row to train on.
    """
    template = ChatTemplate(load_fast_tokenizer(tokenizer_folder), file=config.chat_template)
    with engine.main_first():
        parts = find_parts(config)
        prepared = PreparedRows(config, template, parts, num_workers=config.num_workers)
        held_out = prepared.ensure(parts.validation)[0] if parts.validation else None
        stores = [prepared.ensure(part)[0] for part in parts.training]
        warn_of(parts, [*([held_out] if held_out else []), *stores])
    training = TrainingSet(
        facts=_facts(used_paths(config.train, config.mixture), stores, template, tokenizer_folder),
        items=_items(config, stores, template, mixture=parts.mixture, seed=seed),
        rank=engine.data_parallel_rank,
        world_size=engine.data_parallel_size,
        num_workers=config.num_workers,
    )
    validation = None if held_out is None else _validation(config, held_out, template, tokenizer_folder)
    return OpenedRows(training, validation, template)


def open_validation_rows(
    config: ChatConfig, *, template: ChatTemplate, tokenizer_folder: Path, engine: Engine
) -> ValidationSet | None:
    """Open the rows that `config` holds out, tokenised by the template's tokenizer; None where it holds out none.

    Raises ConfigError with every fault of the rows by `file:line`.
    """
    if config.val is not None:  # the training rows need not be there any more
        config = config.model_copy(update={"train": config.val})
    with engine.main_first():
        parts = find_parts(config)
        if parts.validation is None:
            return None
        store = PreparedRows(config, template, parts, num_workers=0).ensure(parts.validation)[0]
        warn_of(parts, [store])
    return _validation(config, store, template, tokenizer_folder)


def _validation(config: ChatConfig, store: SampleStore, template: ChatTemplate, folder: Path) -> ValidationSet:
    facts = _facts(config.val or used_paths(config.train, config.mixture), [store], template, folder)
    return ValidationSet(facts=facts, items=_items(config, [store], template, mixture=None, seed=0))


def _items(
    config: ChatConfig,
    stores: Sequence[SampleStore],
    template: ChatTemplate,
    *,
    mixture: MixtureSpec | None,
    seed: int,
) -> RowItems:
    ids = (template.tokenizer.pad_token_id, template.tokenizer.eos_token_id)
    return RowItems(
        stores=stores,
        mixture=mixture,
        seed=seed,
        seq_len=config.seq_len,
        packing=config.packing,
        mask_documents=config.mask_documents,
        pad_id=next((token for token in ids if token is not None), 0),
    )


def _facts(
    paths: str | Sequence[str], stores: Sequence[SampleStore], template: ChatTemplate, folder: Path
) -> DataFacts:
    listed = [paths] if isinstance(paths, str) else paths
    return DataFacts(
        name=", ".join(listed),
        vocab_size=len(template.tokenizer),
        eos_id=template.tokenizer.eos_token_id,
        num_tokens=sum(store.manifest.tokens for store in stores),
        num_bytes=None,
        tokenizer=folder,
        tokenizer_sha256=folder_fingerprint(str(folder)),
    )
