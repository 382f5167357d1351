"""The model that a run trains, behind one interface: our decoder, one of transformers, or one of the user's own.

All of it is trained, or adapters. The rest of training asks for nothing but this: which module to call, which tensors a
checkpoint holds, how its `model/` is written and read. What differs between the kinds stands in this file alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.model import DecoderConfig
from llmtrain.config.sections.own import OwnModelConfig
from llmtrain.distributed.sharding import take_part, without_values
from llmtrain.errors import ConfigError
from llmtrain.models.companions import (
    CHAT_TEMPLATE,
    NAMED_TEMPLATES,
    copy_companions,
    end_tokens,
    set_end_tokens,
)
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import read_state_dict, unit_of, write_description, write_model_folder, write_weights
from llmtrain.models.own_model import OwnModel, build_own_model, load_own_weights, write_own_folder
from llmtrain.screen import counted
from llmtrain.training.checkpoint import SplitModel
from llmtrain.training.optimizers import narrow_weights

if TYPE_CHECKING:
    from llmtrain.models.huggingface.model import HuggingFaceModel

ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens that a model is trained on, and what is saved with it so that others can use them."""

    size: int
    tokenizer_folder: Path | None
    eos_id: int | None = None
    chat_template: str | None = None
    """Saved in place of the tokenizer's own, with all that have a name; None: these go along as they are."""

    def write_template(self, folder: Path) -> None:
        """Write the chat template into a model folder, if it is not the tokenizer's own."""
        if self.chat_template is not None:
            (folder / CHAT_TEMPLATE).write_text(self.chat_template, encoding="utf-8")
            shutil.rmtree(folder / NAMED_TEMPLATES, ignore_errors=True)


class Trained(Protocol):
    """A model, and how checkpoints store it."""

    @property
    def module(self) -> Decoder | HuggingFaceModel | OwnModel:
        """The module to call."""

    @property
    def described(self) -> Mapping[str, Any]:
        """Description of what must not change while a run goes on."""

    @property
    def split(self) -> SplitModel | None:
        """Assignment of weights to the ranks that write `model/` together; None if one rank writes it alone."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Return a checkpoint's tensors by name: the live ones, not copies."""

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint's `model/` from (copies of) them. Called in the thread that saves."""

    def read(self, folder: Path) -> None:
        """Load them from such a folder."""

    def initialize(self) -> None:
        """Give the module its first values, once its parameters are sharded; does nothing where it has them."""


# -- our decoder -------------------------------------------------------------------------------------------------------


def train_decoder(config: DecoderConfig, vocabulary: Vocabulary, *, sharded: bool = False) -> Trained:
    """Build a decoder with random weights, or with those in `init_from`; all of it is trained, or adapters.

    `sharded`: the ranks are going to share its parameters. Until then these are on the meta device, so that no rank
    holds all of them; they get their values, the same as without, from `read` or `initialize`.

    Raises ConfigError if its vocabulary is smaller than the tokenizer's, or the weights do not fit.
    """
    if config.vocab_size is not None and config.vocab_size < vocabulary.size:
        own = f"remove the key, or make it {vocabulary.size} or more"
        raise ConfigError(
            f"model.vocab_size is {config.vocab_size}, but the tokenizer has {counted(vocabulary.size, 'token')}: "
            + (own if config.init_from is None else "name the tokenizer that the model in model.init_from has")
        )
    with torch.device("meta"):
        decoder = Decoder(config, config.vocab_size or vocabulary.size)
    is_empty = sharded and not (config.lora and config.lora.begins_with_base)
    full = TrainedDecoder(decoder, config, vocabulary, is_empty=is_empty)
    if not is_empty:
        decoder.to_empty(device="cpu")
        full.load_initial()
    if config.lora is None:
        return full
    from llmtrain.models.lora import add_lora_to_decoder

    add_lora_to_decoder(decoder, config.lora)
    return TrainedAdapters(full, decoder, sharded=sharded)


