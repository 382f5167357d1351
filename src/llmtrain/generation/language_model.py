"""A loaded model of any kind with its tokenizer: the one interface of `generate`, `eval` and the Python API.

A prompt is a text to complete, or a user's turn, which is rendered by the chat template. `open_model` finds and loads
models.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

import torch

from llmtrain.data.chat.encoding import ChatEncoder
from llmtrain.data.chat.shapes import Message
from llmtrain.data.files.row_faults import RowError
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.errors import ConfigError
from llmtrain.generation.completion import Completion, OnText, TokenizedPrompt, complete
from llmtrain.generation.precision import computing_in, named_precision
from llmtrain.generation.sampling import Decoding, Sampling
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.screen import counted

if TYPE_CHECKING:
    from llmtrain.models.huggingface.model import HuggingFaceModel
    from llmtrain.models.own_model import OwnModel

log = logging.getLogger("llmtrain.generate")

AnyModel: TypeAlias = "Decoder | HuggingFaceModel | OwnModel"
DEFAULT_SEED = 1337


class Settings(TypedDict, total=False):
    """Settings of generation. DEFAULTS has the values of those that are not given."""

    max_new_tokens: int
    temperature: float
    """0: always the likeliest token."""
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int
    stop: Sequence[str]
    """Texts before which a completion ends."""
    stop_tokens: Sequence[str | int]
    """Tokens besides the end token at which a completion ends: names, texts or ids."""
    heal: bool
    """Let the model replace the prompt's last token by one that begins with its text. It does not apply to turns."""
    chat: bool | None
    """True if a prompt is a user's turn, to be rendered by the chat template; None: the model's `chats`."""
    batch_size: int
    """Number of prompts that are computed at a time."""


