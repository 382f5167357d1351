"""`convert`: rows of other formats → JSONL that `train` reads.

find_inputs → check_output → lines of each input → a temporary file, which takes OUT's place when it is whole
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.errors import RunError
from llmtrain.data.convert.columns import Columns
from llmtrain.data.convert.inputs import Input, find_inputs
from llmtrain.data.convert.output import check_output, is_folder, put_in_place, write_lines
from llmtrain.data.convert.rows import Options, Tally, lines_of


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
    options = Options(columns=columns or Columns(), as_messages=as_messages)
    apart = is_folder(out)
    inputs = find_inputs(paths, split=split, subset=subset, apart=apart)
    files = [one.file for one in inputs if one.file is not None]
    path = check_output(out, paths=paths, files=files, force=force)
    tally = Tally()
    try:
        with put_in_place(path) as temporary:
            write = _write_apart if apart else _write_together
            outputs = write(inputs, temporary, options, tally)
            if not tally.rows:
                tally.skipped.raise_if_any(f"{out}: there is no row to write, so nothing was written")
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror or error})") from error
    return {
        "output": out,
        "rows": tally.rows,
        "copied": tally.copied,
        "converted": tally.converted,
        "joined": tally.joined,
        "skipped": tally.skipped.count,
        "shapes": dict(tally.shapes),
        "left_out": dict(tally.left_out.most_common()),
        "outputs": outputs,
        "skips": [{"source": fault.source, "reason": fault.message} for fault in tally.skipped.kept],
    }


def _write_together(inputs: Sequence[Input], path: Path, options: Options, tally: Tally) -> list[dict[str, Any]]:
    write_lines(path, (lines_of(one.source, options, tally) for one in inputs))
    return [{"name": None, "inputs": [one.source.name for one in inputs], "rows": tally.rows}]


def _write_apart(inputs: Sequence[Input], folder: Path, options: Options, tally: Tally) -> list[dict[str, Any]]:
    """A file for each input that has rows."""
    outputs = []
    for one in inputs:
        before = tally.rows
        write_lines(folder / one.name, [lines_of(one.source, options, tally)])
        if tally.rows > before:
            outputs.append({"name": one.name, "inputs": [one.source.name], "rows": tally.rows - before})
        else:
            (folder / one.name).unlink()
    return outputs
