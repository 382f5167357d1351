"""Inspection of token shards: documents, lengths, sources, and the first items of the run.

CONFIG | SHARDS ─▶ sources ─┬─ survey.py ─▶ lengths, sources, vocabulary, documents that are divided
                            ├─ the first documents
                            └─ the first items, in the run's own order
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmtrain.config.loading.load import LoadedConfig, section_of
from llmtrain.config.sections.data import SyntheticConfig, TokensConfig
from llmtrain.config.sections.own import OwnDataConfig
from llmtrain.config.sections.schema import Config
from llmtrain.contracts import IGNORE_INDEX
from llmtrain.data.batches import DataFacts, ItemReader
from llmtrain.data.inspection.analysis import Analysis
from llmtrain.data.inspection.analysis_options import AnalysisOptions
from llmtrain.data.inspection.block_sample import BlockSample
from llmtrain.data.inspection.document_batches import row_group_batch
from llmtrain.data.inspection.lengths import describe_lengths
from llmtrain.data.inspection.mixture import describe_mixture
from llmtrain.data.inspection.survey import (
    RowGroupContent,
    Survey,
    count_documents,
    evenly_spaced,
    iter_documents,
    survey,
)
from llmtrain.data.inspection.units import TokenVocabulary
from llmtrain.data.manifest import MANIFEST_NAME, find_manifest, read_manifest
from llmtrain.data.prepare.dropped import read_dropped
from llmtrain.data.prepare.reuse import named_sources
from llmtrain.data.prepare.token_shards import ensure_shards
from llmtrain.data.shards import ShardWindows, TokenStream
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer
from llmtrain.data.tokens import open_training_data, open_validation_data
from llmtrain.data.windows import WindowItems
from llmtrain.errors import ConfigError
from llmtrain.screen import counted

Split = Literal["train", "val"]

SHOWN_TOKENS = 160
"""Tokens that are decoded of a longer document or item, from its beginning and its end."""


def inspect_tokens(
    wanted: LoadedConfig | str,
    *,
    split: Split = "train",
    num_documents: int = 3,
    num_items: int = 2,
    analyse: AnalysisOptions | None = None,
) -> dict[str, Any]:
    """Describe the data that a config names, or the shards at a path (without items, which only a config has).

    Text that is tokenised as needed (data.name corpus, huggingface) is tokenised now if it was not yet. `analyse` adds
    the analysis of the same row groups. Raises ConfigError where there are no shards, with the command that makes them.
    """
    if isinstance(wanted, str):
        data, name, num_items = section_of(TokensConfig, {"train": _shards_at(wanted, split)}, name="data"), wanted, 0
        facts, items = _open(data, "train", seed=0, name=name)
    else:
        data, name = _tokens_of(wanted.config, name=wanted.source), wanted.source
        facts, items = _open(data, split, seed=wanted.config.run.seed, name=name)
    assert facts.tokenizer is not None, "shards are made from text"
    tokenizer = load_tokenizer(facts.tokenizer)
    streams = _streams(items)
    chosen, analysis = _sampled(streams, tokenizer, facts, analyse)
    found = survey(
        streams,
        vocab_size=facts.vocab_size,
        eos_id=facts.eos_id,
        seq_len=data.seq_len,
        chosen=chosen,
        observe=_observer(analysis, tokenizer) if analysis else None,
    )
    bytes_per_token = facts.num_bytes / facts.num_tokens if facts.num_bytes else None
    reader = items.open(shuffled=isinstance(wanted, str) or split == "train")
    return {
        "name": name,
        "split": split,
        "data": facts.name,
        "tokenizer": str(facts.tokenizer),
        "vocab_size": facts.vocab_size,
        "end_token": tokenizer.eos_token,
        "documents": sum(count_documents(stream) for stream in streams),
        "tokens": facts.num_tokens,
        "bytes_per_token": bytes_per_token,
        "row_groups": found.num_row_groups,
        "row_groups_read": found.num_row_groups_read,
        "lengths": _lengths(found),
        "sources": _sources(found),
        "quality": _quality(streams),
        **describe_mixture(items.order().mixture if items.mixture else None, [stream.num_tokens for stream in streams]),
        "tokens_that_occur": int((found.token_counts > 0).sum()),
        "windows": None if isinstance(wanted, str) else _windows(data, items, found),
        "faults": _faults(found, facts),
        "first_documents": [
            {"source": one.source, "tokens": len(one.tokens), "text": _excerpt(one.tokens.tolist(), tokenizer)}
            for one in islice(chain.from_iterable(map(iter_documents, streams)), num_documents)
        ],
        "items": [_item(number, reader, streams, tokenizer) for number in range(min(num_items, _first_epoch(items)))],
        **({"analysis": analysis.report(bytes_per_unit=bytes_per_token)} if analysis else {}),
    }


def _quality(streams: Sequence[TokenStream]) -> list[dict[str, Any]]:
    """Return what the quality steps did that made the shards here, and examples of what they left out, by folder."""
    first_paths = [path for stream in streams for path in stream.paths[:1]]
    folders = {find_manifest(path) for path in first_paths if isinstance(path, Path)}
    return [
        {
            "folder": str(folder),
            "steps": [record.model_dump(mode="json") for record in read_manifest(folder).steps],
            "left_out": read_dropped(folder),
        }
        for folder in sorted(folder for folder in folders if folder is not None)
    ]


# -- opening the shards ------------------------------------------------------------------------------------------------


def _open(data: TokensConfig, split: Split, *, seed: int, name: str) -> tuple[DataFacts, WindowItems]:
    training = open_training_data(data, seed=seed)
    found = training if split == "train" else open_validation_data(data, seed=seed, training=training)
    if found is None:
        raise ConfigError(f"{name}: data.val names no validation shards")
    assert isinstance(found.items, WindowItems)
    return found.facts, found.items


def _streams(items: WindowItems) -> list[TokenStream]:
    return [source.stream for source in items.sources if isinstance(source, ShardWindows)]


def _tokens_of(config: Config, *, name: str) -> TokensConfig:
    """Return the shards that the config names; those of text are made in the cache, as for training."""
    if isinstance(config.data, SyntheticConfig):
        raise ConfigError(f"{name}: data.name is synthetic: its tokens are random, there is nothing to inspect")
    if isinstance(config.data, OwnDataConfig):
        raise ConfigError(
            f"{name}: data.name is {config.data.name}, your own class: only token shards and rows are shown"
        )
    if isinstance(config.data, TokensConfig):
        _reject_missing(config.data, name=name, can_prepare=config.prepare is not None)
        return config.data
    ready = ensure_shards(config)
    assert isinstance(ready, TokensConfig)
    return ready


def _shards_at(path: str, split: Split) -> str:
    """Return `path`, or the split below it, where it is the output folder of `prepare`."""
    inside = os.path.join(path, split)
    if os.path.isfile(os.path.join(path, MANIFEST_NAME)):
        if not os.path.isdir(inside):
            raise ConfigError(f"{path} has no split {split}")
        return inside
    return path


def _reject_missing(data: TokensConfig, *, name: str, can_prepare: bool) -> None:
    missing = next((source for source in named_sources(data) if source.is_missing()), None)
    if missing is None:
        return
    if can_prepare:
        raise ConfigError(f"{missing}: no token shards there yet: make them with `llmtrain prepare {name}`")
    raise ConfigError(
        f"{missing}: no token shards there, and {name} has no `prepare` section to make them: "
        "name a folder that `llmtrain prepare CONFIG` made, or add the section"
    )


# -- the analysis ------------------------------------------------------------------------------------------------------


def _sampled(
    streams: Sequence[TokenStream], tokenizer: Tokenizer, facts: DataFacts, options: AnalysisOptions | None
) -> tuple[list[int], Analysis | None]:
    """Return the numbers of the row groups to read, and the analysis that is asked for, which counts them."""
    num_row_groups = sum(stream.num_row_groups for stream in streams)
    if options is None or options.share is None:
        chosen, sample = evenly_spaced(num_row_groups), BlockSample(seed=options.seed if options else 0)
    else:
        sample = BlockSample(options.share, options.seed)
        chosen = [number for number in range(num_row_groups) if sample.takes(number)]
        sample.reject_none(len(chosen), of=num_row_groups)
    if options is None:
        return chosen, None
    vocabulary = TokenVocabulary(facts.vocab_size, decode=tokenizer.decode, name_of=tokenizer.name_of)
    analysis = Analysis(vocabulary, sample, num_listed=options.num_listed)
    analysis.took_blocks(len(chosen), of=num_row_groups)
    return chosen, analysis


def _observer(analysis: Analysis, tokenizer: Tokenizer) -> Callable[[RowGroupContent], None]:
    def observe(content: RowGroupContent) -> None:
        analysis.add(row_group_batch(content, decode=tokenizer.decode, eos_id=tokenizer.eos_id))

    return observe


# -- the parts of the report -------------------------------------------------------------------------------------------


def _lengths(found: Survey) -> dict[str, Any]:
    described = describe_lengths(Counter(found.lengths.tolist()))
    assert described is not None, "a source has a document"
    names = ("shortest", "median", "mean", "std", "p90", "p99", "longest")
    histogram = [
        {"from": row["from"], "to": row["to"], "documents": row["rows"], "tokens": row["total"]}
        for row in described["histogram"]
    ]
    return {**{name: described[name] for name in names}, "histogram": histogram}


def _sources(found: Survey) -> list[dict[str, Any]]:
    total = max(1, found.tokens_by_source.total())
    return [
        {"source": name, "documents": found.documents_by_source[name], "tokens": tokens, "share": tokens / total}
        for name, tokens in found.tokens_by_source.most_common()
    ]


def _first_epoch(items: WindowItems) -> int:
    """Return the sequences of the run's first epoch: fewer than those of all sources where the data end before."""
    end = items.order().mixture.end
    return items.num_items if end is None else min(end, items.num_items)


