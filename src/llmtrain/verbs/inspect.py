"""`inspect`: the data that a run would see.

    path of rows                        ─▶ data/inspection/rows.py: shapes, lengths in characters, every fault
    CONFIG whose data are rows          ─▶ data/inspection/chat.py: samples, lengths in tokens, packs, every fault
    CONFIG of tokens or text, or SHARDS ─▶ data/inspection/tokens.py: documents, lengths, sources, the first items
    path of text                        ─▶ data/inspection/plain_text.py: documents, and their analysis

Any of them adds the analysis of its corpus (data/inspection/analysis.py) where it is asked for.

Each part is imported where it is needed: rows by themselves need no torch, so they are shown at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llmtrain.config.loading.load import LoadedConfig, load_config, shipped_configs
from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.data.inspection.analysis_options import AnalysisOptions

Split = Literal["train", "val"]
NUM_ROWS = NUM_DOCUMENTS = 3
NUM_ITEMS = 2


class Inspection(NamedTuple):
    """Report of an inspection."""

    kind: Literal["rows", "chat", "tokens", "texts"]
    """Part that made the report."""
    report: dict[str, Any]
    has_faults: bool
    """True if a run could not use these rows."""


def inspect(
    ref: str,
    overrides: Sequence[str] = (),
    *,
    is_config: bool = False,
    split: Split | None = None,
    num_rows: int | None = None,
    num_documents: int | None = None,
    num_items: int | None = None,
    analyse: AnalysisOptions | None = None,
) -> Inspection:
    """Describe the data of a config, or the rows, the text or the token shards at a path.

    `is_config`: `ref` names a config, whatever it looks like. An option that does not fit the kind of data is rejected.
    `analyse` adds the analysis of the corpus; text has one in any case. Raises ConfigError also where there is nothing
    to read. Faults of rows are part of the report, all of them.
    """
    given: dict[str, object] = {"--num-rows": num_rows, "--num-documents": num_documents, "--num-items": num_items}
    given |= {"--split": split, "--tokenizer": analyse.tokenizer if analyse else None}
    kind = "config" if is_config else _kind_of(ref)
    if kind != "config" and overrides:
        raise ConfigError(f"{ref} is a path of {kind}, to which {overrides[0]} does not apply; give a config for that")
    if kind == "rows":
        _reject(given, "--num-documents", "--num-items", "--split", because=f"{ref} has rows")
        return _inspect_rows(ref, num_rows=NUM_ROWS if num_rows is None else num_rows, analyse=analyse)
    if kind == "text":
        _reject(given, "--num-rows", "--num-items", "--split", because=f"{ref} has texts")
        return _inspect_texts(ref, analyse, num_documents=NUM_DOCUMENTS if num_documents is None else num_documents)
    _reject(given, "--tokenizer", because=f"the data of {ref} have a tokenizer")
    loaded = load_config(ref, overrides) if kind == "config" else None
    if loaded is not None and loaded.config.data.name == "chat":
        _reject(given, "--num-documents", "--num-items", because=f"the data of {ref} are rows")
        num_rows = NUM_ROWS if num_rows is None else num_rows
        return _inspect_chat(loaded, num_rows=num_rows, split=split or "train", analyse=analyse)
    _reject(given, "--num-rows", because=f"{ref} has documents: --num-documents")
    from llmtrain.data.inspection.tokens import inspect_tokens

    report = inspect_tokens(
        loaded or ref,
        split=split or "train",
        num_documents=NUM_DOCUMENTS if num_documents is None else num_documents,
        num_items=NUM_ITEMS if num_items is None else num_items,
        analyse=analyse,
    )
    return Inspection("tokens", report, has_faults=False)


def _inspect_rows(path: str, *, num_rows: int, analyse: AnalysisOptions | None) -> Inspection:
    from llmtrain.data.inspection.rows import inspect_rows

    report = inspect_rows(path, num_rows=num_rows, analyse=analyse)
    return Inspection("rows", report, has_faults=bool(report["faults"]))


def _inspect_texts(path: str, analyse: AnalysisOptions | None, *, num_documents: int) -> Inspection:
    from llmtrain.data.inspection.analysis_options import AnalysisOptions
    from llmtrain.data.inspection.plain_text import inspect_texts

    report = inspect_texts(path, analyse or AnalysisOptions(), num_documents=num_documents)
    return Inspection("texts", report, has_faults=report["num_faults"] > 0)


def _inspect_chat(loaded: LoadedConfig, *, num_rows: int, split: Split, analyse: AnalysisOptions | None) -> Inspection:
    from llmtrain.data.inspection.chat import inspect_chat
    from llmtrain.data.prepare.parallel import resolve_num_workers

    num_workers = resolve_num_workers(None)
    report = inspect_chat(loaded, num_rows=num_rows, num_workers=num_workers, analyse=analyse, split=split)
    if report[split] is None:
        raise ConfigError(f"{loaded.source} has no validation rows: name them in data.val, or set data.val_fraction")
    return Inspection("chat", report, has_faults=not report["would_run"])


def _kind_of(ref: str) -> Literal["config", "rows", "text", "shards"]:
    """Tell a config by its name or ending, rows by the ending or what the file holds, text by what is there."""
    if ref.endswith((".yaml", ".yml")) or (ref in shipped_configs() and not os.path.exists(ref)):
        return "config"
    from llmtrain.data.inspection.rows import holds_rows

    if holds_rows(ref):
        return "rows"
    if ref.endswith(".json") or ref in shipped_configs():
        return "config"
    from llmtrain.data.inspection.plain_text import holds_text

    return "text" if holds_text(ref) else "shards"


def _reject(given: Mapping[str, object], *options: str, because: str) -> None:
    for option in options:
        if given[option] is not None:
            raise ConfigError(f"{option} does not apply: {because}")
