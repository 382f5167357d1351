"""`inspect`: the data that a run would see, on token shards: documents, lengths, sources, and the items of the run.

CONFIG | SHARDS ─▶ sources ─┬─ survey ─▶ lengths, sources, vocabulary, what is cut
                            ├─ the first documents
                            └─ the first items, in the run's own order
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

import numpy as np

from llmtrain.config.data import SyntheticConfig, TokensConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.load import LoadedConfig
from llmtrain.config.schema import Config
from llmtrain.config.sources import WeightedSource
from llmtrain.contracts import IGNORE_INDEX
from llmtrain.data.manifest import MANIFEST_NAME
from llmtrain.data.prepare.reuse import named_sources
from llmtrain.data.rows import EvaluationPlan, Rows, TrainingPlan, WindowSource
from llmtrain.data.shards import ShardWindows, TokenStream
from llmtrain.data.survey import Survey, count_documents, iter_documents, survey
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer
from llmtrain.data.tokens import DataFacts, open_training_data, open_validation_data
from llmtrain.recipes.prepare import ensure_shards

Split = Literal["train", "val"]

SHOWN_TOKENS = 160
"""Of a document or item, at most so many tokens are decoded, from its beginning and its end."""


def inspect(
    wanted: LoadedConfig | str, *, split: Split = "train", num_documents: int = 3, num_items: int = 2
) -> dict[str, Any]:
    """What is in the data that a config names, or at a path of shards (without items, which only a config has).

    Text that is tokenised as needed (data.name corpus, huggingface) is, if it was not yet. Raises ConfigError where
    there are no shards, with the command that makes them.
    """
    if isinstance(wanted, str):
        data, seed, name, num_items = TokensConfig(train=_shards_at(wanted, split)), 0, wanted, 0
        opened: Split = "train"
    else:
        config, name, seed, opened = wanted.config, wanted.source, wanted.config.run.seed, split
        data = _tokens_of(config, name=name)
    shards = _open(data, opened, seed=seed, name=name)
    facts = shards.facts
    assert facts.tokenizer is not None, "shards are made from text"
    tokenizer = load_tokenizer(facts.tokenizer)
    found = survey(shards.streams, vocab_size=facts.vocab_size, eos_id=facts.eos_id, seq_len=data.seq_len)
    return {
        "name": name,
        "split": split,
        "data": facts.name,
        "tokenizer": str(facts.tokenizer),
        "vocab_size": facts.vocab_size,
        "end_token": tokenizer.eos_token,
        "documents": sum(count_documents(stream) for stream in shards.streams),
        "tokens": facts.num_tokens,
        "bytes_per_token": facts.num_bytes / facts.num_tokens if facts.num_bytes else None,
        "row_groups": found.num_row_groups,
        "row_groups_read": found.num_row_groups_read,
        "lengths": _lengths(found),
        "sources": _sources(found),
        "mixture": shards.mixture,
        "tokens_that_occur": int((found.token_counts > 0).sum()),
        "windows": None if isinstance(wanted, str) else _windows(data, shards, found),
        "faults": _faults(found, facts),
        "first_documents": [
            {"source": one.source, "tokens": len(one.tokens), "text": _excerpt(one.tokens.tolist(), tokenizer)}
            for one in islice(chain.from_iterable(map(iter_documents, shards.streams)), num_documents)
        ],
        "items": [_item(shards, number, tokenizer) for number in range(min(num_items, shards.num_items))],
    }


@dataclass(frozen=True, kw_only=True)
class _Shards:
    """A split's token streams, and the way to its items."""

    facts: DataFacts
    streams: list[TokenStream]
    mixture: list[dict[str, Any]] | None
    num_items: int
    rows_of_item: Callable[[int], Rows]
    place_of_item: Callable[[int], tuple[int, int, int]]
    """(source, epoch, window)"""


def _open(data: TokensConfig, split: Split, *, seed: int, name: str) -> _Shards:
    training = open_training_data(data, seed=seed)
    if split == "val":
        validation = open_validation_data(data, seed=seed, training=training)
        if validation is None:
            raise ConfigError(f"{name}: data.val names no validation shards")
        # A batch of one: item i is window i, as an evaluation that takes all of them reads them.
        evaluation = EvaluationPlan(
            source=validation.source, format=validation.format, batch_size=1, max_batches=None, rank=0, world_size=1
        )
        return _Shards(
            facts=validation.facts,
            streams=[_stream(validation.source)],
            mixture=None,
            num_items=validation.num_items,
            rows_of_item=evaluation.open(),
            place_of_item=lambda item: (0, 0, item),
        )
    plan = TrainingPlan(
        sources=training.sources,
        weights=training.weights,
        format=training.format,
        shuffle_chunks=training.shuffle_chunks,
        seed=seed,
        start_item=0,
        end_item=training.items_per_epoch,
        batch_size=1,
        micro_batch_size=1,
        rank=0,
        world_size=1,
    )
    order = plan.order()

    def place_of_item(item: int) -> tuple[int, int, int]:
        places = order.locate(np.array([item]))
        return int(places.source[0]), int(places.epoch[0]), int(places.window[0])

    streams = [_stream(source) for source in training.sources]
    return _Shards(
        facts=training.facts,
        streams=streams,
        mixture=_mixture(data, streams, order.mixture.quotas.tolist()) if training.weights else None,
        num_items=training.items_per_epoch,
        rows_of_item=plan.open(),
        place_of_item=place_of_item,
    )


