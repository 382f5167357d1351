"""`generate`: text that a model writes after prompts, for all of them at once or line by line with the user."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from llmtrain.atomic import replacing
from llmtrain.data.chat.tools import reject_what_cannot_be_shown
from llmtrain.data.files.find import format_of
from llmtrain.data.files.read import Row, read_rows
from llmtrain.data.files.row_faults import RowError, RowFault
from llmtrain.errors import ConfigError
from llmtrain.generation.completion import Completion
from llmtrain.generation.language_model import DEFAULT_SEED, Settings
from llmtrain.generation.open_model import open_model

log = logging.getLogger("llmtrain.generate")

PROMPT_FIELDS = ("prompt", "text")


def generate(
    model: str,
    *,
    prompts: Sequence[str] = (),
    prompts_file: str | None = None,
    output: str | None = None,
    device: str = "auto",
    root_dir: str = "runs",
    trust_remote_code: bool = False,
    **settings: Unpack[Settings],
) -> list[dict[str, Any]]:
    """Return `prompt`, `completion`, `tokens` and `ended_by` for each prompt, in their order, those of the file last.

    `rendered` is there too where the model read the prompt as a turn. `output`: a file for the results, one JSON object
    a line. Raises ConfigError for a model that is not there or has no tokenizer, a prompt that is longer than its
    context, a bad line of the file, and an output that cannot be written.
    """
    asked = [*prompts, *(read_prompts(Path(prompts_file)) if prompts_file is not None else [])]
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {Path(output).absolute().parent}; make it first")
    opened = open_model(model, root_dir=root_dir, device=device, trust_remote_code=trust_remote_code)
    completions = opened.generate(asked, **settings)
    results = [_result(completion) for completion in completions]
    if output is not None:
        _write_lines(Path(output), results)
    return results


def converse(
    model: str,
    *,
    lines: Iterable[str],
    say: Callable[[str], None],
    device: str = "auto",
    root_dir: str = "runs",
    trust_remote_code: bool = False,
    **settings: Unpack[Settings],
) -> list[dict[str, Any]]:
    """Complete each line as it comes, and `say` the text piece by piece; Ctrl-C ends a text, the end of `lines` all.

    A line that comes again gets another text. Returns what `generate` would; a prompt that was rejected has `error`,
    and a text that was broken off is `ended_by` interrupt.
    """
    loaded = open_model(model, root_dir=root_dir, device=device, trust_remote_code=trust_remote_code)
    loaded.generate([], **settings)  # what is wrong with the settings is wrong before the first line
    seed = settings.get("seed", DEFAULT_SEED)
    asked: Counter[str] = Counter()
    results: list[dict[str, Any]] = []
    for line in lines:
        pieces: list[str] = []

        def tell(_: int, piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            say(piece)

        try:
            again: Settings = {**settings, "seed": seed + asked[line]}
            done = loaded.generate(line, on_text=tell, **again)
            results.append(_result(done[0]))
        except KeyboardInterrupt:
            results.append({"prompt": line, "completion": "".join(pieces), "ended_by": "interrupt"})
        except ConfigError as error:
            log.error("%s", error)
            results.append({"prompt": line, "error": str(error)})
        asked[line] += 1
        say("\n")
    return results


def _result(completion: Completion) -> dict[str, Any]:
    return {name: value for name, value in asdict(completion).items() if value is not None}


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: the field `prompt` or `text` of each row; in a file without rows, each line.

    Blank lines are left out. Raises ConfigError with `file:line` for a row without a prompt.
    """
    if format_of(path.name):
        return [_prompt_of(row) for row in read_rows(str(path), key="--prompts")]
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    filled = [line.removesuffix("\r") for line in lines if line.strip()]
    if not filled:
        raise ConfigError(f"{path}: there is no prompt in it")
    return filled


def _prompt_of(row: Row | RowFault) -> str:
    if isinstance(row, RowFault):
        raise ConfigError(str(row))
    prompt = next((row.values[name] for name in PROMPT_FIELDS if name in row.values), None)
    if not isinstance(prompt, str):
        raise ConfigError(f"{row.source}: an object with the text field `prompt` (or `text`) is expected")
    try:
        reject_what_cannot_be_shown(prompt, "prompt")
    except RowError as error:
        raise ConfigError(f"{row.source}: {error}") from None
    return prompt


def _write_lines(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Replace `path` by one JSON object a line; it appears whole or not at all."""
    try:
        with replacing(path) as file:
            file.writelines((json.dumps(result, ensure_ascii=False) + "\n").encode() for result in results)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