DEFAULTS: Settings = {
    "max_new_tokens": 128,
    "temperature": 0.8,
    "top_k": None,
    "top_p": None,
    "repetition_penalty": 1.0,
    "seed": DEFAULT_SEED,
    "stop": (),
    "stop_tokens": (),
    "heal": True,
    "chat": None,
    "batch_size": 16,
}


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A loaded model and its tokenizer."""

    model: AnyModel
    """Model in evaluation mode, on its device."""
    tokenizer: Tokenizer | None
    """None if the folder has none: then `model` takes and returns token ids, and there is no text."""
    encoder: ChatEncoder | None
    """Tokenizes prompts as the training did, for a model that was tuned on rows or is not one of our decoders: with a
    BOS token, and control tokens for their texts. None: `tokenizer` tokenizes prompts as plain text."""
    eos_ids: frozenset[int]
    """Tokens that end a text."""
    folder: Path
    chats: bool = False
    """True if a prompt is a user's turn unless `Settings.chat` says otherwise."""
    autocast: torch.dtype | None = None
    """Dtype of the products of texts and evaluations, on a GPU; None: that of the weights."""

    def computing(self) -> AbstractContextManager[None]:
        """Compute in the model's precision within the block, which all forward passes of a text or evaluation share."""
        return computing_in(self.autocast, self.model.device)

    @property
    def precision(self) -> str:
        """Precision of `computing`, in words."""
        return named_precision(self.model, self.autocast, self.model.device)

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[Message]],
        *,
        on_text: OnText | None = None,
        **settings: Unpack[Settings],
    ) -> list[Completion]:
        """Return a completion of each prompt, in their order. A completion does not depend on the other prompts.

        Args:
            prompts: texts, or conversations whose next turn is generated.
            on_text: called with the number of a prompt and each new piece of its completion.
            settings: see `Settings`.

        Raises:
            ConfigError: no tokenizer or template, a prompt longer than the context, or a setting out of its range.
        """
        if unknown := sorted(settings.keys() - DEFAULTS.keys()):
            raise TypeError(f"generate has no setting {unknown[0]!r}: it has {', '.join(DEFAULTS)}")
        given: Settings = {**DEFAULTS, **settings}
        chat = given["chat"]
        if self.tokenizer is None:
            raise ConfigError(f"{self.folder} has no tokenizer.json, so it cannot be given text")
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) for prompt in listed]
        in_turns = self.chats if chat is None else chat
        if listed != texts and not in_turns:
            raise ConfigError(
                f"a prompt is a conversation, but {self.folder} only completes texts: give the prompt as one text, or "
                "request chat"
            )
        if in_turns and chat is None and listed:
            log.info("prompts are rendered by the model's chat template; --no-chat gives them as they are")
        rendered = [self.render(_turns(prompt)) for prompt in listed] if in_turns else texts
        ids = [self.prompt_ids(text, is_complete=in_turns) for text in rendered]
        tokenizer = self.tokenizer
        with self.computing():
            completions = complete(
                self.model,
                tokenizer,
                [TokenizedPrompt(text, tokens) for text, tokens in zip(texts, ids, strict=True)],
                _decoding(given),
                stop=given["stop"],
                stop_ids={
                    *self.stop_ids(chat=in_turns),
                    *(_token_id(tokenizer, token) for token in given["stop_tokens"]),
                },
                heal=given["heal"] and not in_turns,
                on_text=on_text,
            )
        if not in_turns:
            return completions
        return [replace(done, rendered=text) for done, text in zip(completions, rendered, strict=True)]

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """Return the messages as the prompt for the next turn.

        Raises ConfigError if there is no template, or if it rejects the messages.
        """
        if self.encoder is None:
            raise ConfigError(f"{self.folder} has no chat template: give its prompts as they are (--no-chat)")
        try:
            return self.encoder.template.render_prompt(messages, tools)
        except RowError as error:
            raise ConfigError(str(error)) from error

    def prompt_ids(self, text: str, *, is_complete: bool) -> list[int]:
        """Return the tokens of a prompt; of one without tokens, the end token, after which a document begins.

        `is_complete`: the text comes from `render`, so no BOS token is added. Raises ConfigError if the text is no
        valid Unicode, or has tokens that the model does not have.
        """
        assert self.tokenizer is not None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"the prompt {text[:60]!r} is not valid Unicode: character {error.start + 1} is half of a surrogate "
                "pair, or a byte that is not UTF-8"
            ) from None
        if self.encoder is None:
            ids = self.tokenizer.encode(text)
        else:
            ids = self.encoder.encode_prompt(text, is_complete=is_complete)
        self.check_vocab_size(max(ids, default=0) + 1, of="the prompt")
        return ids or [self.tokenizer.eos_id]

    def check_vocab_size(self, vocab_size: int, *, of: str) -> None:
        """Raise ConfigError if the embedding has fewer than `vocab_size` rows. `of` says whose vocabulary that is."""
        rows = self.model.vocab_size
        if vocab_size > rows and self.tokenizer is not None:
            raise ConfigError(
                f"{of} has tokens for which the embedding in {self.folder}, of {counted(rows, 'row')}, has none: "
                f"{self.tokenizer.tokens_from(rows)}. Use a tokenizer without them, or train the model with "
                "model.resize_embeddings=true"
            )

    def stop_ids(self, *, chat: bool) -> frozenset[int]:
        """Return the tokens that end a text, or, with `chat`, a turn."""
        end_of_turn = self.encoder.template.end_of_turn if chat and self.encoder is not None else ""
        found = self.tokenizer.token_id(end_of_turn) if self.tokenizer is not None and end_of_turn else None
        return self.eos_ids if found is None else self.eos_ids | {found}


def _decoding(given: Settings) -> Decoding:
    return Decoding(
        max_new_tokens=given["max_new_tokens"],
        sampling=Sampling(
            temperature=given["temperature"],
            top_k=given["top_k"],
            top_p=given["top_p"],
            repetition_penalty=given["repetition_penalty"],
            seed=given["seed"],
        ),
        batch_size=given["batch_size"],
    )


def _turns(prompt: str | Sequence[Message]) -> Sequence[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _token_id(tokenizer: Tokenizer, token: str | int) -> int:
    """Return the id of a token, given by id, by name in the vocabulary (`<|im_end|>`), or by its text."""
    if isinstance(token, int):
        if 0 <= token < tokenizer.vocab_size:
            return token
        raise ConfigError(f"stop token {token} is not in the vocabulary of {counted(tokenizer.vocab_size, 'token')}")
    named = tokenizer.token_id(token)
    ids = tokenizer.encode(token) if named is None else [named]
    if len(ids) != 1:
        raise ConfigError(f"{token!r} is not one token of this model, so it cannot be a stop token: use a stop text")
    return ids[0]
