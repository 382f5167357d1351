"""Turns the analysis of a corpus into blocks: each part as a picture on a page, and in words on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from llmtrain import screen
from llmtrain.reports.analysis_pictures import length_label, ratio_label
from llmtrain.reports.bigram_picture import shown_token
from llmtrain.reports.blocks import Bars, Block, Passage, Picture, Span, Table, Values

SHOWN = 10
"""Tokens, pairs, sources and languages that a table shows; --json has all that are listed."""
LONGEST_LABEL = 20


def blocks_of_analysis(
    analysis: Mapping[str, Any], pictures: Mapping[str, str], *, shown_before: Collection[str] = ()
) -> Iterator[Block]:
    """Yield the parts of an analysis. `shown_before` names parts that the report has already shown."""
    yield _sample(analysis)
    if not analysis["documents"]:
        return
    if "lengths" not in shown_before:
        yield _lengths(analysis, pictures["lengths"])
    if analysis["frequencies"]:
        yield from _frequencies(analysis, pictures)
    if analysis["bigrams"]:
        yield from _bigrams(analysis["bigrams"], analysis["unit"], pictures["bigrams"])
    yield from _compression(analysis, pictures.get("compression"), shows_bytes="bytes" not in shown_before)
    yield from _duplicates(analysis["duplicates"], is_all=analysis["sample"]["is_all"])
    yield _languages(analysis["languages"], pictures.get("languages"))
    if "sources" not in shown_before and len(analysis["sources"]) > 1:
        yield _sources(analysis, pictures["sources"])
    if len(analysis["shards"]) > 1:
        yield _shards(analysis["shards"])


def _sample(analysis: Mapping[str, Any]) -> Values:
    sample, unit = analysis["sample"], analysis["unit"]
    size = f"{_documents(analysis['documents'])}, {(analysis['lengths'] or {'total': 0})['total']:,} {unit}"
    if sample["is_all"]:
        return Values([("analysed", f"all: {size}")])
    read, there = sample["blocks_analysed"], sample["blocks"]
    how = f"{read:,} of {there:,} blocks ({read / there:.2%}, seed {sample['seed']})"
    return Values([("analysed", f"a sample: {size}"), ("sample", how)])


def _lengths(analysis: Mapping[str, Any], picture: str) -> Picture:
    lengths, unit = analysis["lengths"], analysis["unit"]
    note = (
        f"shortest {lengths['shortest']:,}, median {lengths['median']:,}, mean {lengths['mean']:,.0f} ± "
        f"{lengths['std']:,.0f}, 90 % up to {lengths['p90']:,}, 99 % up to {lengths['p99']:,}, longest "
        f"{lengths['longest']:,}"
    )
    bars = Bars(f"documents by {unit}", [(length_label(row), row["rows"]) for row in lengths["histogram"]], note)
    return Picture(f"lengths in {unit}", picture, bars, note)


def _frequencies(analysis: Mapping[str, Any], pictures: Mapping[str, str]) -> Iterator[Block]:
    found, unit = analysis["frequencies"], analysis["unit"]
    covering = ", ".join(f"{share.replace('%', ' %')} by {number:,}" for share, number in found["covering"].items())
    occur = f"{found['distinct']:,}"
    if analysis["vocabulary_size"]:
        size = analysis["vocabulary_size"]
        occur += f" of {size:,} ({found['distinct'] / size:.1%})"
    values = [
        (f"different {unit}", occur),
        ("occur once", f"{found['once']:,}"),
        ("text covered", covering),
        ("entropy", f"{found['entropy_bits']:.2f} bits"),
        ("Zipf", _zipf(found["zipf"])),
    ]
    if analysis["words_not_told_apart"]:
        values.append(("not told apart", f"{analysis['words_not_told_apart']:,} rarer words, counted together"))
    yield Values(values)
    ranks = [(f"{point['rank']:,}", f"{point['count']:,}") for point in found["curve"]]
    few = Table(f"occurrences of {unit} by rank", ("rank", "occurrences"), ranks[:: max(1, len(ranks) // SHOWN)])
    yield Picture(
        f"occurrences of {unit} by rank", pictures["zipf"], few, "The line is Zipf's law." if found["zipf"] else ""
    )
    rows = [(_label(row["token"]), f"{row['count']:,}", f"{row['share']:.2%}") for row in found["top"][:SHOWN]]
    yield Table(f"most frequent {unit}", ("", "occurrences", "share"), rows)
    if "token-ids" in pictures:
        bars = Bars("vocabulary by occurrences", [(length_label(row), row["tokens"]) for row in found["by_count"]])
        yield Picture("occurrences by token id", pictures["token-ids"], bars, "Each dot is the mean of a band of ids.")


def _zipf(fit: Mapping[str, Any] | None) -> str:
    if fit is None:
        return "too few frequent ones to fit"
    explained = "" if fit["explained"] is None else f", {fit['explained']:.1%} of the variance explained"
    return f"occurrences ∝ rank^-{fit['exponent']:.2f} up to rank {fit['last_rank']:,}{explained}"


def _bigrams(found: Mapping[str, Any], unit: str, picture: str) -> Iterator[Block]:
    kept = f"{found['edges']:,}"
    if found["count_too_low_by_at_most"]:
        kept += (
            f" most frequent ones, {found['covered']:.1%} of all transitions; rarer ones are left out, and a count "
            f"may be too low by {found['count_too_low_by_at_most']:,}"
        )
    yield Values([(f"{unit} in the graph", f"{found['tokens']:,}"), ("pairs", kept)])
    rows = [(f"{_label(row['from'])} → {_label(row['to'])}", f"{row['count']:,}") for row in found["top"][:SHOWN]]
    table = Table("most frequent pairs", ("", "occurrences"), rows)
    note = (
        f"The {len(found['drawn']['tokens'])} {unit} with the most transitions, and the most frequent pairs among "
        "them. Thicker arrows are more frequent."
    )
    yield Picture("bigrams", picture, table, note)
    names = {
        "pagerank": "PageRank",
        "in_degree_centrality": "in-degree",
        "out_degree_centrality": "out-degree",
        "betweenness_centrality": "betweenness",
        "closeness_centrality": "closeness",
    }
    values = [
        (name, ", ".join(f"{_label(row['token'])} {row['score']:.3g}" for row in found["centrality"][key][:5]))
        for key, name in names.items()
        if found["centrality"][key]
    ]
    among = f"among the {found['path_tokens']:,} {unit} with the most transitions"
    yield Values([("most central", f"betweenness and closeness {among}"), *values])


def _compression(analysis: Mapping[str, Any], picture: str | None, *, shows_bytes: bool) -> Iterator[Block]:
    found = analysis["compression"]
    values = []
    if shows_bytes and analysis["bytes_per_unit"] is not None:
        values.append((f"bytes a {analysis['unit'][:-1]}", f"{analysis['bytes_per_unit']:.3f}"))
    if found:
        values.append(
            (
                "compression",
                f"{found['ratio']:.2f} (zlib: {found['bytes']:,} bytes in {found['compressed_bytes']:,}), over the "
                f"beginnings of {_documents(found['excerpts'])}",
            )
        )
    if values:
        yield Values(values)
    if found and picture:
        bars = Bars(
            "documents by compression ratio", [(ratio_label(row), row["excerpts"]) for row in found["histogram"]]
        )
        yield Picture("compression", picture, bars, "A document with a high ratio repeats itself.")
        rows = [(f"{row['document']}: ratio {row['ratio']:.1f}", row["text"]) for row in found["most_repetitive"][:3]]
        yield _passage("documents that repeat themselves most", rows)


def _duplicates(found: Mapping[str, Any], *, is_all: bool) -> Iterator[Block]:
    share = found["share_of_texts_counted"]
    counted = "" if share == 1 else f", counted over {share:.3%} of all texts"
    seen = "" if is_all else "; copies outside of the sample are not seen"
    exact = f"{_documents(found['duplicates'])} ({found['share']:.2%}) with a text that came before{counted}{seen}"
    values = [("exact duplicates", exact)]
    if found["repeated_texts"]:
        most = f"{found['repeated_texts']:,}, the most frequent one {found['most_copies']:,} times"
        values.append(("repeated texts", most))
    values.append(("near-duplicates", f"not measured: {found['near']['not_measured']}"))
    yield Values(values)
    if found["most_repeated"]:
        rows = [(f"{row['document']}: {row['copies']:,} times", row["text"]) for row in found["most_repeated"][:3]]
        yield _passage("texts that occur more than once", rows)


def _languages(found: Mapping[str, Any], picture: str | None) -> Block:
    if picture is None:
        return Values([("languages", f"not measured: {found.get('not_measured', 'no document has enough text')}")])
    rows = [(row["language"], row["excerpts"]) for row in found["by_language"][:SHOWN]]
    short = f" ({found['too_short']:,} others are too short)" if found["too_short"] else ""
    note = f"told by the beginnings of {_documents(found['excerpts'])}{short}; source code is often misjudged"
    return Picture("languages", picture, Bars("documents by language", rows, note), note)


def _sources(analysis: Mapping[str, Any], picture: str) -> Picture:
    unit, rows = analysis["unit"], analysis["sources"]
    cells = [
        (row["source"], f"{row['documents']:,}", f"{row['length']:,}", f"{row['share']:.1%}") for row in rows[:SHOWN]
    ]
    more = f" (the {SHOWN} largest of {len(rows):,})" if len(rows) > SHOWN else ""
    return Picture("sources", picture, Table(f"sources{more}", ("", "documents", unit, "share"), cells))


def _shards(shards: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        (row["file"], f"{row['documents']:,}", f"{row['total']:,}", f"{row['median']:,}", f"{row['longest']:,}")
        for row in shards[:SHOWN]
    ]
    more = f" (the first {SHOWN} of {len(shards):,})" if len(shards) > SHOWN else ""
    return Table(f"shards{more}", ("", "documents", "tokens", "median", "longest"), cells, ("longest", "median"))


def _passage(caption: str, rows: Sequence[tuple[str, str]]) -> Passage:
    return Passage(caption, [(heading, [Span(text)]) for heading, text in rows])


def _documents(number: int) -> str:
    return screen.counted(number, "document")


def _label(token: str) -> str:
    return shown_token(token, longest=LONGEST_LABEL)
