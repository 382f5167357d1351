"""`convert`: rows of other formats → JSONL that `train` reads.

find_inputs → check_output → lines of each input → a temporary file, which takes OUT's place when it is whole
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.data.convert.columns import Columns
from llmtrain.data.convert.conversion import ConversionCounts, ConversionOptions, lines_of
from llmtrain.data.convert.inputs import ConversionInput, find_inputs, splits_beside
from llmtrain.data.convert.output import check_output, is_folder, put_in_place, write_lines
from llmtrain.errors import RunError


def convert(
    paths: Sequence[str],
    out: str,
    *,
    columns: Columns | None = None,
    as_messages: bool = False,
    split: str | None = None,
    subset: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the rows at `paths` to `out`, a JSONL file, or a folder in which each input becomes one.

    Returns what was written and what was skipped. Raises ConfigError when an input or the output cannot be, and when
    there is no row to write; RunError when writing fails. `out` is then as it was.
    """
    options = ConversionOptions(columns=columns or Columns(), as_messages=as_messages)
    apart = is_folder(out)
    inputs = find_inputs(paths, split=split, subset=subset, apart=apart)
    files = [one.file for one in inputs if one.file is not None]
    path = check_output(out, paths=paths, files=files, force=force)
    counts = ConversionCounts()
    try:
        with put_in_place(path) as temporary:
            write = _write_apart if apart else _write_together
            outputs = write(inputs, temporary, options, counts)
            if not counts.rows:
                counts.skipped.raise_if_any(f"{out}: there is no row to write, so nothing was written")
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror or error})") from error
    return {
        "output": out,
        "rows": counts.rows,
        "copied": counts.copied,
        "converted": counts.converted,
        "joined": counts.joined,
        "skipped": counts.skipped.count,
        "shapes": dict(counts.shapes),
        "left_out": dict(counts.left_out.most_common()),
        "unused": {name: unused._asdict() for name, unused in counts.unused.items()},
        "other_splits": {one.source.name: list(splits) for one in inputs if (splits := splits_beside(one))},
        "outputs": outputs,
        "skips": [{"source": fault.source, "reason": fault.message} for fault in counts.skipped.kept],
    }


def _write_together(
    inputs: Sequence[ConversionInput], path: Path, options: ConversionOptions, counts: ConversionCounts
) -> list[dict[str, Any]]:
    write_lines(path, (lines_of(one.source, options, counts) for one in inputs))
    return [{"name": None, "inputs": [one.source.name for one in inputs], "rows": counts.rows}]


def _write_apart(
    inputs: Sequence[ConversionInput], folder: Path, options: ConversionOptions, counts: ConversionCounts
) -> list[dict[str, Any]]:
    """Write a file for each input that has rows."""
    outputs = []
    for one in inputs:
        before = counts.rows
        write_lines(folder / one.name, [lines_of(one.source, options, counts)])
        if counts.rows > before:
            outputs.append({"name": one.name, "inputs": [one.source.name], "rows": counts.rows - before})
        else:
            (folder / one.name).unlink()
    return outputs
