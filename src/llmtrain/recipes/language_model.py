"""A model that is ready to write: a decoder on its device, and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from pydantic import ValidationError

from llmtrain.config.errors import ConfigError
from llmtrain.config.running import RunConfig
from llmtrain.config.training import DistributedConfig, TrainerConfig
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer
from llmtrain.distributed.engine import Engine, resolve
from llmtrain.evaluation.sampling import Sampling
from llmtrain.evaluation.text import Completion, OnText, complete
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import read_model_folder
from llmtrain.training.runs import find_model

DEFAULT_SEED = 1337


class Settings(TypedDict, total=False):
    """How text is written; `LanguageModel.generate` says what each means, and has the defaults."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int
    stop: Sequence[str]
    stop_tokens: Sequence[str | int]
    heal: bool
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A decoder that is ready to write, and its tokenizer."""

    model: Decoder
    """In evaluation mode, on its device."""
    tokenizer: Tokenizer | None
    """None where there is none: `model` then takes and gives token ids, and there is no text."""
    folder: Path

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = DEFAULT_SEED,
        stop: Sequence[str] = (),
        stop_tokens: Sequence[str | int] = (),
        heal: bool = True,
        batch_size: int = 16,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """A completion of each prompt, in their order; the same whatever other prompts stand beside it.

        Args:
            temperature: 0 takes the likeliest token each time.
            stop: texts before which a completion ends.
            stop_tokens: tokens at which it ends besides the end token: names, texts or ids.
            heal: choose the prompt's last token anew, among those that begin with its text.
            batch_size: prompts that are computed at a time.
            on_text: told of each new piece of text, with the number of its prompt.

        Raises:
            ConfigError: no tokenizer, a prompt longer than the context, or a setting out of its range.
        """
        if self.tokenizer is None:
            raise ConfigError(f"{self.folder} has no tokenizer.json, so it cannot be given text")
        return complete(
            self.model,
            self.tokenizer,
            [prompts] if isinstance(prompts, str) else prompts,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(
                temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
            ),
            stop=stop,
            stop_ids={self.tokenizer.eos_id, *(_token_id(self.tokenizer, token) for token in stop_tokens)},
            heal=heal,
            batch_size=batch_size,
            on_text=on_text,
        )


def open_model(ref: str, *, root_dir: str = "runs", device: str = "auto") -> LanguageModel:
    """The model that `ref` names: a run (`latest` is the newest), a checkpoint or a model folder.

    Raises ConfigError if there is none.
    """
    folder = find_model(ref, Path(root_dir))
    decoder, _ = read_model_folder(folder)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    return LanguageModel(model=decoder.to(device_named(device)).eval(), tokenizer=tokenizer, folder=folder)


def device_named(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps. Raises ConfigError for what this machine has not, or what is no device."""
    try:
        run = RunConfig(device=name)
    except ValidationError:
        raise ConfigError(f"{name!r} is no device; it should be auto, cpu, cuda, cuda:N or mps") from None
    trainer, distributed = TrainerConfig(precision="32", compile=False), DistributedConfig()
    device: torch.device = Engine(resolve(run, trainer, distributed), distributed=distributed).device
    return device


def _token_id(tokenizer: Tokenizer, token: str | int) -> int:
    """By its id, by its name in the vocabulary (`<|im_end|>`), or by the text that it alone stands for."""
    if isinstance(token, int):
        if 0 <= token < tokenizer.vocab_size:
            return token
        raise ConfigError(f"stop token {token} is not in the vocabulary of {tokenizer.vocab_size} tokens")
    named = tokenizer.token_id(token)
    ids = tokenizer.encode(token) if named is None else [named]
    if len(ids) != 1:
        raise ConfigError(f"{token!r} is no token of this model, so it cannot be a stop token; make it a stop text")
    return ids[0]
