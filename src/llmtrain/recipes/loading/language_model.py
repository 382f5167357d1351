"""A model that is ready to write, whichever kind it is: the one face that `generate`, `eval` and the API work with.

A prompt is text to go on from, or the turn of a user, which is put through the chat template. How a model is found and
loaded is `open_model`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from llmtrain.config.errors import ConfigError
from llmtrain.data.chat.encoding import ChatEncoder
from llmtrain.data.chat.faults import RowError
from llmtrain.data.chat.shapes import Message
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.evaluation.sampling import Sampling
from llmtrain.evaluation.text import Completion, OnText, complete
from llmtrain.models.decoder.decoder import Decoder

if TYPE_CHECKING:
    from llmtrain.models.huggingface import HuggingFaceModel

log = logging.getLogger("llmtrain.generate")

AnyModel: TypeAlias = "Decoder | HuggingFaceModel"
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
    chat: bool | None
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A model that is ready to write, and its tokenizer."""

    model: AnyModel
    """In evaluation mode, on its device."""
    tokenizer: Tokenizer | None
    """None where there is none: `model` then takes and gives token ids, and there is no text."""
    encoder: ChatEncoder | None
    """Makes tokens of prompts for a model that was tuned on rows, or comes from elsewhere, as its training did: with a
    BOS token, and control tokens where their texts stand. None: prompts are plain text."""
    eos_ids: frozenset[int]
    """Any of these ends a text."""
    folder: Path
    chats: bool = False
    """Whether a prompt is a user's turn unless something else is asked for."""

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[Message]],
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
        chat: bool | None = None,
        batch_size: int = 16,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """A completion of each prompt, in their order; the same whatever other prompts stand beside it.

        Args:
            prompts: texts; or conversations, whose next turn is written.
            temperature: 0 takes the likeliest token each time.
            stop: texts before which a completion ends.
            stop_tokens: tokens at which it ends besides the end token: names, texts or ids.
            heal: choose the prompt's last token anew, among those that begin with its text; not done to turns.
            chat: whether a prompt is a user's turn, to be put through the chat template; None: as `chats` says.
            batch_size: prompts that are computed at a time.
            on_text: told of each new piece of text, with the number of its prompt.

        Raises:
            ConfigError: no tokenizer or template, a prompt longer than the context, or a setting out of its range.
        """
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
        completions = complete(
            self.model,
            self.tokenizer,
            texts,
            prompt_ids=ids,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(
                temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
            ),
            stop=stop,
            stop_ids={*self.stop_ids(chat=in_turns), *(_token_id(self.tokenizer, token) for token in stop_tokens)},
            heal=heal and not in_turns,
            batch_size=batch_size,
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
        if self.encoder is None:
            return self.tokenizer.encode(text) or [self.tokenizer.eos_id]
        return self.encoder.encode_prompt(text, is_complete=is_complete) or [self.tokenizer.eos_id]

    def stop_ids(self, *, chat: bool) -> frozenset[int]:
        """The tokens that end a text, or, with `chat`, a turn."""
        end_of_turn = self.encoder.template.end_of_turn if chat and self.encoder is not None else ""
        found = self.tokenizer.token_id(end_of_turn) if self.tokenizer is not None and end_of_turn else None
        return self.eos_ids if found is None else self.eos_ids | {found}


def _turns(prompt: str | Sequence[Message]) -> Sequence[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


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