class TrainedDecoder:
    """A decoder whose parameters are all trained."""

    def __init__(self, decoder: Decoder, config: DecoderConfig, vocabulary: Vocabulary, *, is_empty: bool) -> None:
        self.module = decoder
        self.config = config
        self.described = {**config.model_dump(mode="json"), "vocab_size": decoder.vocab_size}
        self._vocabulary = vocabulary
        self._is_empty = is_empty
        self._saved_config = config.model_copy(update={"init_from": None, "lora": None})
        self._description: dict[str, Any] = {
            "config": self._saved_config,
            "vocab_size": decoder.vocab_size,
            "tokenizer_folder": vocabulary.tokenizer_folder,
            "eos_id": vocabulary.eos_id,
        }

    @property
    def split(self) -> SplitModel:
        # Made when it is asked for: kept here, its bound methods would keep the model from being freed with the run.
        return SplitModel(unit_of, self._write_weights, self._write_rest)

    def tensors(self) -> Mapping[str, Tensor]:
        return self.module.state_dict()

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        write_model_folder(folder, state_dict=tensors, **self._description)
        self._write_companions(folder)

    def read(self, folder: Path) -> None:
        self._load(read_state_dict(folder, self.config))

    def initialize(self) -> None:
        if self._is_empty:
            self.load_initial()

    def load_initial(self) -> None:
        """Give the parameters the values of `init_from`, or random ones."""
        if self.config.init_from is None:
            self.module.reset_parameters()
        else:
            vocab_size = self.module.vocab_size
            self._load(read_state_dict(Path(self.config.init_from), self.config, vocab_size=vocab_size))

    @torch.no_grad()
    def _load(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in self.module.state_dict().items():
            if ".lora_" not in name:
                take_part(tensor, weights[name.replace(".base_layer.", ".")])

    def _write_weights(self, file: Path, weights: Mapping[str, Tensor]) -> None:
        write_weights(file, config=self._saved_config, state_dict=weights)

    def _write_rest(self, folder: Path, dtype: torch.dtype) -> None:
        write_description(folder, dtype=dtype, **self._description)
        self._write_companions(folder)

    def _write_companions(self, folder: Path) -> None:
        self._vocabulary.write_template(folder)
        if self.config.init_from is not None:
            own = set(end_tokens(folder))
            copy_companions(Path(self.config.init_from), folder)
            set_end_tokens(folder, own | set(end_tokens(folder)))


class TrainedAdapters:
    """A decoder, or a model of the user's own, of which only adapters are trained.

    They lie in a checkpoint's `model/adapter` as peft writes them. In `model/` itself they are merged into the weights,
    so that what reads models need not know of them. Where parameters are sharded, the frozen ones are gathered along
    with the adapters, by the rank that merges them.
    """

    def __init__(self, full: TrainedDecoder | TrainedOwn, network: nn.Module, *, sharded: bool) -> None:
        """Set the model, and the part of its module that has adapters and the names of its saved tensors."""
        from llmtrain.models.lora import trainable_state_dict

        self.module = full.module
        self._network = network
        self.described = full.described
        self.split: SplitModel | None = None
        self._full = full
        self._sharded = sharded
        self._shape = without_values(network) if sharded else network  # what the thread that saves may touch
        self._trainable = trainable_state_dict(self._shape).keys()

    def tensors(self) -> Mapping[str, Tensor]:
        from llmtrain.models.lora import trainable_state_dict

        return self._network.state_dict() if self._sharded else trainable_state_dict(self._network)

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        from llmtrain.models.lora import merged_state_dict, write_adapter

        write_adapter(folder / ADAPTER_FOLDER, self._shape, {name: tensors[name] for name in self._trainable})
        self._full.write(folder, merged_state_dict(self._shape, tensors))

    def read(self, folder: Path) -> None:
        from llmtrain.models.lora import read_adapter

        self._full.initialize()
        read_adapter(folder / ADAPTER_FOLDER, self._network)

    def initialize(self) -> None:
        self._full.initialize()


# -- models of transformers --------------------------------------------------------------------------------------------


def train_huggingface(
    config: HuggingFaceConfig,
    model_folder: Path,
    vocabulary: Vocabulary,
    *,
    seq_len: int,
    seed: int,
    precision: str,
    device: torch.device,
    sharded: bool = False,
) -> Trained:
    """Build the model in `model_folder`; all of it is trained, or adapters.

    `sharded`: the ranks are going to share its parameters. Until then these are on the meta device where the files hold
    each as it is, so that no rank holds all of them; they get their values from `read` or `initialize`.

    Raises ConfigError if the model cannot be had, or the vocabulary or the length of the rows does not fit.
    """
    from llmtrain.models.huggingface.load import build_huggingface

    empty = sharded and not config.resize_embeddings
    model = build_huggingface(config, model_folder, seed=seed, precision=precision, device=device, empty=empty)
    if model.vocab_size < vocabulary.size:
        if not config.resize_embeddings:
            raise _tokens_without_rows(config, vocabulary, known=model.vocab_size)
        torch.manual_seed(seed)
        model.network.resize_token_embeddings(vocabulary.size)
    model.check_length(seq_len, path=config.path)
    return TrainedHuggingFace(model, config, model_folder, vocabulary, sharded=sharded)


def _tokens_without_rows(config: HuggingFaceConfig, vocabulary: Vocabulary, *, known: int) -> ConfigError:
    from llmtrain.data.tokenizers import load_tokenizer

    assert vocabulary.tokenizer_folder is not None
    names = load_tokenizer(vocabulary.tokenizer_folder).tokens_from(known)
    advice = "set model.resize_embeddings=true, which adds rows for them"
    if config.lora is not None:
        advice = (
            "an adapter holds no such rows, so add them to the base first (transformers: "
            f"model.resize_token_embeddings({vocabulary.size}), then save_pretrained)"
        )
    return ConfigError(
        f"the tokenizer in {vocabulary.tokenizer_folder} has tokens for which the embedding of {config.path}, of "
        f"{counted(known, 'row')}, has none: {names}. If they are wanted, "
        f"{advice}; else name a tokenizer without them in model.tokenizer"
    )


class TrainedHuggingFace:
    """A model of transformers of which all is trained, or adapters of peft."""

    split: SplitModel | None = None

    def __init__(
        self,
        model: HuggingFaceModel,
        config: HuggingFaceConfig,
        model_folder: Path,
        vocabulary: Vocabulary,
        *,
        sharded: bool,
    ) -> None:
        tuning = config.model_dump(mode="json", include={"name", "path", "revision", "init", "lora", "quantization"})
        self.module = model
        self.described = {**tuning, "vocab_size": model.vocab_size}
        self._model_folder = model_folder
        self._vocabulary = vocabulary
        self._shape = cast("HuggingFaceModel", without_values(model)) if sharded else model  # for the thread that saves
        self._is_empty = any(parameter.is_meta for parameter in model.parameters())
        self._has_adapters = config.lora is not None

    def narrow(self) -> dict[Tensor, Tensor]:
        """Round the weights to bfloat16, and return their float32 masters. Files are still written in float32."""
        self._shape = cast("HuggingFaceModel", without_values(self.module))
        return narrow_weights(self.module, keep=self.module.keep_in_float32)

    def tensors(self) -> Mapping[str, Tensor]:
        from llmtrain.models.huggingface.folder import checkpoint_tensors

        return checkpoint_tensors(self.module)

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        from llmtrain.models.huggingface.folder import write_huggingface_folder

        assert self._vocabulary.tokenizer_folder is not None
        write_huggingface_folder(
            folder,
            model=self._shape,
            state_dict=tensors,
            tokenizer_folder=self._vocabulary.tokenizer_folder,
            base=self._model_folder,
        )
        self._vocabulary.write_template(folder)

    def read(self, folder: Path) -> None:
        from llmtrain.models.huggingface.folder import read_huggingface_folder

        if self._has_adapters:
            self.initialize()
        read_huggingface_folder(folder, self.module)

    def initialize(self) -> None:
        from llmtrain.models.huggingface.parts import read_in_parts

        if self._is_empty:
            read_in_parts(self._model_folder, self.module.network)


# -- models of the user's own ------------------------------------------------------------------------------------------


def train_own(config: OwnModelConfig, vocabulary: Vocabulary, *, seq_len: int, sharded: bool = False) -> Trained:
    """Make a model of the user's own, with the weights in `init_from` or those that its class draws.

    All of it is trained, or adapters. Raises ConfigError if it cannot be made, or takes only shorter sequences.
    """
    model = build_own_model(config, vocabulary.size)
    if model.max_seq_len is not None and seq_len > model.max_seq_len:
        raise ConfigError(
            f"data.seq_len is {seq_len}, but max_seq_len of {config.name} is {model.max_seq_len}: lower the first or "
            "raise the second"
        )
    if config.init_from is not None:
        load_own_weights(Path(config.init_from), model)
    full = TrainedOwn(model, vocabulary)
    if config.lora is None:
        return full
    from llmtrain.models.lora import add_lora_to_own

    add_lora_to_own(model.network, config.lora)
    return TrainedAdapters(full, model.network, sharded=sharded)


class TrainedOwn:
    """A model of the user's own."""

    split: SplitModel | None = None

    def __init__(self, model: OwnModel, vocabulary: Vocabulary) -> None:
        self.module = model
        self.described = {**model.config.model_dump(mode="json"), "vocab_size": model.vocab_size}
        self._vocabulary = vocabulary

    def tensors(self) -> Mapping[str, Tensor]:
        return self.module.saved_tensors()

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        write_own_folder(
            folder, model=self.module, state_dict=tensors, tokenizer_folder=self._vocabulary.tokenizer_folder
        )
        self._vocabulary.write_template(folder)

    def read(self, folder: Path) -> None:
        load_own_weights(folder, self.module)

    def initialize(self) -> None:
        """Do nothing: the module has its weights."""
