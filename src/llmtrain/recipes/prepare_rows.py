"""`prepare` of a config with rows: tokenised once, ahead of the GPU, into the cache that `train` reads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from llmtrain.config.chat import ChatConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import Config
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.recipes.rows.chat_samples import Samples, find_parts, load_fast_tokenizer, tokenizer_folder_of
from llmtrain.tracking.logs import setup_logging


def prepare_rows(config: Config, *, num_workers: int = 0) -> dict[str, Any]:
    """Tokenise the rows of `config`, or find it done for these rows, tokenizer, template and options.

    `num_workers` processes do it where rows are many. Raises ConfigError with every fault of the rows by `file:line`,
    where none is left, and for a `prepare` section, which is for text; RunError when the disk is full.
    """
    setup_logging(config.logging, run_folder=None, rank=0)
    began = time.perf_counter()
    rows = config.data
    assert isinstance(rows, ChatConfig)
    if config.prepare is not None:
        raise ConfigError(
            "data.name is chat, whose rows need no `prepare` section, but there is one: remove it, or set data.name: "
            "tokens to train on the shards that it makes"
        )
    folder = tokenizer_folder_of(config)
    template = ChatTemplate(load_fast_tokenizer(folder), file=rows.chat_template)
    parts = find_parts(rows)
    samples = Samples(rows, template, parts, num_workers=num_workers)
    made = []
    for part in [*([parts.validation] if parts.validation else []), *parts.training]:
        store, is_new = samples.ensure(part)
        found = store.manifest
        made.append(
            {
                "key": part.key,
                "paths": [source.name for source in part.sources],
                "folder": str(store.folder),
                "made_now": is_new,
                "rows": found.account.rows,
                "samples": found.samples,
                "tokens": found.tokens,
                "supervised_tokens": found.supervised_tokens,
                "notes": list(found.account.notes),
                "warnings": list(found.account.warnings),
            }
        )
    counts = ("rows", "samples", "tokens", "supervised_tokens")
    return {
        "cache": str(Path(rows.cache_dir).expanduser()),
        "tokenizer": str(folder),
        **{name: sum(one[name] for one in made) for name in counts},
        "made_now": any(one["made_now"] for one in made),
        "parts": made,
        "seconds": round(time.perf_counter() - began, 2),
    }
