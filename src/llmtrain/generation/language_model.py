"""A model that is ready to write, whichever kind it is: the one face that `generate`, `eval` and the API work with.

A prompt is text to go on from, or the turn of a user, which is put through the chat template. How a model is found and
loaded is `open_model`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

from llmtrain.data.chat.encoding import ChatEncoder
from llmtrain.data.chat.shapes import Message
from llmtrain.data.files.row_faults import RowError
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.errors import ConfigError
from llmtrain.generation.completion import Completion, OnText, TokenizedPrompt, complete
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
    """Settings by which text is written."""

    max_new_tokens: int
    """128 where it is not given."""
    temperature: float
    """0 takes the likeliest token each time; 0.8 where it is not given."""
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int
    stop: Sequence[str]
    """Texts before which a completion ends."""
    stop_tokens: Sequence[str | int]
    """Tokens at which it ends besides the end token: names, texts or ids."""
    heal: bool
    """Choose the prompt's last token anew, among those that begin with its text; not done to turns."""
    chat: bool | None
    """True if a prompt is a user's turn, to be put through the chat template; None: as the model's `chats` says."""
    batch_size: int
    """Prompts that are computed at a time."""


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
    """A model that is ready to write, and its tokenizer."""

    model: AnyModel
    """Model in evaluation mode, on its device."""
    tokenizer: Tokenizer | None
    """None where there is none: `model` then takes and gives token ids, and there is no text."""
    encoder: ChatEncoder | None
    """Makes tokens of prompts for a model that was tuned on rows, or comes from elsewhere, as its training did: with a
    BOS token, and control tokens where their texts stand. None: prompts are plain text."""
    eos_ids: frozenset[int]
    """Any of these ends a text."""
    folder: Path
    chats: bool = False
    """True if a prompt is a user's turn unless something else is asked for."""

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[Message]],
        *,
        on_text: OnText | None = None,
        **settings: Unpack[Settings],
    ) -> list[Completion]:
        """Return a completion of each prompt, in their order; the same whatever other prompts stand beside it.

        Args:
            prompts: texts; or conversations, whose next turn is written.
            on_text: told of each new piece of text, with the number of its prompt.
            settings: see `Settings`, which also has what they are where they are not given.

        Raises:
            ConfigError: no tokenizer or template, a prompt longer than the context, or a setting out of its range.
        """
        if unknown := sorted(settings.keys() - DEFAULTS.keys()):
            raise TypeError(f"generate has no setting {unknown[0]!r}: it has {', '.join(DEFAULTS)}")
        given: Settings = {**DEFAULTS, **settings}
        chat = given["chat"]
        if self.tokenizer is None:
            raise ConfigError(f"{self.folder} has no tokenizer.json, so it cannot be given text")
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) for prompt in asked]
        in_turns = self.chats if chat is None else chat
        if asked != texts and not in_turns:
            raise ConfigError(f"{self.folder} completes texts, and is asked for the next turn of a conversation")
        if in_turns and chat is None and asked:
            log.info("prompts are put through the model's chat template; --no-chat gives them as they are")
        rendered = [self.render(_turns(prompt)) for prompt in asked] if in_turns else texts
        ids = [self.prompt_ids(text, is_complete=in_turns) for text in rendered]
        tokenizer = self.tokenizer
        completions = complete(
            self.model,
            tokenizer,
            [TokenizedPrompt(text, tokens) for text, tokens in zip(texts, ids, strict=True)],
            Decoding(
                max_new_tokens=given["max_new_tokens"],
                sampling=Sampling(
                    temperature=given["temperature"],
                    top_k=given["top_k"],
                    top_p=given["top_p"],
                    repetition_penalty=given["repetition_penalty"],
                    seed=given["seed"],
                ),
                batch_size=given["batch_size"],
            ),
            stop=given["stop"],
            stop_ids={*self.stop_ids(chat=in_turns), *(_token_id(tokenizer, token) for token in given["stop_tokens"])},
            heal=given["heal"] and not in_turns,
            on_text=on_text,
        )
        if not in_turns:
            return completions
        return [replace(done, rendered=text) for done, text in zip(completions, rendered, strict=True)]

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The text that asks for the next turn. ConfigError: there is no template, or it does not take them."""
        if self.encoder is None:
            raise ConfigError(f"{self.folder} has no chat template: give its prompts as they are (--no-chat)")
        try:
            return self.encoder.template.render_prompt(messages, tools)
        except RowError as error:
            raise ConfigError(str(error)) from error

    def prompt_ids(self, text: str, *, is_complete: bool) -> list[int]:
        """The tokens of a prompt; `is_complete`: `render` made it. Of a prompt of no tokens, what begins a document."""
        assert self.tokenizer is not None
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"the prompt {text[:60]!r} is no valid Unicode: at character {error.start + 1} it has half of a "
                "surrogate pair, or a byte that is no UTF-8"
            ) from None
        if self.encoder is None:
            ids = self.tokenizer.encode(text)
        else:
            ids = self.encoder.encode_prompt(text, is_complete=is_complete)
        self.check_rows(max(ids, default=0) + 1, of="the prompt")
        return ids or [self.tokenizer.eos_id]

    def check_rows(self, vocab_size: int, *, of: str) -> None:
        """Raise ConfigError if ids below `vocab_size`, which `of` has, are more than the embedding has rows."""
        rows = self.model.vocab_size
        if vocab_size > rows and self.tokenizer is not None:
            raise ConfigError(
                f"{of} has tokens for which the embedding in {self.folder}, of {counted(rows, 'row')}, has none: "
                f"{self.tokenizer.tokens_from(rows)}. Take a tokenizer without them, or train the model with "
                "model.resize_embeddings=true"
            )

    def stop_ids(self, *, chat: bool) -> frozenset[int]:
        """The tokens that end a text, or, with `chat`, a turn."""
        end_of_turn = self.encoder.template.end_of_turn if chat and self.encoder is not None else ""
        found = self.tokenizer.token_id(end_of_turn) if self.tokenizer is not None and end_of_turn else None
        return self.eos_ids if found is None else self.eos_ids | {found}


def _turns(prompt: str | Sequence[Message]) -> Sequence[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _token_id(tokenizer: Tokenizer, token: str | int) -> int:
    """Return the id of a token, given by id, by name in the vocabulary (`<|im_end|>`), or by the text of it alone."""
    if isinstance(token, int):
        if 0 <= token < tokenizer.vocab_size:
            return token
        raise ConfigError(f"stop token {token} is not in the vocabulary of {counted(tokenizer.vocab_size, 'token')}")
    named = tokenizer.token_id(token)
    ids = tokenizer.encode(token) if named is None else [named]
    if len(ids) != 1:
        raise ConfigError(f"{token!r} is no token of this model, so it cannot be a stop token; make it a stop text")
    return ids[0]
