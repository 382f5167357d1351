"""Which characters of a row's text the model learns to write.

    Chat ── template with generation tags ──────────────────→ the text, and the spans in the tags
         ── else the turns up to each answer, rendered, are ─→ the text, and a span for each answer
            each a prefix of the whole text
         ── else ───────────────────────────────────────────→ for each answer, the text up to it, and its span
    Completion, Text ───────────────────────────────────────→ the text, and its span

The last happens with templates that show a turn differently once others follow: they move the system text to the last
question, or drop old reasoning. A span goes from the end of the header (`<|im_start|>assistant\\n`, which is given to
the model when it is asked) to the end-of-turn token, both by the template's own rendering; the line end that some
templates write after that token is not learned, nor is a `<think></think>` block with nothing in it. Tokens are
`encoding`'s.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from llmtrain.data.chat.faults import RowError
from llmtrain.data.chat.shapes import Chat, Completion, Example
from llmtrain.data.chat.templates import ChatTemplate

Span = tuple[int, int]
"""Characters [begin, end)."""

_EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\n{0,2}")


class Rendered(NamedTuple):
    """Text that is to become a sample."""

    text: str
    spans: list[Span]
    """What is learned: ascending, apart from each other."""
    prompt: str | None
    """What the model is given, where its tokens have to be the sample's first; None for chats."""
    is_complete: bool
    """Whether the text has all tokens that it should: no BOS is added."""


def render(example: Example, *, template: ChatTemplate, supervise: str) -> list[Rendered]:
    """The texts of a row: one, or one for each answer where the template cannot show all of them at once.

    `supervise` is `assistant`, `last` or `all`. Raises RowError when the template does not take the row, or answers
    cannot be told from what is before them.
    """
    if isinstance(example, Chat):
        return _render_chat(example, template, supervise)
    if isinstance(example, Completion):
        text = example.prompt + example.completion
        if supervise == "all":
            return [Rendered(text, [(0, len(text))], None, is_complete=False)]
        return [Rendered(text, [(len(example.prompt), len(text))], example.prompt, is_complete=False)]
    return [Rendered(example.text, [(0, len(example.text))], None, is_complete=False)]


def _render_chat(chat: Chat, template: ChatTemplate, supervise: str) -> list[Rendered]:
    if supervise == "all":
        text = template.render(chat.messages, chat.tools)
        return [Rendered(text, [(0, len(text))], None, is_complete=True)]
    answers = sorted(chat.supervised)
    if supervise == "last":
        answers = answers[-1:]
    # What comes after the last answer would be read and never learned from.
    chat = Chat(chat.shape, chat.messages[: answers[-1] + 1], chat.tools, chat.supervised)
    rendered = _by_tags(chat, answers, template) if template.has_generation_tags else None
    if rendered is None:
        rendered = _by_prefixes(chat, answers, template)
    if rendered is None:
        return [_one_answer(chat, answer, template) for answer in answers]
    return [rendered]


def _by_tags(chat: Chat, answers: Sequence[int], template: ChatTemplate) -> Rendered | None:
    """By generation tags. None when there is not one span for each of the assistant's turns, but not all are wanted,
    or when the whole conversation does not show the system text."""
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
    """The end of a span with the end-of-turn token, which some templates write after the tag."""
    stripped = text[:end].rstrip()
    if template.end_of_turn and not template.ends_in_control_token(stripped):
        rest = re.compile(r"\s*" + re.escape(template.end_of_turn)).match(text, end)
        return rest.end() if rest else end
    return end


def _by_prefixes(chat: Chat, answers: Sequence[int], template: ChatTemplate) -> Rendered | None:
    """By rendering the turns up to each answer; None when one of these texts is no prefix of the whole."""
    whole = template.render(chat.messages, chat.tools)
    spans = []
    for answer in answers:
        text = whole
        if answer + 1 < len(chat.messages):
            text = template.render(chat.messages[: answer + 1], chat.tools).removesuffix(template.closing)
        if not whole.startswith(text):
            return None
        begin = _begin_of_answer(chat, answer, text, template)
        if begin is None:
            return None
        spans.append((begin, len(text)))
    return _rendered(whole, spans, template)


def _one_answer(chat: Chat, answer: int, template: ChatTemplate) -> Rendered:
    """The turns before an answer, as the model sees them when it is asked, and the answer."""
    text = template.render(chat.messages[: answer + 1], chat.tools)
    begin = _begin_of_answer(chat, answer, text, template)
    if begin is not None:
        return _rendered(text, [(begin, len(text))], template)
    # They are shown differently once the answer follows (Mistral shows the system text before the last turn alone).
    if answer and template.around_content is not None:
        before, after = template.around_content
        content = chat.messages[answer]["content"]
        for turn in (before + content + after, before + content.strip() + after):
            if content and text.endswith(turn):
                prompt = template.render(chat.messages[:answer], chat.tools, add_generation_prompt=True)
                return _rendered(prompt + turn, [(len(prompt), len(prompt + turn))], template)
    raise RowError(
        f"the chat template shows the turns before turn {answer + 1} differently once it follows, and its tokens "
        "cannot be told from theirs: mark them in the template with {% generation %} … {% endgeneration %}"
    )


def _begin_of_answer(chat: Chat, answer: int, text: str, template: ChatTemplate) -> int | None:
    """Where the answer begins in `text`, which ends with it: after its header. None when the turns before it, rendered
    alone, are no prefix of `text`."""
    if answer == 0:  # nothing to render: it greets
        header = text.find(template.header)
        if header >= 0:
            return header + len(template.header)
        content = text.find(chat.messages[0]["content"].strip())
        return content if content >= 0 else None
    prompt = template.render(chat.messages[:answer], chat.tools, add_generation_prompt=True)
    if text.startswith(prompt):
        begin = len(prompt)
    else:
        # The prompt may open what this answer does not have (a block of reasoning): it begins where they part.
        base = len(template.render(chat.messages[:answer], chat.tools).removesuffix(template.closing))
        begin = _common_prefix(prompt, text)
        if begin < base:
            return None
        content = chat.messages[answer]["content"].strip()
        found = text.find(content, base) if content else -1
        begin = min(begin, found) if found >= 0 else begin
    return begin


def _common_prefix(one: str, other: str) -> int:
    both = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))


def _rendered(text: str, spans: Sequence[Span], template: ChatTemplate) -> Rendered:
    trimmed = []
    for begin, end in spans:
        if template.header and text.startswith(
            template.header, begin
        ):  # it was not in the prompt, or is inside of a tag
            begin += len(template.header)
        empty = _EMPTY_THINKING.match(text, begin, end)
        begin = empty.end() if empty else begin
        stripped = text[:end].rstrip()
        end = len(stripped) if template.ends_in_control_token(stripped) else end
        trimmed.append((begin, max(begin, end)))
    return Rendered(text, trimmed, None, is_complete=True)
