"""Chat templates: from turns to the one text that a model reads.

The template is the tokenizer's own, or comes from a file; where there is none, a plain one is used, which is defined
here. supervision.py chooses the part of the text that is learned.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError

from llmtrain.data.chat.repeatable import check_repeatable
from llmtrain.data.chat.shapes import Message
from llmtrain.data.chat.tools import with_arguments
from llmtrain.data.files.row_faults import RowError
from llmtrain.data.tokenizers import repeatable_copy
from llmtrain.errors import ConfigError

logger = logging.getLogger(__name__)

PLAIN_TEMPLATE = """\
{%- if bos %}{{ bos_token }}{% endif -%}
{%- if tools %}{{ "### Tools:\\n" + (tools | tojson) + "\\n\\n" }}{% endif -%}
{%- for message in messages -%}
{{ "### " + (message["role"] | capitalize) + ":\\n" }}
{%- if message["role"] == "assistant" -%}
{% generation -%}
{%- if message["reasoning_content"] -%}
{{ "<think>\\n" + message["reasoning_content"] + "\\n</think>\\n\\n" }}
{%- endif -%}
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
"""Template for tokenizers without one: headings in plain text, which any vocabulary has; the end token after each of
the assistant's turns. `bos` is replaced by whether the tokenizer begins a text with its BOS token."""

_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    '{{ {"%Y-%m-%d": "2024-07-26", "%Y": "2024"}[format] or "26 Jul 2024" }}'
    "{%- endmacro -%}"
)
"""Templates that write today's date would give other tokens each day: a resumed run, and a cache, would not fit. This
date is the one that Llama's templates fall back on."""

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARK = "qzjx"
"""Content of a probing turn."""
_CALL_ID = "qzjx12345"
"""Mistral's templates take ids of nine letters and digits alone."""


class _Arguments(NamedTuple):
    """The forms in which a template shows the arguments of a call right."""

    text: bool
    """JSON text stands in the rendered text unchanged."""
    objects: bool
    """An object is written as JSON or in the template's own way, not as Python writes it."""


