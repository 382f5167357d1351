"""The rows of a config, tokenised once: made ahead of the GPU by `prepare`, or by the first `train` that needs them.

parts of the rows (parts.py) ─ sample_maker.py ─┬─▶ cache.py, keyed by content, tokenizer, template and options
                                                └─▶ `inspect`, which keeps nothing
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.schema import Config
from llmtrain.data.chat.cache import Account, SampleStore, ensure_samples, samples_folder
from llmtrain.data.chat.holdout import ValidationPrompts, prompt_hash
from llmtrain.data.chat.key import samples_key
from llmtrain.data.chat.parts import RowPart, RowParts, examples_in, find_parts
from llmtrain.data.chat.sample import Sample
from llmtrain.data.chat.sample_maker import OnPrompt, SampleMaker, conclude, samples_of
from llmtrain.data.chat.tally import Tally
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.chat.tokenizer import load_fast_tokenizer, tokenizer_folder_of
from llmtrain.data.chat.unused import Unused, add_unused, unused_line
from llmtrain.data.files.read import rows_of
from llmtrain.data.files.row_faults import RowFaults
from llmtrain.data.prepare.output import resolve_cache_dir
from llmtrain.errors import ConfigError
from llmtrain.screen import counted

log = logging.getLogger("llmtrain.data")

_OPTIONS = ("seq_len", "truncation", "supervise", "text_column", "on_error", "val_fraction")
"""Keys of ChatConfig that change what a row's samples are."""


class PreparedRows:
    """Tokenises the parts of a config's rows, or finds them tokenised in the cache."""

    def __init__(self, config: ChatConfig, template: ChatTemplate, parts: RowParts, *, num_workers: int) -> None:
        """`num_workers` processes tokenise where rows are many; 0: none."""
        self._config = config
        self._template = template
        self._num_workers = num_workers
        self._parts = parts
        self._prompts: ValidationPrompts | None = None

    def read(self, part: RowPart, *, tally: Tally, faults: RowFaults) -> Iterator[Sample]:
        """Yield the samples of a part, made now; what happens to the rows is counted as they are taken."""
        prompts = self._watched(part)
        on_prompt: OnPrompt | None = prompts.look_for if prompts else None
        maker = SampleMaker(self._template, self._config, part.select, wants_prompts=on_prompt is not None)
        return samples_of(
            partial(rows_of, part.sources),
            maker,
            tally=tally,
            faults=faults,
            on_prompt=on_prompt,
            num_workers=self._num_workers if part.are_many else 0,
        )

    def warnings(self, part: RowPart) -> tuple[str, ...]:
        """Return what is suspicious, after `read`: prompts of validation rows that are in the part as well."""
        warning = self._prompts.warning() if self._prompts and part in self._parts.training else None
        return (warning,) if warning else ()

    def ensure(self, part: RowPart) -> tuple[SampleStore, bool]:
        """Return the samples of a part in the cache, and whether they were made now. Logs what happened to the rows.

        Raises ConfigError with every fault of the rows by `file:line`, and where none is left.
        """
        tally, faults = Tally(), RowFaults()
        made = False

        def make() -> Iterator[Sample]:
            nonlocal made
            made = True
            yield from self.read(part, tally=tally, faults=faults)
            conclude(tally, faults, key=part.key, config=self._config)

        def account() -> Account:
            return _account_of(tally, faults, config=self._config, warnings=self.warnings(part))

        options = {name: getattr(self._config, name) for name in _OPTIONS}
        made_from = samples_key(part.sources, template=self._template, options={**options, "part": self._named(part)})
        folder = samples_folder(resolve_cache_dir(self._config.cache_dir), made_from)
        store = ensure_samples(folder, key=made_from, make=make, about=part.about, account=account)
        log.info("%s: %s %s", part.key, counted(len(store), "sample"), "made" if made else f"found in {folder}")
        for note in store.manifest.account.notes:
            log.info("%s: %s", part.key, note)
        for warning in store.manifest.account.warnings:
            log.warning("%s: %s", part.key, warning)
        return store, made

    def _named(self, part: RowPart) -> str:
        """Return what the samples depend on besides rows and options: the validation rows, for the warnings."""
        beside = self._parts.validation
        if part.select is not None or beside is None or part not in self._parts.training:
            return part.chosen
        return f"beside {samples_key(beside.sources, template=self._template, options={})['rows']}"

    def _watched(self, part: RowPart) -> ValidationPrompts | None:
        """Return the prompts of the validation rows, if they have to be looked for among the rows of `part`.

        Those that were held out by their hash cannot be there.
        """
        beside = self._parts.validation
        if beside is None or beside.select is not None or part not in self._parts.training:
            return None
        self._prompts = prompts = ValidationPrompts()
        # Rows with faults are skipped here: reading the validation part reports them.
        for example, source in examples_in(beside.sources, self._config):
            prompts.add(prompt_hash(example), source)
        return prompts


def _account_of(tally: Tally, faults: RowFaults, *, config: ChatConfig, warnings: tuple[str, ...]) -> Account:
    lines = tally.lines(seq_len=config.seq_len, truncation=config.truncation)
    left_out = f"{counted(faults.count, 'row is', 'rows are')} left out (data.on_error: skip):"
    of_faults = ("\n  ".join([left_out, *faults.lines()]),) if faults.count else ()
    return Account(rows=tally.rows, notes=tuple(lines), warnings=(*of_faults, *warnings), unused=tally.unused)


def warn_of(parts: RowParts, stores: Iterable[SampleStore]) -> None:
    """Log what concerns the rows of all parts together: that none is held out, and what of them is not used."""
    unused: dict[str, Unused] = {}
    for store in stores:
        add_unused(unused, store.manifest.account.unused)
    for warning in filter(None, (parts.not_divided, unused_line(unused))):
        log.warning("%s", warning)


def prepare_rows(config: Config, *, num_workers: int = 0) -> dict[str, Any]:
    """Tokenise the rows of `config`, or find it done for these rows, tokenizer, template and options.

    `num_workers` processes do it where rows are many. Returns what there is now. Raises ConfigError with every fault of
    the rows by `file:line`, where none is left, and for a `prepare` section, which is for text; RunError when the disk
    is full.
    """
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
    prepared = PreparedRows(rows, template, parts, num_workers=num_workers)
    ensured = [(part, *prepared.ensure(part)) for part in parts.all]
    warn_of(parts, [store for _, store, _ in ensured])
    made = [_described(part, store, made_now) for part, store, made_now in ensured]
    counts = ("rows", "samples", "tokens", "supervised_tokens")
    return {
        "cache": str(resolve_cache_dir(rows.cache_dir)),
        "tokenizer": str(folder),
        **{name: sum(one[name] for one in made) for name in counts},
        "made_now": any(one["made_now"] for one in made),
        "parts": made,
        "seconds": round(time.perf_counter() - began, 2),
    }


def _described(part: RowPart, store: SampleStore, made_now: bool) -> dict[str, Any]:
    found = store.manifest
    return {
        "key": part.key,
        "paths": [source.name for source in part.sources],
        "folder": str(store.folder),
        "made_now": made_now,
        "rows": found.account.rows,
        "samples": found.samples,
        "tokens": found.tokens,
        "supervised_tokens": found.supervised_tokens,
        "notes": list(found.account.notes),
        "warnings": list(found.account.warnings),
    }