def _windows(data: TokensConfig, items: WindowItems, found: Survey) -> dict[str, Any]:
    """Describe how windows divide the stream of tokens. No token is left out: a document only loses context."""
    return {
        "seq_len": data.seq_len,
        "items": items.num_items,
        "documents_apart": data.mask_documents,
        "documents_cut": found.num_divided,
        "share_cut": found.num_divided / max(1, len(found.lengths)),
        "padding": sum(-(stream.num_tokens - 1) % data.seq_len for stream in _streams(items)),
    }


def _faults(found: Survey, facts: DataFacts) -> list[str]:
    faults = []
    if found.num_without_end:
        faults.append(
            f"{counted(found.num_without_end, 'document has', 'documents have')} no end token ({facts.eos_id}) at "
            "their end"
        )
    if found.foreign_ids:
        some = ", ".join(map(str, sorted(found.foreign_ids)[:8]))
        faults.append(f"tokens that the vocabulary of {facts.vocab_size:,} does not have: {some}")
    return faults


def _item(number: int, reader: ItemReader, streams: Sequence[TokenStream], tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe an item as the model gets it: its documents one by one, each with the end token that closes it."""
    places = reader.locate(np.array([number]))
    source, epoch, _, window = (int(column[0]) for column in places)
    (arrays,) = reader.read(places, num_batches=1, batch_size=1)
    labels = arrays["labels"][0]
    supervised = int((labels != IGNORE_INDEX).sum())
    tokens = [*arrays["input_ids"][0, :supervised].tolist(), int(labels[supervised - 1])]
    first = window * len(labels)
    pieces, begin = [], 0
    for end in [index + 1 for index, token in enumerate(tokens) if token == tokenizer.eos_id] + [len(tokens)]:
        if end > begin:
            pieces.append(
                {
                    "tokens": end - begin,
                    "begins_before": begin == 0 and first > 0 and streams[source].token(first - 1) != tokenizer.eos_id,
                    "ends": tokens[end - 1] == tokenizer.eos_id,
                    "text": _excerpt(tokens[begin:end], tokenizer),
                }
            )
        begin = end
    return {
        "item": number,
        "source": source,
        "epoch": epoch,
        "window": window,
        "supervised_tokens": supervised,
        "padding": len(labels) - supervised,
        "documents": pieces,
    }


def _excerpt(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of tokens, with the end token written out; of many, the first and the last."""
    if len(tokens) <= SHOWN_TOKENS:
        return tokenizer.decode(tokens)
    left_out = len(tokens) - SHOWN_TOKENS
    head, tail = tokens[: SHOWN_TOKENS * 3 // 4], tokens[-SHOWN_TOKENS // 4 :]
    return f"{tokenizer.decode(head)}\n[… {counted(left_out, 'token')} …]\n{tokenizer.decode(tail)}"
