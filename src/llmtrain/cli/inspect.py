"""inspect: shows the data that a run would read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmtrain.cli.options import ConfigOption, Json, Overrides, local, read_config_or_run
from llmtrain.cli.output import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from llmtrain.data.inspection.analysis_options import AnalysisOptions
    from llmtrain.reports.blocks import Block
    from llmtrain.verbs.inspect import Inspection

FAULTS = 2
"""Exit code for rows with faults that would stop a run."""
Word = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG|RUN|ROWS|SHARDS|TEXT",
        help="A config, a run; a file, folder or glob of rows (.jsonl, .json, .csv, .parquet, dataset) or of text; "
        "token shards.",
    ),
]
NumRows = Annotated[int | None, typer.Option("--num-rows", metavar="N", min=0, help="Show the first N rows (3).")]
NumDocuments = Annotated[
    int | None,
    typer.Option("--num-documents", metavar="N", min=0, help="Show the first N documents of shards or text (3)."),
]
NumItems = Annotated[
    int | None,
    typer.Option("--num-items", metavar="N", min=0, help="Show the first N sequences of a run on shards (2)."),
]
Split = Annotated[Literal["train", "val"] | None, typer.Option("--split", help="Training or validation data (train).")]
Html = Annotated[
    str | None,
    typer.Option("--html", metavar="FILE", callback=local, help="Also write the report as a page, with --analyse."),
]
Png = Annotated[
    str | None,
    typer.Option("--png", metavar="FOLDER", callback=local, help="Also write its pictures as PNG, with --analyse."),
]
Analyse = Annotated[
    bool,
    typer.Option("--analyse", help="Add frequencies, bigrams, compression, duplicates, languages and sources."),
]
SampleShare = Annotated[
    float | None,
    typer.Option("--sample", metavar="SHARE", help="Analyse this share of the blocks, such as 0.01, or 1 for all."),
]
SampleSeed = Annotated[
    int | None, typer.Option("--sample-seed", metavar="N", help="Draw another sample of the same size (0).")
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="NAME",
        callback=local,
        help="Count tokens of rows or text by it, not words: folder or Hub.",
    ),
]
NumListed = Annotated[
    int | None,
    typer.Option("--num-listed", metavar="N", min=1, help="List the N first tokens and pairs in --json (100)."),
]


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("inspect")(inspect)


def inspect(
    word: Word = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    num_rows: NumRows = None,
    num_documents: NumDocuments = None,
    num_items: NumItems = None,
    split: Split = None,
    html: Html = None,
    png: Png = None,
    analyse: Analyse = False,
    sample: SampleShare = None,
    sample_seed: SampleSeed = None,
    tokenizer: TokenizerName = None,
    num_listed: NumListed = None,
    json: Json = False,
) -> Outcome:
    """Show the data that a run would read.

    It shows rows or documents, their lengths, the tokens that the loss counts, and how many are cut off. For rows with
    faults the exit code is 2, and each fault has its file:line. Of a large corpus a sample is analysed.
    """
    from llmtrain.verbs.inspect import inspect as verb

    ref, values = read_config_or_run(word, overrides, config)
    wants = analyse or any(option is not None for option in (html, png, sample, sample_seed, tokenizer, num_listed))
    if png is not None:
        from llmtrain.reports.analysis_pictures import require_png

        require_png()  # before a corpus is read
    found = verb(
        ref,
        values,
        is_config=config is not None,
        split=split,
        num_rows=num_rows,
        num_documents=num_documents,
        num_items=num_items,
        analyse=_options(sample, sample_seed, tokenizer, num_listed) if wants else None,
    )
    blocks, pictures = list(_blocks_of(found, split=split or "train")), {}
    if "analysis" in found.report:
        pictures = _add_analysis(blocks, found)
    if html is not None:
        _write_page(html, title=str(found.report["name"]), blocks=blocks)
    if png is not None:
        found.report["pictures"] = _write_pictures(png, pictures)
    return Outcome(found.report, blocks, FAULTS if found.has_faults else 0)


def _options(share: float | None, seed: int | None, tokenizer: str | None, num_listed: int | None) -> AnalysisOptions:
    from llmtrain.data.inspection.analysis_options import NUM_LISTED, AnalysisOptions
    from llmtrain.errors import ConfigError

    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"--sample is {share:g}, but it is a share of the corpus: more than 0, and at most 1")
    return AnalysisOptions(share, seed or 0, tokenizer, num_listed or NUM_LISTED)


def _add_analysis(blocks: list[Block], found: Inspection) -> dict[str, str]:
    """Add the blocks of the analysis, and return its pictures."""
    from llmtrain.cli.analysis_blocks import blocks_of_analysis
    from llmtrain.reports.analysis_pictures import analysis_pictures

    analysis = found.report["analysis"]
    pictures = analysis_pictures(analysis)
    blocks += blocks_of_analysis(
        analysis, pictures, shown_before=("lengths", "sources", "bytes") if found.kind == "tokens" else ()
    )
    return pictures


def _write_pictures(folder: str, pictures: Mapping[str, str]) -> list[str]:
    from pathlib import Path

    from llmtrain.reports.analysis_pictures import write_pngs

    return write_pngs(Path(folder), pictures)


def _write_page(path: str, *, title: str, blocks: Sequence[Block]) -> None:
    from pathlib import Path

    from llmtrain.atomic import write_text
    from llmtrain.errors import ConfigError
    from llmtrain.reports.block_page import block_page

    try:
        write_text(Path(path), block_page(title=title, blocks=blocks))
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written ({error.strerror or error})") from error


def _blocks_of(found: Inspection, *, split: str) -> Iterable[Block]:
    from llmtrain.cli.inspect_blocks import blocks_of_chat, blocks_of_rows, blocks_of_shards, blocks_of_texts

    if found.kind == "chat":
        return blocks_of_chat(found.report, split=split)
    if found.kind == "texts":
        return blocks_of_texts(found.report)
    return blocks_of_rows(found.report) if found.kind == "rows" else blocks_of_shards(found.report)
