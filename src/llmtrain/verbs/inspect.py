"""`inspect`: the data that a run would see.

    path of rows                        ─▶ data/inspection/rows.py: shapes, lengths in characters, every fault
    CONFIG whose data are rows          ─▶ data/inspection/chat.py: samples, lengths in tokens, packs, every fault
    CONFIG of tokens or text, or SHARDS ─▶ data/inspection/tokens.py: documents, lengths, sources, the first items

Each part is imported where it is needed: rows by themselves need no torch, so they are shown at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from llmtrain.config.loading.load import LoadedConfig, load_config, shipped_configs
from llmtrain.errors import ConfigError

Split = Literal["train", "val"]
NUM_ROWS = NUM_DOCUMENTS = 3
NUM_ITEMS = 2


class Inspection(NamedTuple):
    """Report of an inspection."""

    kind: Literal["rows", "chat", "tokens"]
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
) -> Inspection:
    """Describe the data of a config, or the rows or token shards at a path.

    `is_config`: `ref` names a config, whatever it looks like. An option that does not fit the kind of data is rejected.
    Raises ConfigError also where there is nothing to read. Faults of rows are part of the report, all of them.
    """
    given = {"--num-rows": num_rows, "--num-documents": num_documents, "--num-items": num_items, "--split": split}
    kind = "config" if is_config else _kind_of(ref)
    if kind != "config" and overrides:
        raise ConfigError(f"{ref} is a path of {kind}, to which {overrides[0]} does not apply; give a config for that")
    if kind == "rows":
        _reject(given, "--num-documents", "--num-items", "--split", because=f"{ref} has rows")
        return _inspect_rows(ref, num_rows=NUM_ROWS if num_rows is None else num_rows)
    loaded = load_config(ref, overrides) if kind == "config" else None
    if loaded is not None and loaded.config.data.name == "chat":
        _reject(given, "--num-documents", "--num-items", because=f"the data of {ref} are rows")
        return _inspect_chat(loaded, num_rows=NUM_ROWS if num_rows is None else num_rows, split=split or "train")
    _reject(given, "--num-rows", because=f"{ref} has documents: --num-documents")
    from llmtrain.data.inspection.tokens import inspect_tokens

    report = inspect_tokens(
        loaded or ref,
        split=split or "train",
        num_documents=NUM_DOCUMENTS if num_documents is None else num_documents,
        num_items=NUM_ITEMS if num_items is None else num_items,
    )
    return Inspection("tokens", report, has_faults=False)


def _inspect_rows(path: str, *, num_rows: int) -> Inspection:
    from llmtrain.data.inspection.rows import inspect_rows

    report = inspect_rows(path, num_rows=num_rows)
    return Inspection("rows", report, has_faults=bool(report["faults"]))


def _inspect_chat(loaded: LoadedConfig, *, num_rows: int, split: Split) -> Inspection:
    from llmtrain.data.inspection.chat import inspect_chat
    from llmtrain.data.prepare.parallel import resolve_num_workers

    report = inspect_chat(loaded, num_rows=num_rows, num_workers=resolve_num_workers(None))
    if report[split] is None:
        raise ConfigError(f"{loaded.source} has no validation rows: name them in data.val, or set data.val_fraction")
    return Inspection("chat", report, has_faults=not report["would_run"])


def _kind_of(ref: str) -> Literal["config", "rows", "shards"]:
    """Tell a config by its name or ending, rows by the ending or what the file holds; the rest is token shards."""
    if ref.endswith((".yaml", ".yml")) or (ref in shipped_configs() and not os.path.exists(ref)):
        return "config"
    from llmtrain.data.inspection.rows import holds_rows

    if holds_rows(ref):
        return "rows"
    return "config" if ref.endswith(".json") or ref in shipped_configs() else "shards"


def _reject(given: Mapping[str, object], *options: str, because: str) -> None:
    for option in options:
        if given[option] is not None:
            raise ConfigError(f"{option} does not apply: {because}")
