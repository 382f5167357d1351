"""Turns what `inspect` found into blocks: token shards, rows by themselves, and the rows of a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmtrain.cli.output import named_values
from llmtrain.cli.step_blocks import quality_blocks
from llmtrain.reports.analysis_pictures import length_label
from llmtrain.reports.blocks import Bars, Block, Lines, Passage, Span, Table, Values
from llmtrain.screen import counted

_SHARD_VALUES = (
    ("data", "data"),
    ("split", "split"),
    ("tokenizer", "tokenizer"),
    ("end token", "end_token"),
    ("documents", "documents"),
    ("tokens", "tokens"),
    ("bytes a token", "bytes_per_token"),
    ("vocabulary", "vocab_size"),
    ("tokens that occur", "tokens_that_occur"),
)


def blocks_of_shards(result: Mapping[str, Any]) -> Iterator[Block]:
    """Yield the report on token shards: documents, lengths, sources, windows, the first documents and sequences."""
    yield named_values(result, _SHARD_VALUES)
    if result["row_groups_read"] < result["row_groups"]:
        read, there = result["row_groups_read"], result["row_groups"]
        yield Lines(f"what follows is from {read} of {there:,} row groups, evenly spaced", ())
    if result["faults"]:
        yield Lines("faults", result["faults"], "fault")
    yield _bars(result["lengths"], "tokens", "documents")
    rows = [(row["source"], f"{row['documents']:,}", f"{row['tokens']:,}", row["share"]) for row in result["sources"]]
    yield Table("sources", ("", "documents", "tokens", "share"), [(*row[:3], f"{row[3]:.1%}") for row in rows])
    yield from _mixture(result)
    if result["windows"]:
        yield _windows(result["windows"])
    for number, document in enumerate(result["first_documents"]):
        caption = f"document {number}: {document['source']}, {counted(document['tokens'], 'token')}"
        yield Passage(caption, [(None, [Span(document["text"])])])
    yield from map(_item, result["items"])
    yield from quality_blocks(result["quality"])


def blocks_of_rows(result: Mapping[str, Any]) -> Iterator[Block]:
    """Yield the report on rows without a config: shapes, lengths in characters and bytes, first rows, faults."""
    values = [("rows", f"{result['rows']:,}")]
    if result["bytes"] is not None:
        values.append(("bytes of text", f"{result['bytes']['total']:,} (longest row {result['bytes']['longest']:,})"))
        values.append(("characters", f"{result['characters']['total']:,}"))
    values.append(("rows with faults", f"{len(result['faults']):,}"))
    yield Values(values)
    if len(result["files"]) > 1:
        rows = [(file["name"], f"{file['rows']:,}", f"{file['faults']:,}") for file in result["files"]]
        yield Table("files", ("", "rows", "faults"), rows)
    yield _layouts([(file["name"], file["layout"]) for file in result["files"]])
    yield from _shapes(result["shapes"])
    if result["characters"] is not None:
        yield _bars(result["characters"], "characters", "rows")
    yield from _unused(result["unused"], "beside the shape, which training does not use")
    for row in result["first_rows"]:
        caption = f"{row['source']}: {row['shape']}, {row['characters']:,} characters"
        yield Passage(caption, [(piece["role"], [Span(_excerpt(piece["text"]))]) for piece in row["pieces"]])
    yield from _faults(result["faults"], stop_a_run=True)


def blocks_of_texts(result: Mapping[str, Any]) -> Iterator[Block]:
    """Yield what was found in text: files, the first documents, what cannot be read. Its analysis is for others."""
    values = [("files", f"{result['files']:,}"), ("bytes of files", f"{result['bytes_of_files']:,}")]
    values.append(("counted in", f"tokens of {result['tokenizer']}" if result["tokenizer"] else "words"))
    yield Values(values)
    for document in result["first_documents"]:
        caption = f"{document['source']}: {document['characters']:,} characters"
        yield Passage(caption, [(None, [Span(document["text"])])])
    yield from _faults(result["faults"], stop_a_run=True)
    if result["num_faults"] > len(result["faults"]):
        yield Lines(f"and {result['num_faults'] - len(result['faults']):,} more faults", (), "fault")


def blocks_of_chat(result: Mapping[str, Any], *, split: str) -> Iterator[Block]:
    """Yield the report on the rows of a config: counts and faults of both splits, lengths and rows of one."""
    yield Values([("tokenizer", result["tokenizer"]), ("template", result["template"])])
    shown = [(name, result[key]) for name, key in (("training", "train"), ("validation", "val")) if result[key]]
    values = [dict(_chat_values(part)) for _, part in shown]
    yield Table(
        f"rows, cut to data.seq_len {result['seq_len']:,} (truncation: {result['truncation']}; supervise: "
        f"{result['supervise']})",
        ("", *(name for name, _ in shown)),
        [(label, *(one.get(label, "") for one in values)) for label in values[0]],
    )
    yield from _mixture(result)
    part = result[split]
    yield _layouts(list(zip(part["paths"], part["layouts"], strict=True)))
    yield from _shapes(part["shapes"])
    if part["lengths"] is not None:
        yield _bars(part["lengths"], "tokens", "rows", before=" before cutting")
    yield from _unused(part["unused"], "neither shown to the model nor used otherwise")
    if result["notes"]:
        yield Lines("notes", result["notes"])
    for row in part["first_rows"]:
        caption = f"{row['source']}: {counted(row['tokens'], 'token')}, {row['supervised_tokens']:,} learned"
        yield Passage(caption, [(None, [Span(**piece) for piece in row["pieces"]])])
    if result["warnings"]:
        yield Lines("warnings", result["warnings"], "warning")
    yield from _faults(result["faults"], stop_a_run=result["faults_stop_a_run"])


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if total else f"{count:,}"


def _chat_values(part: Mapping[str, Any]) -> list[tuple[str, str]]:
    packs = part["packs"] or {}
    values = [
        ("rows", f"{part['rows']:,}"),
        ("rows with faults", f"{part['rows_with_faults']:,}"),
        ("rows that are cut", f"{part['rows_cut']:,}"),
        ("rows left out as too long", f"{part['rows_left_out']:,}"),
        ("samples", f"{part['samples']:,}"),
        ("tokens kept", f"{part['tokens']:,}"),
        ("tokens cut", _share(part["tokens_cut"], part["tokens_before_cutting"])),
        ("tokens that are learned", _share(part["supervised_tokens"], part["tokens"])),
        ("learned tokens cut", f"{part['supervised_tokens_cut']:,}"),
        ("packs", f"{packs['packs']:,}" if packs else "no packing"),
    ]
    if packs.get("efficiency") is not None:
        values.append(("positions of packs filled", f"{packs['efficiency']:.1%}"))
    return values


def _layouts(files: Sequence[tuple[str, str]]) -> Block:
    by_layout: dict[str, list[str]] = {}
    for name, layout in files:
        by_layout.setdefault(layout, []).append(name)
    more = {layout: f" and {len(names) - 1:,} more" if len(names) > 1 else "" for layout, names in by_layout.items()}
    return Lines("read as", [f"{layout}: {names[0]}{more[layout]}" for layout, names in by_layout.items()])


def _shapes(shapes: Mapping[str, int]) -> Iterator[Block]:
    if shapes:
        yield Bars("rows by shape", list(shapes.items()))


def _bars(lengths: Mapping[str, Any], unit: str, counted: str, *, before: str = "") -> Bars:
    note = (
        f"shortest {lengths['shortest']:,}, median {lengths['median']:,}, mean {lengths['mean']:,.0f}, 90 % up to "
        f"{lengths['p90']:,}, 99 % up to {lengths['p99']:,}, longest {lengths['longest']:,}"
    )
    rows = [(length_label(row), row[counted]) for row in lengths["histogram"]]
    return Bars(f"lengths in {unit}{before}", rows, note)


def _windows(windows: Mapping[str, Any]) -> Lines:
    apart = "cannot attend to each other" if windows["documents_apart"] else "can attend to each other"
    return Lines(
        f"windows: {counted(windows['items'], 'sequence')} of {counted(windows['seq_len'], 'token')}; documents in "
        f"one {apart}",
        [
            f"{counted(windows['documents_cut'], 'document')} ({windows['share_cut']:.1%}) cut by a window's end; "
            "no token "
            f"is left out, {windows['padding']:,} positions are padding"
        ],
    )


def _mixture(result: Mapping[str, Any]) -> Iterator[Block]:
    if result["mixture"]:
        yield Table(
            "mixture",
            ("", "tokens", "share of sequences", "passes an epoch"),
            [
                (row["path"], f"{row['tokens']:,}", f"{row['share']:.2%}", f"{row['passes_an_epoch']:.3g}")
                for row in result["mixture"]
            ],
        )
        yield mixture_table(
            "the first epoch of the mixture",
            [{**row["first_epoch"], "source": row["path"]} for row in result["mixture"]],
        )
    if result["stages"]:
        yield Lines("later stages of the mixture, by sequences", [_stage(stage) for stage in result["stages"]])
    if result["changes"]:
        yield changes_lines(result["changes"])


def _stage(stage: Mapping[str, Any]) -> str:
    return f"from {stage['begins']}: " + ", ".join(f"{name} {share:.2%}" for name, share in stage["shares"].items())


def mixture_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return what the sources of a mixture come to (`data.mixture_report.source_rows`)."""
    return Table(
        title,
        ("", f"share of {rows[0]['by']}", "asked", "sequences", "epochs"),
        [
            (
                row["source"],
                f"{row['share']:.2%}",
                f"{row['asked']:.2%}",
                f"{row['sequences']:,}",
                f"{row['epochs']:.3g}",
            )
            for row in rows
        ],
    )


