"""Chat templates: from turns to the one text that a model reads.

The tokenizer's own template is taken, or one from a file, or, where there is none, a plain one that stands here. Which
part of the text is learned is `supervision`'s.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from llmtrain.config.errors import ConfigError
from llmtrain.data.chat.faults import RowError
from llmtrain.data.chat.shapes import Message

logger = logging.getLogger(__name__)

PLAIN_TEMPLATE = """\
{%- if bos %}{{ bos_token }}{% endif -%}
{%- if tools %}{{ "### Tools:\\n" + (tools | tojson) + "\\n\\n" }}{% endif -%}
{%- for message in messages -%}
{{ "### " + (message["role"] | capitalize) + ":\\n" }}
{%- if message["role"] == "assistant" -%}
{% generation -%}
{%- if message["tool_calls"] %}{{ message["tool_calls"] | tojson + "\\n" }}{% endif -%}
{{ (message["content"] | trim) + eos_token }}
{%- endgeneration %}
{%- else -%}
{{ message["content"] | trim }}
{%- endif -%}
{{ "\\n\\n" }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "### Assistant:\\n" }}{% endif -%}
"""
"""For tokenizers without a template: headings in plain text, which any vocabulary has, and the end token after each of
the assistant's turns. `bos` is replaced by whether the tokenizer begins a text with its BOS token."""

_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    '{{ {"%Y-%m-%d": "2024-07-26", "%Y": "2024"}[format] or "26 Jul 2024" }}'
    "{%- endmacro -%}"
)
"""Templates that write today's date would give other tokens each day: a resumed run, and a cache, would not fit. The
date is the one that Llama's templates have when they cannot ask for another."""

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARK = "qzjx"
"""Content of a probing turn."""


class ChatTemplate:
    """Turns to text, by a tokenizer's template or another."""

    text: str
    """The template itself, as it should go along with the model."""
    control_tokens: tuple[str, ...]
    """Texts of the tokenizer's special tokens, which only templates should write."""
    header: str
    """What stands before an assistant's turn, where it could be found out; not learned."""
    has_generation_prompt: bool
    """Whether the template can write the header alone, to ask for an answer."""
    end_of_turn: str
    """The control token that ends an assistant's turn; empty if there is none."""
    around_content: tuple[str, str] | None
    """What the template writes before an answer's content, after what asks for the answer, and after it."""
    closing: str
    """What ends a text that asks for no answer, whatever its last turn is (Phi-3's end token); mostly empty."""

    def __init__(self, tokenizer: Any, *, file: str | None = None) -> None:
        """`tokenizer` is a PreTrainedTokenizerFast; `file` holds a Jinja template that goes before its own.

        Raises ConfigError when there is no such file, or the template is none.
        """
        self.tokenizer = tokenizer
        self.control_tokens = _control_tokens(tokenizer)
        self._control_token = re.compile("|".join(map(re.escape, self.control_tokens)) or "(?!)")
        self._ends_in_control_token = re.compile(f"(?:{self._control_token.pattern})\\Z")
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self.text, self._text_with_tools, self.origin = _find_template(tokenizer, file)
        self.has_generation_tags = bool(_GENERATION_TAG.search(self.text))
        self._probe()

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        """The text of the turns. Raises RowError when the template does not take them."""
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt, with_spans=False)[0]

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        """The text that asks for the assistant's next turn, as training shows it. Raises RowError."""
        prompt = self.render(messages, tools, add_generation_prompt=True)
        return prompt if self.has_generation_prompt else prompt.removesuffix(self.closing) + self.header

    def render_spans(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and which characters stand in generation tags. Raises RowError."""
        return self._render(messages, tools, add_generation_prompt=False, with_spans=True)

    def first_control_token(self, text: str) -> str | None:
        """The first control token that stands in a text."""
        found = self._control_token.search(text)
        return found[0] if found else None

    def ends_in_control_token(self, text: str) -> bool:
        """Whether a control token is the text's end."""
        return bool(self._ends_in_control_token.search(text))

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, add_generation_prompt: bool, with_spans: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        text = self._text_with_tools if tools else self.text
        if "strftime_now" in text:
            text = _FIXED_DATE + text

        def rendered(messages: Sequence[Message]) -> tuple[list[str], list[list[tuple[int, int]]]]:
            found: tuple[list[str], list[list[tuple[int, int]]]] = render_jinja_template(
                conversations=[list(messages)],
                tools=list(tools) if tools else None,
                chat_template=text,
                return_assistant_tokens_mask=with_spans,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
            return found

        try:
            try:
                texts, spans = rendered(messages)
            except TypeError:  # some templates put a call's arguments into the text as they are
                if not any("tool_calls" in message for message in messages):
                    raise
                texts, spans = rendered([_with_arguments_as_text(message) for message in messages])
        except TemplateSyntaxError as error:
            raise ConfigError(f"{self.origin}:{error.lineno}: is no Jinja template ({error.message})") from error
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the chat template does not take its turns ({error})") from error
        return texts[0], spans[0] if with_spans else []

    def _probe(self) -> None:
        """Find out how the template writes an assistant's turn, by a small conversation."""
        self.header, self.has_generation_prompt, self.end_of_turn = "", False, ""
        self.around_content, self.closing = None, ""
        question = [{"role": "user", "content": "?"}]
        try:
            base = self.render(question, None)
            prompt = self.render(question, None, add_generation_prompt=True)
            full = self.render([*question, {"role": "assistant", "content": _MARK}], None)
        except RowError:
            return  # each row will say what the template does not take
        self.has_generation_prompt = prompt != base
        eos = str(self.tokenizer.eos_token)
        if base.endswith(eos) and not prompt.startswith(base) and prompt.startswith(base.removesuffix(eos)):
            base, self.closing = base.removesuffix(eos), eos
        begin = full.find(_MARK)
        tail = full[begin + len(_MARK) :]
        end = self._control_token.match(tail.lstrip())
        self.end_of_turn = end[0] if end else ""
        if not (prompt.startswith(base) and full.startswith(base)) or begin < 0:
            return
        # A blank at the end of a header that is never written alone goes with the first word, as vocabularies have it.
        header = prompt[len(base) :] if self.has_generation_prompt else full[len(base) : begin].rstrip(" ")
        self.header = header if header.strip() else ""
        if full.startswith(prompt):
            self.around_content = full[len(prompt) : begin], tail


def _find_template(tokenizer: Any, file: str | None) -> tuple[str, str, str]:
    """The template, the one for rows with tools, and a name for messages."""
    if file is not None:
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"data.chat_template: {file}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"data.chat_template: {file}: is no UTF-8 text ({error})") from error
        return text, text, file
    if tokenizer.chat_template is None:
        logger.info("The tokenizer has no chat template: a plain one is used (data.chat_template names another)")
        text = PLAIN_TEMPLATE.replace("if bos ", f"if {str(adds_bos(tokenizer)).lower()} ", 1)
        return text, text, "the plain chat template"
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise ConfigError(
            f"the tokenizer has several chat templates ({', '.join(named)}), and none is the default: "
            "give the wanted one as a file in data.chat_template"
        )
    text = tokenizer.get_chat_template()
    return text, tokenizer.get_chat_template(tools=[{}]), "the tokenizer's chat template"


def _with_arguments_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its BOS token of its own accord."""
    if tokenizer.bos_token_id is None:
        return False
    ids: list[int] = tokenizer.backend_tokenizer.encode("a").ids
    plain: list[int] = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    return ids[:1] == [tokenizer.bos_token_id] != plain[:1]


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = {*added, *map(str, tokenizer.all_special_tokens)} - {""}
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))
