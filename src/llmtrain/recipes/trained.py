"""The model that a run trains, behind one face: the decoder that is built here, or one of transformers.

A recipe asks for nothing but this: which module to call, which tensors a checkpoint holds, how its `model/` is written
and read. What differs between the two kinds stands in this file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmtrain.config.errors import ConfigError
from llmtrain.config.huggingface import HuggingFaceConfig
from llmtrain.config.model import DecoderConfig
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import read_state_dict, write_model_folder

if TYPE_CHECKING:
    from llmtrain.models.huggingface import HuggingFaceModel


@dataclass(frozen=True)
class Trained:
    """A model, and what the store of checkpoints must know of it."""

    module: Decoder | HuggingFaceModel
    described: Mapping[str, Any]
    """What must not change while a run goes on."""
    tensors: Callable[[], Mapping[str, Tensor]]
    """Those of a checkpoint, by name: the live ones, not copies."""
    write: Callable[[Path, Mapping[str, Tensor]], None]
    """Write a checkpoint's `model/` from (copies of) them."""
    read: Callable[[Path], None]
    """Take them over from such a folder."""


def build_decoder(
    config: DecoderConfig, *, needed_vocab: int, tokenizer_folder: Path | None, eos_id: int | None
) -> Trained:
    """A decoder with random weights. Raises ConfigError if its vocabulary is smaller than the tokenizer's."""
    if config.vocab_size is not None and config.vocab_size < needed_vocab:
        raise ConfigError(
            f"model.vocab_size is {config.vocab_size}, but the tokenizer has {needed_vocab} tokens: remove the key, or "
            f"make it {needed_vocab} or more"
        )
    vocab_size = config.vocab_size or needed_vocab
    decoder = Decoder(config, vocab_size)

    def write(folder: Path, weights: Mapping[str, Tensor]) -> None:
        write_model_folder(
            folder,
            config=config,
            vocab_size=vocab_size,
            state_dict=weights,
            tokenizer_folder=tokenizer_folder,
            eos_id=eos_id,
        )

    return Trained(
        module=decoder,
        described={**config.model_dump(mode="json"), "vocab_size": vocab_size},
        tensors=decoder.state_dict,
        write=write,
        read=lambda folder: _load(decoder, read_state_dict(folder, config)),
    )


def build_huggingface(
    config: HuggingFaceConfig,
    model_folder: Path,
    *,
    needed_vocab: int,
    seq_len: int,
    tokenizer_folder: Path,
    chat_template: str | None,
    seed: int,
    precision: str,
) -> Trained:
    """The model in `model_folder`, whole or with adapters. `chat_template` goes along with its tokenizer.

    Raises ConfigError if the model cannot be had, or the vocabulary or the length of the rows does not fit.
    """
    from llmtrain.models.huggingface_folder import (
        checkpoint_tensors,
        read_huggingface_folder,
        write_huggingface_folder,
    )
    from llmtrain.models.huggingface_load import build_huggingface as build

    model = build(config, model_folder, seed=seed, precision=precision)
    if model.vocab_size < needed_vocab:
        raise ConfigError(
            f"the tokenizer in {tokenizer_folder} has {needed_vocab} tokens, but the model in {config.path} knows "
            f"{model.vocab_size}: name the model's own tokenizer"
        )

    if model.max_seq_len is not None and seq_len > model.max_seq_len:
        raise ConfigError(
            f"data.seq_len is {seq_len}, but the model in {config.path} is made for {model.max_seq_len} tokens: lower "
            "the first"
        )

    def write(folder: Path, weights: Mapping[str, Tensor]) -> None:
        write_huggingface_folder(folder, model=model, state_dict=weights, tokenizer_folder=tokenizer_folder)
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")

    tuning = config.model_dump(mode="json", include={"name", "path", "revision", "init", "lora", "quantization"})
    return Trained(
        module=model,
        described={**tuning, "vocab_size": model.vocab_size},
        tensors=lambda: checkpoint_tensors(model),
        write=write,
        read=lambda folder: read_huggingface_folder(folder, model),
    )


def _load(decoder: Decoder, weights: Mapping[str, Tensor]) -> None:
    decoder.load_state_dict(dict(weights))
