"""The tokenizer of a corpus: trained on its training documents, or one that exists; saved beside the shards."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from llmtrain.config.sections.data import TokenizerConfig
from llmtrain.data.manifest import TokenizerRecord
from llmtrain.data.prepare.encode import texts_of
from llmtrain.data.prepare.journal import Journal
from llmtrain.data.prepare.parallel import Executor
from llmtrain.data.prepare.progress import ProgressCall, Stage
from llmtrain.data.prepare.selection import Corpus, training_sample
from llmtrain.data.tokenizers import (
    Tokenizer,
    folder_fingerprint,
    library_threads,
    load_hf_tokenizer,
    load_tokenizer,
    train_bpe,
    train_characters,
)
from llmtrain.faults import reach
from llmtrain.screen import counted

logger = logging.getLogger("llmtrain.prepare")

DEFAULT_VOCAB_SIZE = 8192
TOKENIZER_FOLDER = "tokenizer"

MAX_TRAINING_BYTES = 64_000_000
"""A tokenizer is trained on at most as much text, sampled by hash. Half of 31 MB of source already gave a vocabulary
of 8192 with 0.4 % fewer bytes a token, in half the time, so more text would only take longer."""


def vocabulary_options(options: TokenizerConfig) -> dict[str, Any]:
    """Return the size and frequency that a tokenizer is trained with; defaults where the config leaves them open."""
    if options.kind == "hf":
        return {}
    is_bpe = options.kind == "bpe"
    return {
        "vocab_size": options.vocab_size or (DEFAULT_VOCAB_SIZE if is_bpe else None),
        "min_frequency": options.min_frequency or (2 if is_bpe else 1),
    }


def make_tokenizer(
    options: TokenizerConfig,
    *,
    corpus: Corpus,
    folder: Path,
    journal: Journal,
    executor: Executor,
    report: ProgressCall,
) -> tuple[Tokenizer, TokenizerRecord]:
    """Train or fetch the tokenizer, save it into <folder>/tokenizer, and return it as loaded from there.

    One that the journal has is taken as it is. Raises ConfigError when an existing tokenizer cannot be had or has no
    end token.
    """
    target = folder / TOKENIZER_FOLDER
    record = journal.tokenizer()
    if record is None:
        record = _make(options, corpus=corpus, target=target, executor=executor, report=report)
        _sync_files(target)
        reach("tokenizer-saved")
        journal.add_tokenizer(record)
    tokenizer = load_tokenizer(target)
    with library_threads(executor.num_workers > 1):
        if tokenizer.speed_up(corpus.sample):
            logger.info("tokenizer: encoding by its faster form, which gave the same tokens for a sample of the text")
        else:
            logger.info("tokenizer: encoding by the tokenizers library; it has no faster form with the same tokens")
    return tokenizer, record


def _make(
    options: TokenizerConfig, *, corpus: Corpus, target: Path, executor: Executor, report: ProgressCall
) -> TokenizerRecord:
    trained_documents = trained_bytes = source = None
    if options.kind == "hf":
        assert options.path is not None, "the schema requires it"
        load_hf_tokenizer(options.path).save(target)
        source = folder_fingerprint(options.path)
    else:
        train, max_bytes = (train_bpe, MAX_TRAINING_BYTES) if options.kind == "bpe" else (train_characters, None)
        sample = training_sample(corpus, max_bytes=max_bytes)
        trained_documents = int(sample.sum())
        trained_bytes = int(corpus.num_bytes[sample].sum())
        with Stage("tokenizer", total=trained_bytes, report=report) as stage, library_threads(executor.num_workers > 1):
            texts = texts_of(corpus, sample, executor=executor, advance=stage.advance)
            train(texts, **vocabulary_options(options)).save(target)
        stage.log(f"trained on {counted(trained_documents, 'document')}")
    tokenizer = load_tokenizer(target)
    if options.kind == "bpe" and tokenizer.vocab_size < (options.vocab_size or DEFAULT_VOCAB_SIZE):
        logger.warning("tokenizer: the text has pairs for a vocabulary of %d tokens only", tokenizer.vocab_size)
    return TokenizerRecord(
        kind=options.kind,
        path=TOKENIZER_FOLDER,
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        source_sha256=source,
        trained_documents=trained_documents,
        trained_bytes=trained_bytes,
    )


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
