"""The preparations that `data.name: corpus` and `huggingface` imply: the same as a `prepare` section would ask for.

    data ─→ a PrepareConfig for the training text (and one for the validation text, with the first one's tokenizer)
         ─→ a folder in the cache, named by content, tokenizer and options: what is there is right, or not there

Doing them is the recipe's.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from llmtrain.config.sections.data import (
    CorpusConfig,
    DatasetInput,
    HuggingFaceDataConfig,
    PrepareConfig,
    TokenizerConfig,
    TokensConfig,
)
from llmtrain.data.manifest import FORMAT_VERSION
from llmtrain.data.prepare.inputs import find_inputs
from llmtrain.data.prepare.output import resolve_cache_dir
from llmtrain.data.prepare.parallel import LocalExecutor
from llmtrain.data.prepare.quality.records import identities
from llmtrain.data.prepare.reuse import recorded_options
from llmtrain.data.prepare.selection import fingerprint
from llmtrain.data.tokenizers import folder_fingerprint
from llmtrain.errors import ConfigError

TextData = CorpusConfig | HuggingFaceDataConfig

_DEFAULT_VAL_FRACTION = 0.01
_SAME_KEYS = ("val_fraction", "text_column", "adapter", "on_error", "tokenizer")


def training_preparation(data: TextData) -> PrepareConfig:
    """Return the preparation of the training text, with the validation split unless `data.val` names a text.

    `output` is the cache, whose folders are never read as text.
    """
    return _preparation(data, data.train, tokenizer=data.tokenizer, val_fraction=_val_fraction(data))


def validation_preparation(data: TextData, *, tokenizer: Path) -> PrepareConfig | None:
    """Return the preparation of the validation text, with the training shards' tokenizer; None without such a text."""
    if data.val is None:
        return None
    existing = TokenizerConfig(kind="hf", path=str(tokenizer))
    return _preparation(data, data.val, tokenizer=existing, val_fraction=0.0)


def cache_folder(options: PrepareConfig, *, num_workers: int) -> Path:
    """Return the folder of a preparation's shards, named by files, options and tokenizer. Hashes all files."""
    inputs = find_inputs(options)
    tokenizer = folder_fingerprint(options.tokenizer.path) if options.tokenizer.path else None
    recorded = recorded_options(options)
    if tokenizer is not None:
        recorded["tokenizer"].pop("path")  # what it is matters, not where it lies
    content = {
        "format": FORMAT_VERSION,
        "options": recorded,
        "steps": [record.model_dump(mode="json", exclude={"library"}) for record in identities(options.steps)],
        "inputs": [
            [source.path, source.name] if record is None else [record.name, record.sha256]
            for source, record in zip(inputs, fingerprint(inputs, executor=LocalExecutor(num_workers)), strict=True)
        ],
        "tokenizer": tokenizer,
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", inputs[0].name).strip("-.")[-40:]
    return Path(options.output) / f"{name or 'corpus'}-{key[:20]}"


def as_tokens(data: TextData, *, training: Path, validation: Path | None) -> TokensConfig:
    """Return the data section of a run that reads the shards that were made."""
    val = training / "val" if _val_fraction(data) > 0 else validation / "train" if validation else None
    return TokensConfig(
        train=str(training / "train"),
        val=None if val is None else str(val),
        seq_len=data.seq_len,
        mask_documents=data.mask_documents,
        shuffle_chunks=data.shuffle_chunks,
        num_workers=data.num_workers,
    )


def in_terms_of(data: TextData, error: ConfigError) -> ConfigError:
    """Return the same mistake, with the keys of `data` in place of those of `prepare`."""
    message = str(error)
    for name in _SAME_KEYS:
        message = message.replace(f"prepare.{name}", f"data.{name}")
    message = message.replace("prepare.output", "data.cache_dir")
    message = message.replace("prepare.input", "data.path" if isinstance(data, HuggingFaceDataConfig) else "data.train")
    if "prepare." in message:
        message += (
            f" (that key goes with a `prepare` section and data.name: tokens, in place of data.name: {data.name})"
        )
    return ConfigError(message)


def _val_fraction(data: TextData) -> float:
    if data.val is not None:
        return 0.0
    return _DEFAULT_VAL_FRACTION if data.val_fraction is None else data.val_fraction


def _preparation(
    data: TextData, source: str | list[str], *, tokenizer: TokenizerConfig, val_fraction: float
) -> PrepareConfig:
    text: str | DatasetInput | list[str | DatasetInput]
    if isinstance(data, HuggingFaceDataConfig):
        assert isinstance(source, str)
        text = DatasetInput(path=data.path, configs=data.configs, split=source, revision=data.revision)
    else:
        text = source if isinstance(source, str) else list(source)
    return PrepareConfig(
        input=text,
        adapter=data.adapter,
        text_column=data.text_column,
        tokenizer=tokenizer,
        output=str(resolve_cache_dir(data.cache_dir) / "corpora"),
        val_fraction=val_fraction,
        on_error=data.on_error,
    )
