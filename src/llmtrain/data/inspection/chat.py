"""Inspection of a config with rows: what a run would read and learn, before any training; the tokenizer is enough.

    config ─ find_parts ─▶ samples of each part ─▶ counts, lengths, packs, the first rows, every fault

It makes the same samples as `prepare` and `train`, and keeps none of them. Rows without a config are in rows.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import numpy as np

from llmtrain.config.loading.load import LoadedConfig
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.data.chat.packing import Packs, pack
from llmtrain.data.chat.parts import RowPart, RowParts, find_parts
from llmtrain.data.chat.prepare_rows import PreparedRows
from llmtrain.data.chat.sample import Sample
from llmtrain.data.chat.sample_maker import none_left
from llmtrain.data.chat.tally import Tally
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.chat.tokenizer import load_fast_tokenizer, tokenizer_folder_of
from llmtrain.data.files.read import layout_of
from llmtrain.data.files.row_faults import RowFaults
from llmtrain.data.inspection.analysis import Analysis
from llmtrain.data.inspection.analysis_options import AnalysisOptions
from llmtrain.data.inspection.block_sample import BlockSample
from llmtrain.data.inspection.document_batches import SampleBatches
from llmtrain.data.inspection.lengths import describe_lengths
from llmtrain.data.inspection.mixture import describe_mixture
from llmtrain.data.inspection.pieces import pieces_of
from llmtrain.data.inspection.units import TokenVocabulary
from llmtrain.data.mixture import Amount, Mixture

Split = Literal["train", "val"]


def inspect_chat(
    loaded: LoadedConfig,
    *,
    num_rows: int = 3,
    num_workers: int = 0,
    analyse: AnalysisOptions | None = None,
    split: Split = "train",
) -> dict[str, Any]:
    """Describe the rows of a config, for training and for validation. All faults are part of the report.

    `analyse` adds the analysis of the samples of `split`, cut as a run sees them. Raises ConfigError where there is
    nothing to read, or the tokenizer cannot be had.
    """
    config = loaded.config.data
    assert isinstance(config, ChatConfig)
    folder = tokenizer_folder_of(loaded.config)
    template = ChatTemplate(load_fast_tokenizer(folder), file=config.chat_template)
    parts = find_parts(config)
    prepared = PreparedRows(config, template, parts, num_workers=num_workers)
    batches = _batches(template, analyse) if analyse else None
    training, validation = (
        [
            _read(part, prepared, config, template, num_rows=num_rows, batches=batches if split == name else None)
            for part in found
        ]
        for name, found in (("train", parts.training), ("val", [parts.validation] if parts.validation else []))
    )
    everything = [*training, *validation]
    warnings = [parts.not_divided, *(warning for one in everything for warning in one.warnings)]
    faults = {(fault.source, fault.message): None for one in everything for fault in one.faults.kept}
    if config.val_fraction:  # both parts are of the same files
        faults = dict.fromkeys(sorted(faults, key=lambda fault: _place(fault[0])))
    return {
        "name": loaded.source,
        "tokenizer": str(folder),
        "template": template.origin,
        "seq_len": config.seq_len,
        "truncation": config.truncation,
        "supervise": config.supervise,
        "packing": config.packing,
        "train": _described(training, config, num_rows=num_rows),
        "val": _described(validation, config, num_rows=num_rows) if validation else None,
        **describe_mixture(
            _mixture(training, parts, config, seed=loaded.config.run.seed), [one.tokens for one in training]
        ),
        "notes": _distinct(note for one in everything for note in one.notes),
        "warnings": _distinct(filter(None, warnings)),
        "faults": [{"source": source, "message": message} for source, message in faults],
        "faults_stop_a_run": config.on_error == "fail",
        "would_run": not (faults and config.on_error == "fail") and all(one.kept for one in everything),
        **({"analysis": batches.report()} if batches else {}),
    }


def _batches(template: ChatTemplate, options: AnalysisOptions) -> SampleBatches:
    """Return what takes samples to the analysis that is asked for."""
    backend = template.tokenizer.backend_tokenizer
    decode = partial(backend.decode, skip_special_tokens=False)
    vocabulary = TokenVocabulary(len(template.tokenizer), decode=decode, name_of=backend.id_to_token)
    sample = BlockSample(1.0 if options.share is None else options.share, options.seed)
    return SampleBatches(Analysis(vocabulary, sample, num_listed=options.num_listed), decode)


class _Part:
    """Counts and first rows of a part of the rows."""

    def __init__(self, part: RowPart) -> None:
        self.part = part
        self.tally = Tally()
        self.faults = RowFaults(max_kept=None)
        self.kept: Counter[int] = Counter()
        """Tokens of a sample as a run sees it -> number of samples of that length."""
        self.first_rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(length * count for length, count in self.kept.items())


def _read(
    part: RowPart,
    prepared: PreparedRows,
    config: ChatConfig,
    template: ChatTemplate,
    *,
    num_rows: int,
    batches: SampleBatches | None,
) -> _Part:
    found = _Part(part)
    for sample in prepared.read(part, tally=found.tally, faults=found.faults):
        found.kept[len(sample.input_ids)] += 1
        if batches is not None:
            batches.add(sample)
        if len(found.first_rows) < num_rows:
            found.first_rows.append(_shown(sample, template))
    lines = found.tally.lines(seq_len=config.seq_len, truncation=config.truncation)
    found.notes = [f"{part.key}: {line}" for line in lines[1:]]  # the first one repeats the counts
    found.warnings = [f"{part.key}: {warning}" for warning in prepared.warnings(part)]
    if not found.kept:
        found.warnings.append(none_left(found.tally, key=part.key))
    return found


def _shown(sample: Sample, template: ChatTemplate) -> dict[str, Any]:
    return {
        "source": sample.source,
        "tokens": len(sample.input_ids),
        "supervised_tokens": int(sample.supervised.sum()),
        "pieces": [piece._asdict() for piece in pieces_of(sample, template.tokenizer)],
    }


def _described(parts: list[_Part], config: ChatConfig, *, num_rows: int) -> dict[str, Any]:
    tally, kept = Tally(), Counter[int]()
    for one in parts:
        tally.add(one.tally)
        kept.update(one.kept)
    return {
        "paths": [source.name for one in parts for source in one.part.sources],
        "layouts": [layout_of(source) for one in parts for source in one.part.sources],
        "rows": tally.rows,
        "rows_with_faults": sum(one.faults.count for one in parts),
        "shapes": dict(tally.shapes.most_common()),
        "samples": tally.samples,
        "tokens": tally.tokens,
        "supervised_tokens": tally.supervised_tokens,
        "share_supervised": tally.supervised_tokens / tally.tokens if tally.tokens else None,
        "rows_cut": tally.rows_cut,
        "rows_left_out": tally.rows_dropped,
        "turns_left_out": tally.turns_left_out,
        "unused": {name: unused._asdict() for name, unused in tally.unused.items()},
        "tokens_before_cutting": sum(length * count for length, count in tally.lengths.items()),
        "tokens_cut": tally.tokens_cut,
        "supervised_tokens_cut": tally.supervised_tokens_cut,
        "lengths": describe_lengths(tally.lengths),
        "packs": _packs(parts, config),
        "first_rows": [row for one in parts for row in one.first_rows][:num_rows],
    }


def _mixture(training: list[_Part], parts: RowParts, config: ChatConfig, *, seed: int) -> Mixture | None:
    """Return the mixture of the training rows; None where there is none, or a source of it has no row."""
    if parts.mixture is None or not all(one.kept for one in training):
        return None
    samples = [one.kept.total() for one in training]
    amounts = [Amount(one.tokens, count) for one, count in zip(training, samples, strict=True)]
    sequences = [len(_packed(one, config).num_tokens) for one in training] if config.packing else samples
    return Mixture(parts.mixture, sequences, seed=seed, amounts=amounts)


def _packed(part: _Part, config: ChatConfig) -> Packs:
    return pack(np.repeat(list(part.kept), list(part.kept.values())), config.seq_len)


def _packs(parts: list[_Part], config: ChatConfig) -> dict[str, Any] | None:
    """Describe the packs of an epoch; each source's rows are packed by themselves. None without packing."""
    if not config.packing:
        return None
    packs = [_packed(one, config) for one in parts if one.kept]
    num_packs = sum(len(one.num_tokens) for one in packs)
    num_tokens = sum(int(one.num_tokens.sum()) for one in packs)
    return {
        "packs": num_packs,
        "efficiency": num_tokens / (num_packs * config.seq_len) if num_packs else None,
        "rows_a_pack": sum(one.kept.total() for one in parts) / num_packs if num_packs else None,
    }


def _place(source: str) -> tuple[str, int]:
    """Return the file and the line, for sorting."""
    file, _, line = source.rpartition(":")
    number = line.partition(" ")[0]
    return (file, int(number)) if number.isdecimal() else (source, 0)


def _distinct(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))
