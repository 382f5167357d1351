"""The model and the data of a plan, as far as they are known before the run: shapes, and numbers of items and tokens.

A decoder is known from the config, a model of transformers from its config.json, which is fetched from the Hub if need
be. Data are read where that costs little: token shards always, rows where they are few. Nothing here is trained, and
the model has no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from llmtrain.config.chat import ChatConfig
from llmtrain.config.data import SyntheticConfig, TokensConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.huggingface import HuggingFaceConfig
from llmtrain.config.model import DecoderConfig
from llmtrain.config.running import RunConfig
from llmtrain.config.schema import Config
from llmtrain.config.training import DistributedConfig, TrainerConfig
from llmtrain.data.chat.data import ChatData
from llmtrain.data.chat.row_files import RowDataset
from llmtrain.data.prepare.reuse import named_sources
from llmtrain.data.prepare.vocabulary import DEFAULT_VOCAB_SIZE
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.data.tokens import open_training_data
from llmtrain.distributed.engine import Engine, resolve
from llmtrain.distributed.strategy import Choice, choose_strategy
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.tracking.system import peak_memory_bytes
from llmtrain.training.memory import state_bytes

if TYPE_CHECKING:
    from llmtrain.models.huggingface import HuggingFaceModel

ASSUMED_VOCAB_SIZE = 50_257
MANY_BYTES = 64_000_000
MANY_ROWS = 200_000
"""Rows from here on are not counted: tokenising them takes longer than whoever plans wants to wait."""


# -- the data ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlannedData:
    """What is known of the training data."""

    items_per_epoch: int | None
    tokens_per_item: float
    """On average, padding not counted; the longest possible where it is not known."""
    documents_apart: bool
    """A sequence holds several documents, which do not see each other."""
    vocab_size: int | None = None
    """Of the tokenizer, if it is known."""
    supervised_share: float | None = None
    """Of the tokens of rows."""


def planned_data(config: Config, assumed: list[str]) -> PlannedData:
    """What is known of the data of `config`; what is not is added to `assumed`."""
    data, seq_len = config.data, config.data.seq_len
    if isinstance(data, ChatConfig):
        return _planned_rows(config, data, assumed)
    apart = not isinstance(data, SyntheticConfig) and data.mask_documents
    not_known = PlannedData(items_per_epoch=None, tokens_per_item=seq_len, documents_apart=apart)
    if isinstance(data, TokensConfig):
        missing = [source for source in named_sources(data) if source.is_missing()]
        if missing:
            assumed.append(f"{missing[0]}: no token shards yet, so the number of epochs is not known")
            return not_known
    elif not isinstance(data, SyntheticConfig):
        assumed.append(f"data.name is {data.name}: `train` makes its shards, so the number of epochs is not known yet")
        return not_known
    found = open_training_data(data, seed=config.run.seed)
    return PlannedData(
        items_per_epoch=found.items_per_epoch,
        tokens_per_item=seq_len,
        documents_apart=apart,
        vocab_size=found.facts.vocab_size,
    )


def _planned_rows(config: Config, data: ChatConfig, assumed: list[str]) -> PlannedData:
    apart = data.packing and data.mask_documents
    rows, why_not = _open_rows(config, data)
    if rows is None:
        assumed.append(f"{why_not}, so rows and tokens are not counted: every row as if it had {data.seq_len} tokens")
        return PlannedData(items_per_epoch=None, tokens_per_item=data.seq_len, documents_apart=apart)
    supervised = sum(store.manifest.supervised_tokens for store in rows.stores)
    return PlannedData(
        items_per_epoch=rows.items_per_epoch,
        tokens_per_item=rows.facts.num_tokens / rows.items_per_epoch,
        documents_apart=apart,
        vocab_size=rows.facts.vocab_size,
        supervised_share=supervised / rows.facts.num_tokens,
    )


def _open_rows(config: Config, data: ChatConfig) -> tuple[ChatData | None, str]:
    """The rows, tokenised as `train` would do it, or why they are not counted. Faults of rows are raised."""
    from llmtrain.recipes.rows.chat_data import open_rows
    from llmtrain.recipes.rows.chat_samples import find_parts, tokenizer_folder_of

    listed = [data.train] if isinstance(data.train, str) else data.train
    paths = [source if isinstance(source, str) else source.path for source in listed]
    for path in paths:
        if path.startswith("hf://"):
            return None, f"{path} is a dataset of the Hub"
        if not any(character in path for character in "*?[") and not Path(path).expanduser().exists():
            return None, f"{path} is not here"
    parts = find_parts(data)
    sources = [source for part in parts.training for source in part.sources]
    num_bytes = sum(0 if isinstance(source, RowDataset) else source.size or MANY_BYTES for source in sources)
    num_rows = sum(len(source.dataset) for source in sources if isinstance(source, RowDataset))
    if num_bytes >= MANY_BYTES or num_rows >= MANY_ROWS:
        return None, f"{paths[0]} has very many rows"
    try:
        folder = tokenizer_folder_of(_offline(config))
    except ConfigError:
        return None, "the tokenizer is not on this machine"
    run, trainer, distributed = (
        RunConfig(device="cpu"),
        TrainerConfig(precision="32", compile=False),
        DistributedConfig(),
    )
    engine = Engine(resolve(run, trainer, distributed), distributed=distributed)
    return open_rows(data, tokenizer_folder=folder, seed=config.run.seed, engine=engine).training, ""


def _offline(config: Config) -> Config:
    """The same config, for which no tokenizer is fetched."""
    if not isinstance(config.model, HuggingFaceConfig):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"local_files_only": True})})


# -- the strategy ------------------------------------------------------------------------------------------------------


def strategy_for(config: Config, *, world_size: int, precision: str, memory_bytes: int) -> Choice:
    """What `auto` takes for the model of `config` and processes of `memory_bytes` each. Raises as `planned_model`."""
    unknown = PlannedData(items_per_epoch=None, tokens_per_item=config.data.seq_len, documents_apart=False)
    module = planned_model(config, unknown, precision=precision, assumed=[]).module
    return choice_for(config, module, world_size=world_size, precision=precision, memory_bytes=memory_bytes)


def choice_for(config: Config, module: nn.Module, *, world_size: int, precision: str, memory_bytes: int) -> Choice:
    """The same, of a model that is known."""
    if isinstance(config.model, HuggingFaceConfig) and config.model.quantization != "none" and world_size > 1:
        return Choice("ddp", f"weights in {config.model.quantization} are not cut")
    kept = state_bytes(module, optimizer=config.optimizer, precision=precision)
    return choose_strategy(world_size=world_size, state_bytes=kept, memory_bytes=memory_bytes)


# -- the model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """A model without weights."""

    build: Callable[[], Decoder | HuggingFaceModel]
    """Makes it on the default device."""
    module: Decoder | HuggingFaceModel
    """On the meta device; its parameters can be counted, which those in 4 bits could not."""
    vocab_size: int
    num_blocks: int
    process_bytes: int
    """Resident memory of a process that has imported what it needs, and computed nothing."""


def planned_model(config: Config, data: PlannedData, *, precision: str, assumed: list[str]) -> PlannedModel:
    """The model of `config`. `precision` is the resolved one of the trainer.

    Raises ConfigError if its architecture is not known or cannot be had, a LoRA target matches nothing, or the model is
    made for shorter sequences.
    """
    if isinstance(config.model, HuggingFaceConfig):
        return _planned_huggingface(config.model, seq_len=config.data.seq_len, precision=precision)
    model = config.model
    vocab_size = _vocab_size(config, model, data, assumed)

    def build() -> Decoder:
        decoder = Decoder(model, vocab_size)
        if model.lora is not None:
            from llmtrain.models.lora import add_lora_to_decoder

            add_lora_to_decoder(decoder, model.lora)
        return decoder

    if model.lora is not None:
        import llmtrain.models.lora  # noqa: F401  # what it imports is in the process
    process_bytes = peak_memory_bytes()
    with torch.device("meta"):
        module = build()
    return PlannedModel(
        build=build, module=module, vocab_size=vocab_size, num_blocks=model.num_layers, process_bytes=process_bytes
    )


def _planned_huggingface(model: HuggingFaceConfig, *, seq_len: int, precision: str) -> PlannedModel:
    from llmtrain.models.hub import fetch_config
    from llmtrain.models.huggingface_load import describe
    from llmtrain.models.huggingface_outline import outline_huggingface

    folder = fetch_config(
        model.path,
        revision=model.revision,
        local_files_only=model.local_files_only,
        code=model.trust_remote_code,
    )
    described = describe(model, folder)
    process_bytes = peak_memory_bytes()
    with torch.device("meta"):
        module = outline_huggingface(model, described, precision=precision, quantized=False)
    module.check_length(seq_len, path=model.path)
    return PlannedModel(
        build=lambda: outline_huggingface(model, described, precision=precision),
        module=module,
        vocab_size=module.vocab_size,
        num_blocks=int(described.get_text_config().num_hidden_layers),
        process_bytes=process_bytes,
    )


def _vocab_size(config: Config, model: DecoderConfig, data: PlannedData, assumed: list[str]) -> int:
    if model.vocab_size is not None:
        return model.vocab_size
    if data.vocab_size is not None:
        return data.vocab_size
    if isinstance(config.data, TokensConfig):
        tokenizer = config.prepare.tokenizer if config.prepare else None
    else:
        tokenizer = None if isinstance(config.data, SyntheticConfig | ChatConfig) else config.data.tokenizer
    if tokenizer is not None and tokenizer.kind == "bpe":
        size = tokenizer.vocab_size or DEFAULT_VOCAB_SIZE
        assumed.append(f"a vocabulary of {size:,}: as many as the tokenizer is asked to have")
        return size
    if tokenizer is not None and tokenizer.path is not None and Path(tokenizer.path).expanduser().is_dir():
        return load_tokenizer(Path(tokenizer.path).expanduser()).vocab_size
    assumed.append(
        f"a vocabulary of {ASSUMED_VOCAB_SIZE:,}, since the tokenizer is not here: model.vocab_size=N says it"
    )
    return ASSUMED_VOCAB_SIZE
