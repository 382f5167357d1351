"""Text as Markdown that shows it: whatever a name, a config or a row holds, it cannot become markup, links or HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from llmtrain.screen import visible

_MARKUP = re.compile(r"[\\`*<>&\[\]~|]|(?<!\w)_|_(?!\w)")
"""Characters that begin markup within a line. An underscore between letters begins none."""
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


class Code(str):
    """Text that is shown as code."""

    __slots__ = ()


def plain(text: object) -> str:
    """Return text of one line in which nothing is markup."""
    line = " ".join(str(text).split("\n"))
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), visible(line))


def without_html(text: str) -> str:
    """Return Markdown that its author wrote, in which no HTML is left."""
    return "\n".join(visible(line) for line in text.replace("&", "&amp;").replace("<", "&lt;").split("\n"))


def code(text: str) -> str:
    """Return a span of code within a line."""
    line = visible(" ".join(text.split("\n")))
    fence = "`" * (_longest_run(line) + 1)
    blank = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{blank}{line}{blank}{fence}"


def block(text: str, *, language: str) -> str:
    """Return a block of code, which nothing in `text` can end."""
    shown = "\n".join(map(visible, text.strip().split("\n")))
    fence = "`" * max(3, _longest_run(shown) + 1)
    return f"{fence}{language}\n{shown}\n{fence}\n"


def table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table; a cell is plain text, or `Code`."""
    lines = [f"| {' | '.join(map(plain, head))} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return code(value).replace("|", "\\|") if isinstance(value, Code) else plain(value)


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
