"""Token data for training and evaluation: from `data` in the config to a training set and a validation set.

config -> sources: checked shards (sources.py), random tokens (synthetic.py), the user's own (own_data.py) -> windows.py
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Literal

from llmtrain.config.sections.data import ReadyData, SyntheticConfig, TokensConfig
from llmtrain.config.sections.own import OwnDataConfig
from llmtrain.data.batches import DataFacts, TrainingSet, ValidationSet
from llmtrain.data.config_mixture import source_groups
from llmtrain.data.mixture import Amount, MixtureSpec
from llmtrain.data.own_data import open_own
from llmtrain.data.prepare.output import resolve_cache_dir
from llmtrain.data.range_cache import RangeCache
from llmtrain.data.shards import ShardWindows
from llmtrain.data.sources import (
    GivenTokenizer,
    ShardSource,
    check_same_tokenizer,
    open_given_tokenizer,
    open_source,
)
from llmtrain.data.synthetic import SyntheticWindows
from llmtrain.data.windows import WindowItems
from llmtrain.errors import ConfigError


def open_training_data(config: ReadyData, *, seed: int, rank: int = 0, world_size: int = 1) -> TrainingSet:
    """Open the training data of `config`, for one rank. Raises ConfigError for what cannot be read."""
    if isinstance(config, SyntheticConfig):
        facts, items = _synthetic(config, "train", config.num_items, seed=seed)
    elif isinstance(config, OwnDataConfig):
        facts, items = _own(config, "train", seed=seed)
        if items.num_items == 0:
            raise ConfigError(f"data.name: {config.name} has no sequences in the split train: its length is 0")
    else:
        sources, mixture = _training_shards(config)
        facts, items = _shards(config, sources, mixture=mixture, seed=seed)
    return TrainingSet(facts=facts, items=items, rank=rank, world_size=world_size, num_workers=config.num_workers)


def reading_advice(config: ReadyData, training: TrainingSet) -> str | None:
    """Return what to set where each process reads much more of the shards than it uses; None where it does not.

    A source that is kept in memory as a whole is read by every process as a whole.
    """
    if not isinstance(config, TokensConfig) or not isinstance(training.items, WindowItems):
        return None
    world_size, num_chunks = training.world_size, config.shuffle_chunks
    if num_chunks % world_size == 0 or all(order.is_small for order in training.items.order().sources):
        return None
    return (
        f"data.shuffle_chunks is {num_chunks}, and {world_size} processes read: they share chunks, so that each reads "
        f"about {max(2, round(world_size / num_chunks))} times its part of the shards. For a new run set "
        f"data.shuffle_chunks to {world_size * -(-num_chunks // world_size)}, a multiple of them: it is another order"
    )


def open_validation_data(config: ReadyData, *, seed: int, training: TrainingSet | None = None) -> ValidationSet | None:
    """Open the validation data of `config`; None where it names none.

    Raises ConfigError for what cannot be read, and where its tokenizer is not that of `training`.
    """
    if isinstance(config, SyntheticConfig):
        if config.num_val_items == 0:
            return None
        facts, items = _synthetic(config, "val", config.num_val_items, seed=seed)
    elif isinstance(config, OwnDataConfig):
        facts, items = _own(config, "val", seed=seed)
        if items.num_items == 0:
            return None
    else:
        if config.val is None:
            return None
        source = open_source(config.val, key="data.val", given=_given_tokenizer(config), cache=shard_cache(config))
        facts, items = _shards(config, [source], mixture=None, seed=seed)
    made_with = (facts.tokenizer_sha256, facts.vocab_size)
    if training is not None and (training.facts.tokenizer_sha256, training.facts.vocab_size) != made_with:
        raise ConfigError(
            f"data.val: {facts.name} was made with another tokenizer than {training.name} (data.train): "
            "prepare one of them again with the tokenizer of the other"
        )
    return ValidationSet(facts=facts, items=items)


def _training_shards(config: TokensConfig) -> tuple[list[ShardSource], MixtureSpec | None]:
    """Return the sources of a mixture and how they are mixed, or all that is named as one source."""
    found, given, cache = source_groups(config), _given_tokenizer(config), shard_cache(config)
    sources = [open_source(group, key="data.train", given=given, cache=cache) for group in found.groups]
    first = sources[0]
    for other in sources[1:]:
        check_same_tokenizer(first.tokenizer, other.tokenizer, names=(first.name, other.name), key="data.train")
    return sources, found.mixture


def shard_cache(config: TokensConfig) -> RangeCache:
    """Return the cache of what is read of stores, for all runs of this machine. Raises ConfigError without a home."""
    return RangeCache(resolve_cache_dir(config.cache_dir) / "remote-shards", max_bytes=int(config.cache_gb * 1e9))


def _given_tokenizer(config: TokensConfig) -> GivenTokenizer | None:
    return open_given_tokenizer(config.tokenizer, cache_dir=config.cache_dir) if config.tokenizer else None


def _shards(
    config: TokensConfig, sources: Sequence[ShardSource], *, mixture: MixtureSpec | None, seed: int
) -> tuple[DataFacts, WindowItems]:
    first = sources[0]
    num_bytes = [source.num_bytes for source in sources]
    facts = DataFacts(
        name=", ".join(source.name for source in sources),
        vocab_size=first.tokenizer.vocab_size,
        eos_id=first.tokenizer.eos_id,
        num_tokens=sum(source.stream.num_tokens for source in sources),
        num_bytes=None if None in num_bytes else sum(filter(None, num_bytes)),
        tokenizer=first.tokenizer_folder,
        tokenizer_sha256=first.tokenizer.sha256,
    )
    items = WindowItems(
        sources=[ShardWindows(source.stream, config.seq_len) for source in sources],
        mixture=mixture,
        amounts=[Amount(source.stream.num_tokens - 1, source.num_documents) for source in sources],
        shuffle_chunks=config.shuffle_chunks,
        seed=seed,
        seq_len=config.seq_len,
        pad_id=first.tokenizer.eos_id or 0,
        end_id=first.tokenizer.eos_id if config.mask_documents else None,
        content_sha256=sha256(" ".join(source.content_sha256 for source in sources).encode()).hexdigest(),
    )
    return facts, items


def _synthetic(
    config: SyntheticConfig, split: Literal["train", "val"], num_items: int, *, seed: int
) -> tuple[DataFacts, WindowItems]:
    windows = SyntheticWindows(
        num_windows=num_items, seq_len=config.seq_len, vocab_size=config.vocab_size, seed=seed, split=split
    )
    facts = DataFacts(
        name="synthetic",
        vocab_size=config.vocab_size,
        eos_id=None,
        num_tokens=num_items * (config.seq_len + 1),
        num_bytes=None,
        tokenizer=None,
        tokenizer_sha256=None,
    )
    items = WindowItems(
        sources=[windows],
        mixture=None,
        shuffle_chunks=1,
        seed=seed,
        seq_len=config.seq_len,
        pad_id=0,
        end_id=None,
        content_sha256=sha256(repr(windows).encode()).hexdigest(),
    )
    return facts, items


def _own(config: OwnDataConfig, split: Literal["train", "val"], *, seed: int) -> tuple[DataFacts, WindowItems]:
    facts, windows, content_sha256 = open_own(config.name, config.options, split=split, seq_len=config.seq_len)
    items = WindowItems(
        sources=[windows],
        mixture=None,
        shuffle_chunks=1,
        seed=seed,
        seq_len=config.seq_len,
        pad_id=facts.eos_id or 0,
        end_id=facts.eos_id,
        content_sha256=content_sha256,
    )
    return facts, items