def _stream(source: WindowSource) -> TokenStream:
    assert isinstance(source, ShardWindows)
    return source.stream


def _mixture(data: TokensConfig, streams: Sequence[TokenStream], quotas: Sequence[int]) -> list[dict[str, Any]]:
    """Each weighted source with its share of the items, and how often an epoch of the run goes through it."""
    sources = [source for source in data.train if isinstance(source, WeightedSource)]
    total = sum(stream.num_tokens for stream in streams)
    return [
        {
            "path": source.path,
            "tokens": stream.num_tokens,
            "share": quota / sum(quotas),
            "passes_an_epoch": quota / sum(quotas) * total / stream.num_tokens,
        }
        for source, stream, quota in zip(sources, streams, quotas, strict=True)
    ]


def _tokens_of(config: Config, *, name: str) -> TokensConfig:
    """The shards that the config names; those of text are made in the cache, as for a training."""
    if isinstance(config.data, SyntheticConfig):
        raise ConfigError(f"{name}: data.name is synthetic: its tokens are random, there is nothing to inspect")
    if isinstance(config.data, TokensConfig):
        _refuse_missing(config.data, name=name, can_prepare=config.prepare is not None)
        return config.data
    ready = ensure_shards(config)
    assert isinstance(ready, TokensConfig)
    return ready


def _shards_at(path: str, split: Split) -> str:
    """`path`, or below it the split, where it is the whole output of `prepare`."""
    inside = os.path.join(path, split)
    if os.path.isfile(os.path.join(path, MANIFEST_NAME)):
        if not os.path.isdir(inside):
            raise ConfigError(f"{path} has no split {split}")
        return inside
    return path


def _refuse_missing(data: TokensConfig, *, name: str, can_prepare: bool) -> None:
    missing = next((source for source in named_sources(data) if source.is_missing()), None)
    if missing is None:
        return
    if can_prepare:
        raise ConfigError(f"{missing}: no token shards there yet: make them with `llmtrain prepare {name}`")
    raise ConfigError(
        f"{missing}: no token shards there, and {name} has no `prepare` section to make them: "
        "name a folder that `llmtrain prepare CONFIG` made, or add the section"
    )


# -- the parts of the report -------------------------------------------------------------------------------------------


def _lengths(found: Survey) -> dict[str, Any]:
    return {
        "shortest": found.quantile(0.0),
        "median": found.quantile(0.5),
        "mean": float(found.lengths.mean()),
        "p90": found.quantile(0.9),
        "p99": found.quantile(0.99),
        "longest": found.quantile(1.0),
        "histogram": [
            {"from": low, "to": high, "documents": documents, "tokens": tokens}
            for low, high, documents, tokens in found.histogram()
        ],
    }


def _sources(found: Survey) -> list[dict[str, Any]]:
    total = max(1, found.tokens_by_source.total())
    return [
        {"source": name, "documents": found.documents_by_source[name], "tokens": tokens, "share": tokens / total}
        for name, tokens in found.tokens_by_source.most_common()
    ]


def _windows(data: TokensConfig, shards: _Shards, found: Survey) -> dict[str, Any]:
    """How the stream of tokens is cut. Nothing is left out: what a document loses at a cut is context."""
    return {
        "seq_len": data.seq_len,
        "items": shards.num_items,
        "documents_apart": data.mask_documents,
        "documents_cut": found.num_cut,
        "share_cut": found.num_cut / max(1, len(found.lengths)),
        "padding": sum(-(stream.num_tokens - 1) % data.seq_len for stream in shards.streams),
    }


def _faults(found: Survey, facts: DataFacts) -> list[str]:
    faults = []
    if found.num_without_end:
        faults.append(f"{found.num_without_end:,} documents have no end token ({facts.eos_id}) at their end")
    if found.foreign_ids:
        some = ", ".join(map(str, sorted(found.foreign_ids)[:8]))
        faults.append(f"tokens that the vocabulary of {facts.vocab_size:,} does not have: {some}")
    return faults


def _item(shards: _Shards, number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """An item as the model gets it: its documents one by one, each with the end token that closes it."""
    source, epoch, window = shards.place_of_item(number)
    rows = shards.rows_of_item(number)
    labels = rows.labels[0]
    supervised = int((labels != IGNORE_INDEX).sum())
    tokens = [*rows.input_ids[0, :supervised].tolist(), int(labels[supervised - 1])]
    stream = shards.streams[source]
    first = window * len(labels)
    pieces, begin = [], 0
    for end in [index + 1 for index, token in enumerate(tokens) if token == tokenizer.eos_id] + [len(tokens)]:
        if end > begin:
            pieces.append(
                {
                    "tokens": end - begin,
                    "begins_before": begin == 0 and first > 0 and stream.token(first - 1) != tokenizer.eos_id,
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
    """The text of tokens, with the end token written out; of many, the first and the last."""
    if len(tokens) <= SHOWN_TOKENS:
        return tokenizer.decode(tokens)
    left_out = len(tokens) - SHOWN_TOKENS
    head, tail = tokens[: SHOWN_TOKENS * 3 // 4], tokens[-SHOWN_TOKENS // 4 :]
    return f"{tokenizer.decode(head)}\n[… {left_out:,} tokens …]\n{tokenizer.decode(tail)}"
