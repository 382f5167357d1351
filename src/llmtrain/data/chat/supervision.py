"""Choosing the characters of a row's text that the model learns to write.

    Chat ── template with generation tags ──────────────────→ the text, and the spans in the tags
         ── else the turns up to each answer, rendered, are ─→ the text, and a span for each answer
            each a prefix of the full text
         ── else ───────────────────────────────────────────→ for each answer, the text up to it, and its span
    PromptCompletion, Text ─────────────────────────────────→ the text, and its span

The third way is for templates that show a turn differently once others follow: they move the system text to the last
question, or drop old reasoning. A span goes from the end of the header (`<|im_start|>assistant\\n`, which is given to
the model when it is asked) to the end-of-turn token; the template's own rendering tells where both are. The line end
that some templates write after that token is not learned, nor is a `<think></think>` block with nothing in it. Tokens
are made in encoding.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from llmtrain.data.chat.shapes import Chat, Example, Message, PromptCompletion
from llmtrain.data.chat.templates import ChatTemplate, common_prefix
from llmtrain.data.files.row_faults import RowError

Span = tuple[int, int]
"""Characters [begin, end)."""

_EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\n{0,2}")


class Rendered(NamedTuple):
    """A text that becomes a sample."""

    text: str
    spans: list[Span]
    """Spans of the text that are learned: ascending, without overlap."""
    prompt: str | None
    """Text that the model is given, whose tokens must be the first of the sample; None for chats."""
    is_complete: bool
    """True if the text has all of its control tokens, so no BOS is added."""


def render(example: Example, *, template: ChatTemplate, supervise: str, apart: bool = False) -> list[Rendered]:
    """Return the texts of a row: one, or one for each answer where the template cannot show all of them at once.

    `supervise` is `assistant`, `last` or `all`. `apart`: one for each answer anyway. Raises RowError when the template
    rejects the row, or when it cannot be told where an answer begins.
    """
    if isinstance(example, Chat):
        return _render_chat(example, template, supervise, apart=apart)
    if isinstance(example, PromptCompletion):
        text = example.prompt + example.completion
        if supervise == "all":
            return [Rendered(text, [(0, len(text))], None, is_complete=False)]
        return [Rendered(text, [(len(example.prompt), len(text))], example.prompt, is_complete=False)]
    return [Rendered(example.text, [(0, len(example.text))], None, is_complete=False)]


def learned_answers(chat: Chat, supervise: str) -> list[int]:
    """Return the turns whose text is learned, by index."""
    answers = sorted(chat.supervised)
    return answers[-1:] if supervise == "last" else answers


def _render_chat(chat: Chat, template: ChatTemplate, supervise: str, *, apart: bool) -> list[Rendered]:
    if supervise == "all":
        text = template.render(chat.messages, chat.tools)
        return [Rendered(text, [(0, len(text))], None, is_complete=True)]
    answers = learned_answers(chat, supervise)
    # What comes after the last answer would be read and never learned from.
    chat = Chat(chat.shape, chat.messages[: answers[-1] + 1], chat.tools, chat.supervised)
    rendered = _by_tags(chat, answers, template) if template.has_generation_tags and not apart else None
    if rendered is None and not apart:
        rendered = _by_prefixes(chat, answers, template)
    if rendered is None:
        return [_one_answer(chat, answer, template) for answer in answers]
    return [rendered]


def _by_tags(chat: Chat, answers: Sequence[int], template: ChatTemplate) -> Rendered | None:
    """Find the answers by generation tags.

    None when only some of the assistant's turns are wanted and there is not one span for each turn, or when the full
    conversation does not show the system text.
    """
    text, spans = template.render_spans(chat.messages, chat.tools)
    if any(message["content"].strip() not in text for message in chat.messages if message["role"] == "system"):
        return None  # it is shown when an answer is asked for, and only then
    turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not spans:
        raise RowError("the chat template's generation tags mark nothing in it")
    if turns != list(answers):
        if len(spans) != len(turns):
            return None
        spans = [span for span, turn in zip(spans, turns, strict=True) if turn in answers]
    with_ends = [(begin, _end_with_token(text, end, template)) for begin, end in spans]
    return _rendered(text, with_ends, template)


def _end_with_token(text: str, end: int, template: ChatTemplate) -> int:
    """Return the end of a span with the end-of-turn token, which some templates write after the tag."""
    stripped = text[:end].rstrip()
    if template.end_of_turn and not template.ends_in_control_token(stripped):
        rest = re.compile(r"\s*" + re.escape(template.end_of_turn)).match(text, end)
        return rest.end() if rest else end
    return end


def _by_prefixes(chat: Chat, answers: Sequence[int], template: ChatTemplate) -> Rendered | None:
    """Find the answers by rendering the turns up to each; None when one of these texts is no prefix of the full one."""
    full = template.render(chat.messages, chat.tools)
    spans = []
    for answer in answers:
        text = full
        if answer + 1 < len(chat.messages):
            text = template.render(chat.messages[: answer + 1], chat.tools).removesuffix(template.closing)
        if not full.startswith(text):
            return None
        begin = _begin_of_answer(chat, answer, text, template)
        if begin is None:
            return None
        spans.append((begin, len(text)))
    return _rendered(full, spans, template)


def _one_answer(chat: Chat, answer: int, template: ChatTemplate) -> Rendered:
    """Render the turns before an answer, as the model sees them when it is asked, and the answer."""
    text = template.render(chat.messages[: answer + 1], chat.tools)
    begin = _begin_of_answer(chat, answer, text, template)
    if begin is not None:
        return _rendered(text, [(begin, len(text))], template)
    # They are shown differently once the answer follows (Mistral shows the system text before the last turn alone).
    if answer:
        question: list[Message] = [{"role": "user", "content": "?"}]
        asked = template.render(question, chat.tools, add_generation_prompt=True)
        answered = template.render([*question, chat.messages[answer]], chat.tools)
        turn = answered.removeprefix(asked)
        if turn != answered and text.endswith(turn):
            prompt = template.render(chat.messages[:answer], chat.tools, add_generation_prompt=True)
            return _rendered(prompt + turn, [(len(prompt), len(prompt + turn))], template)
    raise RowError(
        f"the chat template shows the turns before turn {answer + 1} differently once it follows, and its tokens "
        "cannot be told from theirs: mark them in the template with {% generation %} … {% endgeneration %}"
    )


def _begin_of_answer(chat: Chat, answer: int, text: str, template: ChatTemplate) -> int | None:
    """Return where the answer begins, after its header, in a `text` that ends with it.

    None when the turns before it, rendered alone, are no prefix of `text`.
    """
    if answer == 0:  # nothing to render: it greets
        for header in (template.header, template.shared_header):
            if header in text:
                return text.find(header) + len(header)
        return _begin_of_last(chat.messages[0]["content"].strip(), text, template)
    prompt = template.render(chat.messages[:answer], chat.tools, add_generation_prompt=True)
    if text.startswith(prompt):
        begin = len(prompt)
    else:
        # The prompt may open what this answer does not have (a block of reasoning): it begins where they part, or
        # before, where it begins like that block.
        base = len(template.render(chat.messages[:answer], chat.tools).removesuffix(template.closing))
        begin = len(common_prefix(prompt, text))
        if begin < base:
            return None
        if template.shared_header and text.startswith(template.shared_header, base):
            begin = min(begin, base + len(template.shared_header))
    return begin


def _begin_of_last(content: str, text: str, template: ChatTemplate) -> int | None:
    """Return where `content` begins in a text that ends with it and the end of the turn; None for any other text."""
    said = text.rstrip().removesuffix(template.end_of_turn).rstrip()
    return len(said) - len(content) if content and said.endswith(content) else None


def _rendered(text: str, spans: Sequence[Span], template: ChatTemplate) -> Rendered:
    """Trim the header, an empty block of reasoning, and what follows the end-of-turn token off the spans."""
    trimmed = []
    for begin, end in spans:
        # The header was not in the prompt, or is inside of a tag.
        if template.header and text.startswith(template.header, begin):
            begin += len(template.header)
        empty = _EMPTY_THINKING.match(text, begin, end)
        begin = empty.end() if empty else begin
        stripped = text[:end].rstrip()
        end = len(stripped) if template.ends_in_control_token(stripped) else end
        trimmed.append((begin, max(begin, end)))
    return Rendered(text, trimmed, None, is_complete=True)
