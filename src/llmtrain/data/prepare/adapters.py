"""Adapters: which fields of a data set's row are the text of a document, its id and its subset.

    row (a mapping of its fields) ─ adapter ─→ id, text, subset

One small function for each data set that has its own idea of a row, the user's own by import path, and `default`, which
takes the field that is found (or named by `text_column`). Where rows come from is `documents`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from llmtrain.data.files.row_faults import RowError
from llmtrain.errors import ConfigError
from llmtrain.import_path import code_sha256, import_callable

Fields = Mapping[str, Any]


class Found(NamedTuple):
    """Document that an adapter returns. A user's adapter may return a plain tuple, a text, or None for no document."""

    id: str | None
    """Id in the column `source` of data sets; the number of the row if None."""
    text: str
    subset: str | None = None
    """Its documents go into a folder of this name."""


@dataclass(frozen=True)
class Adapter:
    """An adapter, ready to use."""

    name: str
    function: Callable[[Fields], object] | None
    """None: the text is in a column that is found for each file, or named."""
    columns: tuple[str, ...] | None
    """The fields that it looks at, where they are known: no others are read."""
    source_sha256: str | None = None
    """Hash of the function's code (see `code_sha256`), for one of the user's own."""

    def columns_to_read(self, text_column: str) -> tuple[str, ...] | None:
        """Return the fields that it looks at in a file whose text is in `text_column`; None: any field."""
        return (text_column, "id") if self.function is None else self.columns

    def read(self, row: Fields, *, text_column: str) -> Found:
        """Return what the adapter finds in a row. Raises RowError when the row is not what it expects."""
        if self.function is None:
            found: object = _by_column(row, text_column)
        else:
            try:
                found = self.function(row)
            except KeyError as error:
                raise RowError(_no_field(str(error.args[0]), row) + f" (adapter {self.name})") from error
            except Exception as error:
                if isinstance(error, RowError):
                    raise
                raise RowError(f"adapter {self.name} failed ({type(error).__name__}: {error})") from error
        return _checked(found, self.name)


def load_adapter(name: str) -> Adapter:
    """Load an adapter by its name, or by import path (`package.module:function`). Raises ConfigError."""
    if name == "default":
        return Adapter(name, None, None)
    if name in _ADAPTERS:
        return Adapter(name, *_ADAPTERS[name])
    known = ", ".join(["default", *_ADAPTERS])
    if ":" not in name:
        close = get_close_matches(name, ["default", *_ADAPTERS], n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ConfigError(
            f"prepare.adapter: there is no adapter {name!r}{hint} There are {known}, "
            "and your own as package.module:function"
        )
    function = import_callable(name, key="prepare.adapter")
    return Adapter(name, function, None, code_sha256(name))


def _by_column(row: Fields, column: str) -> Found:
    if column not in row:
        raise RowError(_no_field(column, row))
    text = row[column]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise RowError(f"field {column!r} is {kind}, not text")
    identity = row.get("id")
    return Found(str(identity) if isinstance(identity, str | int) else None, text)


def _checked(found: object, name: str) -> Found:
    if found is None:
        return Found(None, "")
    if isinstance(found, str):
        found = Found(None, found)
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        raise RowError(f"adapter {name} gave {type(found).__name__}, not (id, text) or (id, text, subset)")
    identity, text, subset = (*found, None)[:3]
    if not isinstance(text, str):
        raise RowError(f"the text is {type(text).__name__}, not a string (adapter {name})")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("the text holds half of a surrogate pair, which is no valid Unicode") from None
    return Found(None if identity is None else str(identity), text, None if subset is None else str(subset))


def _no_field(column: str, row: Fields) -> str:
    return f"has no field {column!r}, only {', '.join(map(repr, row)) or 'none'}"


# -- data sets ---------------------------------------------------------------------------------------------------------


def _plain(row: Fields) -> Found:
    return Found(None, row["text"])


def _wikipedia(row: Fields) -> Found:
    """wikimedia/wikipedia: the text does not begin with the title, which is a part of the article."""
    return Found(str(row["id"]), f"{row['title']}\n\n{row['text']}")


def _fineweb(row: Fields) -> Found:
    """HuggingFaceFW/fineweb, fineweb-edu, fineweb-2."""
    return Found(row["id"], row["text"])


def _c4(row: Fields) -> Found:
    """allenai/c4: pages are known by their address."""
    return Found(row["url"], row["text"])


def _refinedweb(row: Fields) -> Found:
    """tiiuae/falcon-refinedweb."""
    return Found(row["url"], row["content"])


def _pile(row: Fields) -> Found:
    """EleutherAI/pile and its like: `meta` says of which of the Pile's parts a document is."""
    return Found(None, row["text"], _fields_of(row["meta"]).get("pile_set_name"))


def _redpajama(row: Fields) -> Found:
    """togethercomputer/RedPajama-Data-1T (and SlimPajama) and, where there is `raw_content`, RedPajama-Data-V2."""
    if "raw_content" in row:
        return Found(row.get("doc_id"), row["raw_content"])
    meta = _fields_of(row.get("meta"))
    identity = next((meta[name] for name in ("arxiv_id", "url", "path", "title") if meta.get(name)), None)
    return Found(identity, row["text"], row.get("red_pajama_subset") or meta.get("redpajama_set_name"))


def _fields_of(meta: object) -> Mapping[str, Any]:
    """`meta` is an object in some copies of these data sets, and the text of one (JSON or Python) in others."""
    if isinstance(meta, str):
        text = meta
        try:
            meta = json.loads(text)
        except ValueError:
            try:
                meta = ast.literal_eval(text)  # literals alone: runs nothing
            except (ValueError, SyntaxError):
                return {}
    return meta if isinstance(meta, Mapping) else {}


_ADAPTERS: dict[str, tuple[Callable[[Fields], Found], tuple[str, ...]]] = {
    "plain": (_plain, ("text",)),
    "wikipedia": (_wikipedia, ("id", "title", "text")),
    "fineweb": (_fineweb, ("id", "text")),
    "c4": (_c4, ("url", "text")),
    "redpajama": (_redpajama, ("text", "meta", "red_pajama_subset", "raw_content", "doc_id")),
    "pile": (_pile, ("text", "meta")),
    "refinedweb": (_refinedweb, ("url", "content")),
}
