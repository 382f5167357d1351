"""The model of a plan, without weights: a decoder from the config, a model of transformers from its config.json.

That file is fetched from the Hub if necessary. A model of the user's own is built by its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.data import SyntheticConfig, TokensConfig
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.own import OwnDataConfig, OwnModelConfig
from llmtrain.config.sections.schema import Config
from llmtrain.data.prepare.vocabulary import DEFAULT_VOCAB_SIZE
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.own_model import OwnModel, build_own_model
from llmtrain.planning.planned_data import PlannedData
from llmtrain.tracking.system import peak_memory_bytes

if TYPE_CHECKING:
    from llmtrain.models.huggingface.model import HuggingFaceModel

ASSUMED_VOCAB_SIZE = 50_257


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """A model on the meta device."""

    trained: Decoder | HuggingFaceModel | OwnModel
    """The model as it is trained. With 4-bit quantization, one element holds two weights."""
    module: Decoder | HuggingFaceModel | OwnModel
    """The same model with one element for each weight, to count its parameters."""
    vocab_size: int
    process_bytes: int
    """Resident memory of a process that has imported everything and computed nothing."""


def planned_model(config: Config, data: PlannedData, *, precision: str, assumed: list[str]) -> PlannedModel:
    """Build the model of `config` without weights. `precision` is the resolved trainer.precision.

    Raises ConfigError if its architecture is unknown or cannot be fetched, if a LoRA target matches nothing, or if the
    model takes only shorter sequences.
    """
    if isinstance(config.model, HuggingFaceConfig):
        return _planned_huggingface(config.model, seq_len=config.data.seq_len, precision=precision, assumed=assumed)
    if isinstance(config.model, OwnModelConfig):
        return _planned_own(config.model, _vocab_size(config, data, assumed))
    model = config.model
    vocab_size = model.vocab_size or _vocab_size(config, data, assumed)
    if model.lora is not None:
        from llmtrain.models.lora import add_lora_to_decoder
    process_bytes = peak_memory_bytes()
    with torch.device("meta"):
        decoder = Decoder(model, vocab_size)
        if model.lora is not None:
            add_lora_to_decoder(decoder, model.lora)
    return PlannedModel(
        trained=decoder,
        module=decoder,
        vocab_size=vocab_size,
        process_bytes=process_bytes,
    )


def _planned_huggingface(model: HuggingFaceConfig, *, seq_len: int, precision: str, assumed: list[str]) -> PlannedModel:
    from llmtrain.models.fetch import fetch_config
    from llmtrain.models.huggingface.load import read_transformers_config
    from llmtrain.models.huggingface.spec import huggingface_spec

    folder = fetch_config(
        model.path,
        revision=model.revision,
        local_files_only=model.local_files_only,
        code=model.trust_remote_code,
    )
    described = read_transformers_config(model, folder)
    process_bytes = peak_memory_bytes()
    with torch.device("meta"):
        module = huggingface_spec(model, described, precision=precision, quantized=False)
        module.check_length(seq_len, path=model.path)
        is_quantized = model.quantization != "none"
        trained = huggingface_spec(model, described, precision=precision) if is_quantized else module
    if model.lora is not None and model.lora.target_modules == "all-linear":
        from llmtrain.models.lora import weights_left_out

        if left_out := weights_left_out(module.network):
            assumed.append(left_out)
    return PlannedModel(
        trained=trained,
        module=module,
        vocab_size=module.vocab_size,
        process_bytes=process_bytes,
    )


def _planned_own(config: OwnModelConfig, vocab_size: int) -> PlannedModel:
    process_bytes = peak_memory_bytes()
    try:
        with torch.device("meta"):
            model = build_own_model(config, vocab_size)
    except ConfigError:  # the class may compute with its weights; any other error is raised again here
        model = build_own_model(config, vocab_size)
    if config.lora is not None:
        from llmtrain.models.lora import add_lora_to_own

        add_lora_to_own(model.network, config.lora)
    return PlannedModel(
        trained=model,
        module=model,
        vocab_size=vocab_size,
        process_bytes=process_bytes,
    )


def _vocab_size(config: Config, data: PlannedData, assumed: list[str]) -> int:
    if data.vocab_size is not None:
        return data.vocab_size
    if isinstance(config.data, TokensConfig):
        tokenizer = config.prepare.tokenizer if config.prepare else None
    else:
        tokenizer = (
            None if isinstance(config.data, SyntheticConfig | ChatConfig | OwnDataConfig) else config.data.tokenizer
        )
    if tokenizer is not None and tokenizer.kind == "bpe":
        size = tokenizer.vocab_size or DEFAULT_VOCAB_SIZE
        assumed.append(f"a vocabulary of {size:,}, the size that is configured for the tokenizer")
        return size
    if tokenizer is not None and tokenizer.path is not None and Path(tokenizer.path).expanduser().is_dir():
        return load_tokenizer(Path(tokenizer.path).expanduser()).vocab_size
    assumed.append(
        f"a vocabulary of {ASSUMED_VOCAB_SIZE:,}, since the tokenizer is not here: if you know it, set model.vocab_size"
    )
    return ASSUMED_VOCAB_SIZE
