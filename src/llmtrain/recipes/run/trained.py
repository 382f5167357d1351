"""The model that a run trains, behind one face: the decoder that is built here, or one of transformers.

A recipe asks for nothing but this: which module to call, which tensors a checkpoint holds, how its `model/` is written
and read. What differs between the two kinds stands in this file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from llmtrain.config.errors import ConfigError
from llmtrain.config.huggingface import HuggingFaceConfig
from llmtrain.config.lora import LoraConfig
from llmtrain.config.model import DecoderConfig
from llmtrain.config.schema import Config
from llmtrain.distributed.sharding import take_part, without_values
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import (
    read_model_config,
    read_state_dict,
    unit_of,
    write_description,
    write_model_folder,
    write_weights,
)
from llmtrain.training.checkpoint import SplitModel
from llmtrain.training.runs import find_model, model_to_begin_from

if TYPE_CHECKING:
    from llmtrain.models.huggingface import HuggingFaceModel


ADAPTER_FOLDER = "adapter"


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
    start: Callable[[], None]
    """Give the module the values that it begins with, once its parameters are cut. Nothing to do where they are not."""
    split: SplitModel | None = None
    """How several ranks write `model/` together; None: one of them writes it alone."""


FREE_TO_CHANGE = frozenset(
    f"model.{key}"
    for key in (
        "init_from",
        "lora",
        "dropout",
        "attention.dropout",
        "ffn.dropout",
        "init_std",
        "residual_scaled_init",
    )
)
"""Keys of a decoder that may differ from those of the model that it begins from."""


def with_model_found(config: Config) -> Config:
    """`config`, in whose model a folder stands where a run was named, and the architecture that is found there.

    Raises ConfigError as `architecture_of` does.
    """
    root = Path(config.output.root_dir)
    if isinstance(config.model, HuggingFaceConfig):
        path = model_to_begin_from(config.model.path, root)
        if path == config.model.path:
            return config
        return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
    return config.model_copy(update={"model": architecture_of(config.model, root=root)})


def architecture_of(config: DecoderConfig, *, root: Path) -> DecoderConfig:
    """`config` itself, or with init_from the architecture that is found there, with the folder's path in it.

    Raises ConfigError if there is no such model, or a key that was given contradicts it.
    """
    if config.init_from is None:
        return config
    folder = find_model(config.init_from, root)
    found, vocab_size = read_model_config(folder)
    values = found.model_dump(mode="json") | {"vocab_size": vocab_size, "preset": None}
    given = config.model_dump(mode="json", exclude_unset=True) | {"preset": None}  # its keys are given by now
    if wrong := _lay_over(values, given):
        raise ConfigError(
            f"model.init_from: the model in {folder} is another one ({'; '.join(wrong)}): leave these keys out"
        )
    return DecoderConfig.model_validate(values | {"init_from": str(folder)})


def _lay_over(values: dict[str, Any], given: Mapping[str, Any], prefix: str = "model.") -> list[str]:
    """Put what is given and free to change over `values`; returns what else is given and differs."""
    wrong = []
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(values[key], dict):
            wrong += _lay_over(values[key], value, f"{prefix}{key}.")
        elif f"{prefix}{key}" in FREE_TO_CHANGE:
            values[key] = value
        elif values[key] != value:
            wrong.append(f"{prefix}{key} is {values[key]} there and {value} here")
    return wrong


def build_decoder(
    config: DecoderConfig,
    *,
    needed_vocab: int,
    tokenizer_folder: Path | None,
    eos_id: int | None,
    chat_template: str | None = None,
    cut: bool = False,
) -> Trained:
    """A decoder with random weights, or with those in `init_from`, whole or with adapters. `chat_template` goes along.

    `cut`: its parameters are going to be cut over the ranks. Until then they are on the meta device, so that none of
    them is whole on a rank; they get their values, the same as without, from `read` or `start`.

    Raises ConfigError if its vocabulary is smaller than the tokenizer's, or the weights do not fit.
    """
    if config.vocab_size is not None and config.vocab_size < needed_vocab:
        own = f"remove the key, or make it {needed_vocab} or more"
        raise ConfigError(
            f"model.vocab_size is {config.vocab_size}, but the tokenizer has {needed_vocab} tokens: "
            + (own if config.init_from is None else "name the tokenizer that the model in model.init_from has")
        )
    vocab_size = config.vocab_size or needed_vocab
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size)

    def start() -> None:
        if config.init_from is None:
            decoder.reset_parameters()
        else:
            _load(decoder, read_state_dict(Path(config.init_from), config, vocab_size=vocab_size))

    is_empty = cut and not (config.lora and config.lora.begins_with_base)
    if not is_empty:
        decoder.to_empty(device="cpu")
        start()

    trained_config = config.model_copy(update={"init_from": None, "lora": None})
    described: dict[str, Any] = {
        "config": trained_config,
        "vocab_size": vocab_size,
        "tokenizer_folder": tokenizer_folder,
        "eos_id": eos_id,
    }

    def write(folder: Path, weights: Mapping[str, Tensor]) -> None:
        write_model_folder(folder, state_dict=weights, **described)
        _write_template(folder, chat_template)

    def write_rest(folder: Path, dtype: torch.dtype) -> None:
        write_description(folder, dtype=dtype, **described)
        _write_template(folder, chat_template)

    def write_some(file: Path, weights: Mapping[str, Tensor]) -> None:
        write_weights(file, config=trained_config, state_dict=weights)

    whole = Trained(
        module=decoder,
        described={**config.model_dump(mode="json"), "vocab_size": vocab_size},
        tensors=decoder.state_dict,
        write=write,
        read=lambda folder: _load(decoder, read_state_dict(folder, config)),
        start=start if is_empty else _has_begun,
        split=SplitModel(unit_of, write_some, write_rest),
    )
    return whole if config.lora is None else _with_adapters(whole, decoder, config.lora, cut=cut)


def _with_adapters(whole: Trained, decoder: Decoder, lora: LoraConfig, *, cut: bool) -> Trained:
    """`whole`, of which only adapters are trained. They lie in a checkpoint's `model/adapter` as peft writes them; in
    `model/` itself they are merged in, so that all who read models need not know of them.

    Where parameters are cut, the frozen ones are gathered along with the adapters, by the rank that merges them.
    """
    from llmtrain.models.lora import (
        add_lora_to_decoder,
        merged_state_dict,
        read_adapter,
        trainable_state_dict,
        write_adapter,
    )

    add_lora_to_decoder(decoder, lora)
    model = without_values(decoder) if cut else decoder
    trainable = trainable_state_dict(model).keys()

    def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        write_adapter(folder / ADAPTER_FOLDER, model, {name: tensors[name] for name in trainable})
        whole.write(folder, merged_state_dict(model, tensors))

    def read(folder: Path) -> None:
        whole.start()
        read_adapter(folder / ADAPTER_FOLDER, decoder)

    return replace(
        whole,
        tensors=decoder.state_dict if cut else lambda: trainable_state_dict(decoder),
        write=write,
        read=read,
        split=None,
    )


@torch.no_grad()
def _load(decoder: Decoder, weights: Mapping[str, Tensor]) -> None:
    for name, tensor in decoder.state_dict().items():
        if ".lora_" not in name:
            take_part(tensor, weights[name.replace(".base_layer.", ".")])


def _has_begun() -> None:
    """Of a module that has its values."""


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
    device: torch.device,
    cut: bool = False,
) -> Trained:
    """The model in `model_folder`, whole or with adapters. `chat_template` goes along with its tokenizer.

    `cut`: its parameters are going to be cut over the ranks. Until then they are on the meta device where the files
    hold each as it is, so that none of them is whole on a rank; they get their values from `read` or `start`.

    Raises ConfigError if the model cannot be had, or the vocabulary or the length of the rows does not fit.
    """
    from llmtrain.models.huggingface_folder import (
        checkpoint_tensors,
        read_huggingface_folder,
        write_huggingface_folder,
    )
    from llmtrain.models.huggingface_load import build_huggingface as build
    from llmtrain.models.huggingface_parts import read_in_parts

    model = build(config, model_folder, seed=seed, precision=precision, device=device, empty=cut)
    if model.vocab_size < needed_vocab:
        raise ConfigError(
            f"the tokenizer in {tokenizer_folder} has {needed_vocab} tokens, but the model in {config.path} knows "
            f"{model.vocab_size}: name the model's own tokenizer"
        )
    model.check_length(seq_len, path=config.path)

    shape = cast("HuggingFaceModel", without_values(model)) if cut else model  # what the thread that saves may touch

    def write(folder: Path, weights: Mapping[str, Tensor]) -> None:
        write_huggingface_folder(folder, model=shape, state_dict=weights, tokenizer_folder=tokenizer_folder)
        _write_template(folder, chat_template)

    def start() -> None:
        read_in_parts(model_folder, model.network)

    is_empty = any(parameter.is_meta for parameter in model.parameters())

    def read(folder: Path) -> None:
        if is_empty and config.lora is not None:
            start()
        read_huggingface_folder(folder, model)

    tuning = config.model_dump(mode="json", include={"name", "path", "revision", "init", "lora", "quantization"})
    return Trained(
        module=model,
        described={**tuning, "vocab_size": model.vocab_size},
        tensors=lambda: checkpoint_tensors(model),
        write=write,
        read=read,
        start=start if is_empty else _has_begun,
    )


def _write_template(folder: Path, chat_template: str | None) -> None:
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
