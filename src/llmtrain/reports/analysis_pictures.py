"""Draws the analysis of a corpus: one SVG for each of its parts, and the same as PNG files.

    report["analysis"] ─ analysis_pictures ─▶ name → SVG ─ write_pngs ─▶ FOLDER/name.png

PNG files are made of the SVG by resvg, an extra of 3 MB that needs no browser.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmtrain.atomic import replacing
from llmtrain.errors import ConfigError
from llmtrain.installing import install_extra
from llmtrain.reports.bigram_picture import bigram_picture, shown_token
from llmtrain.reports.chart import columns, points, shares

MAX_ROWS = 16
PNG_SCALE = 2.0


def analysis_pictures(analysis: Mapping[str, Any]) -> dict[str, str]:
    """Return the SVG of each part that was measured, by its name."""
    unit = analysis["unit"]
    drawn: dict[str, str] = {}
    if analysis["lengths"]:
        bars = [(length_label(row), row["rows"]) for row in analysis["lengths"]["histogram"]]
        drawn["lengths"] = columns(
            bars, title=f"Lengths in {unit}", x_title=f"{unit} a document, from", y_title="documents"
        )
    if analysis["frequencies"]:
        drawn["zipf"] = _zipf(analysis["frequencies"], unit)
        if analysis["vocabulary_size"] is not None:
            drawn["token-ids"] = _ids(analysis["frequencies"])
    if analysis["bigrams"]:
        drawn["bigrams"] = bigram_picture(analysis["bigrams"]["drawn"], title=f"Which {unit} follow each other")
    if analysis["compression"] and analysis["compression"]["histogram"]:
        bars = [(ratio_label(row), row["excerpts"]) for row in analysis["compression"]["histogram"]]
        drawn["compression"] = columns(
            bars, title="Compression", x_title="ratio of bytes to compressed bytes, from", y_title="documents"
        )
    if analysis["languages"].get("by_language"):
        rows = [(row["language"], row["share"]) for row in analysis["languages"]["by_language"]]
        drawn["languages"] = shares(_largest(rows), title="Languages")
    if analysis["sources"]:
        rows = [(row["source"], row["share"]) for row in analysis["sources"]]
        drawn["sources"] = shares(_largest(rows), title=f"Sources by {unit}")
    return drawn


def write_pngs(folder: Path, pictures: Mapping[str, str]) -> list[str]:
    """Write each picture as a PNG file into `folder`, and return their paths.

    Raises ConfigError where the package that draws them is missing, there is no font, or a file cannot be written.
    """
    require_png()
    import resvg_py

    if pictures and not _has_fonts(resvg_py):
        raise ConfigError("--png needs a font, and this machine has none: install one, such as fonts-dejavu-core")
    paths = []
    for name, svg in pictures.items():
        path = folder / f"{name}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=PNG_SCALE, background="#ffffff")))
        except OSError as error:
            raise ConfigError(f"--png {folder}: cannot be written ({error.strerror or error})") from error
        paths.append(str(path))
    return paths


def require_png() -> None:
    """Raise ConfigError where the package that draws PNG files is missing."""
    if find_spec("resvg_py") is None:
        raise ConfigError(f"--png needs resvg-py, which is not installed: {install_extra('png')}")


def length_label(row: Mapping[str, Any]) -> str:
    """Return a bin of lengths in words."""
    return f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,}–{row['to']:,}"


def ratio_label(row: Mapping[str, Any]) -> str:
    """Return a bin of compression ratios in words."""
    return f"{row['from']:g}–{row['to']:g}" if row["to"] is not None else f"{row['from']:g} or more"


def _zipf(frequencies: Mapping[str, Any], unit: str) -> str:
    fit, names = frequencies["zipf"], frequencies["top"]
    dots = []
    for point in frequencies["curve"]:
        rank, count = point["rank"], point["count"]
        name = f" ({shown_token(names[rank - 1]['token'])})" if rank <= len(names) else ""
        dots.append((rank, count, f"rank {rank:,}{name}: {count:,}"))
    line = None
    if fit:
        last = fit["last_rank"]
        line = ((1.0, fit["scale"]), (float(last), fit["scale"] * last ** -fit["exponent"]))
    return points(dots, title=f"Frequencies of {unit}", x_title="rank", y_title=f"occurrences of {unit}", line=line)


def _ids(frequencies: Mapping[str, Any]) -> str:
    dots = [
        (band["from"], band["total"] / (band["to"] - band["from"] + 1), _band_label(band))
        for band in frequencies["by_id"]
        if band["total"]
    ]
    return points(dots, title="Occurrences by token id", x_title="token id", y_title="mean occurrences", is_log_x=False)


def _band_label(band: Mapping[str, int]) -> str:
    size = band["to"] - band["from"] + 1
    return (
        f"ids {band['from']:,} to {band['to']:,}: {band['total']:,} occurrences, {band['distinct']:,} of {size:,} occur"
    )


def _largest(rows: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return the first rows, and what is left of them as one."""
    if len(rows) <= MAX_ROWS:
        return rows
    kept = rows[: MAX_ROWS - 1]
    return [*kept, (f"{len(rows) - len(kept):,} others", sum(share for _, share in rows[len(kept) :]))]


def _has_fonts(renderer: Any) -> bool:
    """Return whether text leaves a trace in a picture."""
    frame = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20" font-family="sans-serif">{}</svg>'
    empty, written = (renderer.svg_to_bytes(svg_string=frame.format(text)) for text in ("", '<text y="16">x</text>'))
    return bytes(empty) != bytes(written)