class ChatTemplate:
    """Turns to text, by a tokenizer's template or another."""

    text: str
    """The template itself."""
    replacement: str | None
    """The same where it takes the place of the tokenizer's own templates, and is saved with the model; else None."""
    control_tokens: tuple[str, ...]
    """Texts of the tokenizer's special tokens, which only templates should write."""
    header: str
    """The text before an assistant's turn, where it could be found out; it is not learned."""
    shared_header: str
    """The part of the header that stands before an answer in any case: what asks for one may also open a block of
    reasoning, which answers need not have."""
    has_generation_prompt: bool
    """True if the template can write the header alone, to ask for an answer."""
    end_of_turn: str
    """The control token that ends an assistant's turn; empty if there is none."""
    closing: str
    """The end of a text that asks for no answer, whatever its last turn is (Phi-3's end token); mostly empty."""

    def __init__(self, tokenizer: Any, *, file: str | None = None) -> None:
        """`tokenizer` is a PreTrainedTokenizerFast; `file` holds a Jinja template that replaces its own.

        Raises ConfigError when there is no such file, or when it holds no template.
        """
        self.tokenizer = tokenizer
        self.control_tokens = _control_tokens(tokenizer)
        self._control_token = re.compile("|".join(map(re.escape, self.control_tokens)) or "(?!)")
        self._ends_in_control_token = re.compile(f"(?:{self._control_token.pattern})\\Z")
        self._special_tokens = dict(tokenizer.special_tokens_map)
        self.text, self._text_with_tools, self.origin = _find_template(tokenizer, file)
        check_repeatable(self.origin, self.text, self._text_with_tools)
        self.replacement = self.text if file is not None or tokenizer.chat_template is None else None
        self.has_generation_tags = bool(_GENERATION_TAG.search(self.text))
        self._arguments: dict[bool, _Arguments] = {}
        self._probe()

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of the turns. Raises RowError when the template rejects them."""
        return self._render(messages, tools, add_generation_prompt=add_generation_prompt, with_spans=False)[0]

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        """Return the text that asks for the assistant's next turn, as training shows it. Raises RowError."""
        prompt = self.render(messages, tools, add_generation_prompt=True)
        return prompt if self.has_generation_prompt else prompt.removesuffix(self.closing) + self.header

    def render_spans(
        self, messages: Sequence[Message], tools: Sequence[Any] | None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the spans of characters in generation tags. Raises RowError."""
        return self._render(messages, tools, add_generation_prompt=False, with_spans=True)

    def first_control_token(self, text: str) -> str | None:
        """Return the first control token in a text."""
        found = self._control_token.search(text)
        return found[0] if found else None

    def without_control_tokens(self, text: str) -> str:
        """Return the text less its control tokens."""
        return self._control_token.sub("", text)

    def ends_in_control_token(self, text: str) -> bool:
        """Return whether the text ends in a control token."""
        return bool(self._ends_in_control_token.search(text))

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, add_generation_prompt: bool, with_spans: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        if any(message.get("tool_calls") for message in messages):
            takes = self._takes_arguments(with_tools=bool(tools))
            if not (takes.text and takes.objects):  # else each call is shown as the row has it
                messages = [with_arguments(message, as_text=takes.text) for message in messages]
        return self._render_as_given(
            messages, tools, add_generation_prompt=add_generation_prompt, with_spans=with_spans
        )

    def _render_as_given(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        *,
        add_generation_prompt: bool = False,
        with_spans: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        text = self._text_with_tools if tools else self.text
        if "strftime_now" in text:
            text = _FIXED_DATE + text
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(messages)],
                tools=list(tools) if tools else None,
                chat_template=text,
                return_assistant_tokens_mask=with_spans,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except TemplateSyntaxError as error:
            raise ConfigError(f"{self.origin}:{error.lineno}: is no Jinja template ({error.message})") from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            missing = "it writes a value as JSON that the row does not have, such as a call's arguments"
            said = f"has no {error}" if isinstance(error, LookupError) else str(error)
            why = missing if "type Undefined is not JSON" in said else said
            raise RowError(f"the chat template does not take its turns ({why})") from error
        texts, spans = rendered
        return texts[0], spans[0] if with_spans else []

    def _takes_arguments(self, *, with_tools: bool) -> _Arguments:
        """Find out, once, in which form the template shows the arguments of a call."""
        if with_tools not in self._arguments:
            text = self._shown_call('{"qzjx": 1.10}', with_tools=with_tools)
            objects = self._shown_call({_MARK: True}, with_tools=with_tools)
            self._arguments[with_tools] = _Arguments(
                text=text is not None and '{"qzjx": 1.10}' in text,
                objects=objects is not None and f"{{'{_MARK}': True}}" not in objects,
            )
        return self._arguments[with_tools]

    def _shown_call(self, arguments: object, *, with_tools: bool) -> str | None:
        """Return how the template shows the call of a tool; None where it does not take it."""
        parameters = {"type": "object", "properties": {_MARK: {"type": "number", "description": "?"}}}
        tool = {"type": "function", "function": {"name": "f", "description": "?", "parameters": parameters}}
        call = {"id": _CALL_ID, "type": "function", "function": {"name": "f", "arguments": arguments}}
        turns: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            return self._render_as_given(turns, [tool] if with_tools else None)[0]
        except RowError:
            return None

    def _probe(self) -> None:
        """Find out how the template writes an assistant's turn, by a small conversation."""
        self.header, self.has_generation_prompt, self.end_of_turn = "", False, ""
        self.closing = self.shared_header = ""
        question = [{"role": "user", "content": "?"}]
        try:
            base = self.render(question, None)
            prompt = self.render(question, None, add_generation_prompt=True)
            full = self.render([*question, {"role": "assistant", "content": _MARK}], None)
        except RowError:
            return  # each row will report what the template rejects
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
        self.shared_header = common_prefix(self.header, full[len(base) : begin])


def common_prefix(one: str, other: str) -> str:
    """Return the characters with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _find_template(tokenizer: Any, file: str | None) -> tuple[str, str, str]:
    """Return the template, the one for rows with tools, and a name for messages."""
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


def adds_bos(tokenizer: Any, backend: Any = None) -> bool:
    """Return whether the tokenizer itself begins a text with its BOS token. `backend`: its `repeatable_copy`."""
    if tokenizer.bos_token_id is None:
        return False
    backend = backend or repeatable_copy(tokenizer)
    ids: list[int] = backend.encode("a").ids
    plain: list[int] = backend.encode("a", add_special_tokens=False).ids
    return ids[:1] == [tokenizer.bos_token_id] != plain[:1]


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = {*added, *map(str, tokenizer.all_special_tokens)} - {""}
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))
