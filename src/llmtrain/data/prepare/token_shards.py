"""`prepare`: corpus → tokenizer → token shards with a manifest.

    find_inputs → scan (with the quality steps) → select → make_tokenizer → write_splits → manifest → the folder takes
    its place

The same text and options give the same bytes, whatever the number of workers, and however often it was cut off.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmtrain._version import __version__
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.data import PrepareConfig, ReadyData, SyntheticConfig, TokensConfig
from llmtrain.config.sections.own import OwnDataConfig
from llmtrain.config.sections.schema import Config
from llmtrain.data.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from llmtrain.data.prepare.documents import CorpusReader, open_corpus
from llmtrain.data.prepare.dropped import DROPPED_NAME, write_dropped
from llmtrain.data.prepare.encode import token_dtype, write_splits
from llmtrain.data.prepare.implied import (
    as_tokens,
    cache_folder,
    in_terms_of,
    training_preparation,
    validation_preparation,
)
from llmtrain.data.prepare.inputs import find_inputs, total_size
from llmtrain.data.prepare.journal import open_journal
from llmtrain.data.prepare.output import output_lock, resolve_output, staged_output
from llmtrain.data.prepare.parallel import Executor, LocalExecutor, resolve_num_workers
from llmtrain.data.prepare.progress import ProgressCall, Stage
from llmtrain.data.prepare.quality.workers import OpenSteps, open_steps
from llmtrain.data.prepare.reuse import (
    check_would_be_made,
    making_of,
    named_sources,
    recorded_options,
    refuse_differences,
)
from llmtrain.data.prepare.scan_file import SCAN_NAME, load_scan, save_scan
from llmtrain.data.prepare.selection import Corpus, scan, select
from llmtrain.data.prepare.vocabulary import TOKENIZER_FOLDER, make_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.faults import reach
from llmtrain.screen import counted
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.progress import Progress

logger = logging.getLogger("llmtrain.prepare")


def prepare(
    config: Config, *, executor: Executor | None = None, progress: ProgressCall | None = None
) -> dict[str, Any]:
    """Make the shards that `config.prepare` describes, in place of those that are there; returns what was made.

    `executor` runs the tasks; without one, the threads of this process do. It changes no byte of the shards. What was
    there before stays until the new shards are complete. Raises ConfigError when there is no `prepare` section, when
    nothing can be read, and for bad files and lines (on_error: fail); RunError when the disk is full.
    """
    setup_logging(config.logging, run_folder=None, rank=0)
    if config.prepare is None:
        raise ConfigError("the config has no `prepare` section, which says what text becomes shards and where they go")
    output = resolve_output(config.prepare.output)
    with output_lock(output):
        return _make(config.prepare, output, executor=executor, progress=progress)


def ensure_shards(config: Config, *, progress: ProgressCall | None = None) -> ReadyData:
    """Return the data that `config.data` names, ready to be read.

    Shards that are missing are prepared when `config.prepare` says how; those of text (corpus, huggingface) are made in
    the cache. Any number of processes may call it at once: one prepares, the others wait for it. Raises ConfigError
    when shards are missing and cannot be made, or when those in `prepare.output` were made with other options or
    inputs.
    """
    data = config.data
    if isinstance(data, TokensConfig):
        _ensure_named(data, config.prepare, progress=progress)
        return data
    if isinstance(data, SyntheticConfig | OwnDataConfig):
        return data
    if isinstance(data, ChatConfig):
        raise ConfigError("data.name is chat, whose rows are no token shards: `llmtrain train` reads them as they are")
    if config.prepare is not None:
        raise ConfigError(
            f"data.name is {data.name}, which makes its shards by itself, but there is a `prepare` section too: "
            "remove the section, or set data.name: tokens"
        )
    try:
        training = _ensure_cached(training_preparation(data), progress=progress)
        of_validation = validation_preparation(data, tokenizer=training / TOKENIZER_FOLDER)
        validation = _ensure_cached(of_validation, progress=progress) if of_validation else None
    except ConfigError as error:
        raise in_terms_of(data, error) from error
    return as_tokens(data, training=training, validation=validation)


def _ensure_cached(options: PrepareConfig, *, progress: ProgressCall | None) -> Path:
    """Return the folder of these shards in the cache. If it exists, it is complete; its name tells what it holds."""
    folder = resolve_output(str(cache_folder(options, num_workers=resolve_num_workers(options.num_workers))))
    if not (folder / MANIFEST_NAME).is_file():
        with output_lock(folder):
            if not (folder / MANIFEST_NAME).is_file():  # else another process has made them meanwhile
                logger.info("%s: preparing the text, once", folder)
                _make(options, folder, progress=progress)
    return folder


def _ensure_named(data: TokensConfig, options: PrepareConfig | None, *, progress: ProgressCall | None) -> None:
    sources = named_sources(data)
    missing = [source for source in sources if source.is_missing()]
    if options is None:
        if missing:
            raise ConfigError(
                f"{missing[0]}: no token shards there, and the config has no `prepare` section to make them: "
                "name a folder that `llmtrain prepare CONFIG` made, or add the section"
            )
        return
    output = resolve_output(options.output)
    check_would_be_made(sources, options=options, output=output)
    if missing:
        with output_lock(output):
            if not (output / MANIFEST_NAME).is_file():  # else another process has made them meanwhile
                logger.info("%s: no token shards yet; preparing them", output)
                _make(options, output, progress=progress)
                return
    if any(source.is_inside(output) for source in sources):
        num_workers = resolve_num_workers(options.num_workers)
        refuse_differences(read_manifest(output), folder=output, options=options, num_workers=num_workers)


def _make(
    options: PrepareConfig, output: Path, *, executor: Executor | None = None, progress: ProgressCall | None
) -> dict[str, Any]:
    began = time.perf_counter()
    executor = executor or LocalExecutor(resolve_num_workers(options.num_workers))
    inputs = find_inputs(options)
    executor.check(output, inputs)
    with ExitStack() as open_until_done:
        bar = open_until_done.enter_context(Progress())
        folder = open_until_done.enter_context(staged_output(output))
        report = progress or bar.track
        num_beside = executor.num_workers if executor.shares_gil else 1
        opening = open_steps(options.steps, num_workers=num_beside, num_bytes=total_size(inputs))
        steps = open_until_done.enter_context(opening)
        corpus = _read(open_corpus(inputs, options), options, steps, folder, executor=executor, report=report)
        counts = corpus.counts()

        reach("corpus-read")
        journal = open_journal(folder, key=making_of(corpus, options), keep=SCAN_NAME)
        tokenizer, tokenizer_record = make_tokenizer(
            options.tokenizer, corpus=corpus, folder=folder, journal=journal, executor=executor, report=report
        )

        with Stage("encode", total=corpus.kept_bytes(), report=report) as encoding:
            splits = write_splits(
                folder,
                corpus=corpus,
                tokenizer=tokenizer,
                options=options,
                journal=journal,
                executor=executor,
                advance=encoding.advance,
            )
        num_tokens = sum(split.tokens for split in splits.values())
        encoding.log(f"{counted(num_tokens, 'token')}")

        write_dropped(folder, corpus)
        assert counts.train + counts.val == sum(split.documents for split in splits.values())
        assert corpus.kept_bytes() == sum(split.bytes for split in splits.values())
        manifest = Manifest(
            tool_version=__version__,
            options=recorded_options(options),
            inputs=corpus.inputs,
            tokenizer=tokenizer_record,
            token_dtype=token_dtype(tokenizer.vocab_size),
            counts=counts,
            steps=corpus.step_records(),
            splits=splits,
        )
        write_manifest(folder, manifest)
        reach("manifest-written")
        journal.remove()
        (folder / SCAN_NAME).unlink()
    return _result(manifest, output, errors=corpus.errors, seconds=time.perf_counter() - began)


def _read(
    reader: CorpusReader,
    options: PrepareConfig,
    steps: OpenSteps,
    folder: Path,
    *,
    executor: Executor,
    report: ProgressCall,
) -> Corpus:
    """Return the documents with their fates; what a killed preparation had read is taken from `folder`."""
    with Stage("read", total=total_size(reader.inputs), report=report) as reading:
        read = load_scan(folder, reader, options=options, steps=steps)
        if read is None:
            read = scan(
                reader,
                options=options,
                steps=steps,
                scratch=folder,
                executor=executor,
                advance=reading.advance,
            )
            save_scan(folder, read, options=options)
    corpus = select(read, options)
    counts = corpus.counts().model_dump()
    reading.log(", ".join(f"{count:,} {name}" for name, count in counts.items()))
    return corpus


def _result(manifest: Manifest, output: Path, *, errors: list[str], seconds: float) -> dict[str, Any]:
    counts = manifest.counts
    result: dict[str, Any] = {
        "output": str(output),
        "manifest": str(output / MANIFEST_NAME),
        "tokenizer": str(output / manifest.tokenizer.path),
        "vocab_size": manifest.tokenizer.vocab_size,
        "documents": counts.read,
        "rejected": counts.read - counts.train - counts.val,
        "counts": counts.model_dump(),
        "steps": [record.model_dump(mode="json") for record in manifest.steps],
        "dropped": str(output / DROPPED_NAME) if counts.dropped else None,
        "errors": errors,
        "tokens": sum(split.tokens for split in manifest.splits.values()),
        "seconds": round(seconds, 2),
    }
    for name, split in manifest.splits.items():
        result |= {
            f"{name}_documents": split.documents,
            f"{name}_tokens": split.tokens,
            f"{name}_bytes": split.bytes,
            f"{name}_shards": len(split.shards),
        }
    return result