def changes_lines(changes: Sequence[Mapping[str, Any]]) -> Lines:
    """Return where the shares of a mixture change."""
    return Lines("the mixture changes", [f"sequence {change['sequence']:,}: {change['what']}" for change in changes])


def _item(item: Mapping[str, Any]) -> Passage:
    padding = f", {item['padding']:,} of padding" if item["padding"] else ""
    sections = []
    for piece in item["documents"]:
        begins = "goes on" if piece["begins_before"] else "begins"
        ends = "ends" if piece["ends"] else "is cut"
        sections.append((f"a document {begins} and {ends}, {counted(piece['tokens'], 'token')}", [Span(piece["text"])]))
    return Passage(
        f"sequence {item['item']:,}: window {item['window']:,} of source {item['source']}, epoch {item['epoch']}, "
        f"{counted(item['supervised_tokens'], 'token')} to predict{padding}",
        sections,
    )


def _unused(unused: Mapping[str, Mapping[str, Any]], what: str) -> Iterator[Block]:
    if unused:
        rows = [(name, f"{count['rows']:,}", count["first"]) for name, count in unused.items()]
        yield Table(what, ("", "rows", "the first"), rows)


def _faults(faults: Sequence[Mapping[str, str]], *, stop_a_run: bool) -> Iterator[Block]:
    if faults:
        what = "" if stop_a_run else ", whose rows are left out (data.on_error: skip)"
        noun = "fault" if len(faults) == 1 else "faults"
        lines = [f"{fault['source']}: {fault['message']}" for fault in faults]
        yield Lines(f"{len(faults):,} {noun}{what}", lines, "fault")


def _excerpt(text: str, *, shown: int = 1200) -> str:
    if len(text) <= shown:
        return text
    head, tail = text[: shown * 3 // 4], text[-shown // 4 :]
    return f"{head}\n[… {len(text) - len(head) - len(tail):,} characters …]\n{tail}"
