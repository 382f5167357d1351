"""The rows of a fine-tuning run, opened for training and validation: `chat_samples` makes them, or finds them made.

The main process makes what is missing; the others wait, and map the same files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config.chat import ChatConfig
from llmtrain.data.chat.batches import ChatFormat
from llmtrain.data.chat.cache import SampleStore
from llmtrain.data.chat.data import ChatData, ChatValidation, chat_facts
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.tokenizers import folder_fingerprint
from llmtrain.distributed.engine import Engine
from llmtrain.recipes.rows.chat_samples import Samples, find_parts, load_fast_tokenizer


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
    tokenizer = load_fast_tokenizer(tokenizer_folder)
    template = ChatTemplate(tokenizer, file=config.chat_template)
    with engine.main_first():
        parts = find_parts(config)
        samples = Samples(config, template, parts, num_workers=config.num_workers)
        validation = samples.ensure(parts.validation)[0] if parts.validation else None
        stores = [samples.ensure(part)[0] for part in parts.training]
    chat_format, about = _format(config, tokenizer), _about(tokenizer, tokenizer_folder)
    training = ChatData(
        facts=chat_facts(stores, name=_named(config.train), **about),
        stores=stores,
        weights=parts.weights,
        format=chat_format,
        seed=seed,
        rank=engine.dp_rank,
        world_size=engine.dp_size,
        num_workers=config.num_workers,
    )
    if validation is None:
        return OpenedRows(training, None, template)
    return OpenedRows(training, _validation(config, validation, chat_format, about), template)


def open_validation_rows(
    config: ChatConfig, *, template: ChatTemplate, tokenizer_folder: Path, engine: Engine
) -> ChatValidation | None:
    """The rows that `config` holds out, tokenised by the template's tokenizer; None where it holds out none.

    Raises ConfigError with every fault of the rows by `file:line`.
    """
    if config.val is not None:  # the training rows need not be there any more
        config = config.model_copy(update={"train": config.val})
    with engine.main_first():
        parts = find_parts(config)
        if parts.validation is None:
            return None
        store = Samples(config, template, parts, num_workers=0).ensure(parts.validation)[0]
    about = _about(template.tokenizer, tokenizer_folder)
    return _validation(config, store, _format(config, template.tokenizer), about)


def _validation(
    config: ChatConfig, store: SampleStore, chat_format: ChatFormat, about: dict[str, Any]
) -> ChatValidation:
    facts = chat_facts([store], name=_named(config.val or config.train), **about)
    return ChatValidation(facts=facts, store=store, format=chat_format)


def _format(config: ChatConfig, tokenizer: Any) -> ChatFormat:
    return ChatFormat(
        seq_len=config.seq_len,
        packing=config.packing,
        mask_documents=config.mask_documents,
        pad_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
    )


def _about(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """For `chat_facts`."""
    return {
        "vocab_size": len(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "tokenizer": folder,
        "tokenizer_sha256": folder_fingerprint(str(folder)),
    }


def _named(paths: object) -> str:
    if isinstance(paths, str):
        return paths
    assert isinstance(paths, list)
    return ", ".join(path if isinstance(path, str) else path.path for path in paths)
