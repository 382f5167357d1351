"""`generate`: text that a model writes after prompts, for all of them at once or line by line with the user."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from llmtrain.config.errors import ConfigError
from llmtrain.evaluation.text import Completion
from llmtrain.recipes.loading.language_model import DEFAULT_SEED, Settings
from llmtrain.recipes.loading.open_model import open_model

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
    **settings: Unpack[Settings],
) -> list[dict[str, Any]]:
    """`prompt`, `completion`, `tokens` and `ended_by` for each prompt, in their order, those of the file last; and
    `rendered` where the model read the prompt as a turn.

    They are written to `output` too, one JSON object a line. Raises ConfigError for a model that is not there or has no
    tokenizer, a prompt that is longer than its context, a bad line of the file, and an output that cannot be written.
    """
    asked = [*prompts, *(read_prompts(Path(prompts_file)) if prompts_file is not None else [])]
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {Path(output).absolute().parent}; make it first")
    completions = open_model(model, root_dir=root_dir, device=device).generate(asked, **settings)
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
    **settings: Unpack[Settings],
) -> list[dict[str, Any]]:
    """Complete each line as it comes, and `say` the text piece by piece; Ctrl-C ends a text, the end of `lines` all.

    A line that comes again gets another text. Returns what `generate` would; a prompt that was refused has `error`, and
    a text that was broken off is `ended_by` interrupt.
    """
    loaded = open_model(model, root_dir=root_dir, device=device)
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
    """The prompts of a file: of `.jsonl`, the field `prompt` or `text` of each line; of any other, each line.

    Lines without anything on them are passed over. Raises ConfigError with `file:line` for what is no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    filled = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise ConfigError(f"{path}: there is no prompt in it")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [line for _, line in filled]
    return [_prompt_of(line, where=f"{path}:{number}") for number, line in filled]


def _prompt_of(line: str, *, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    fields = row if isinstance(row, dict) else {}
    prompt = next((fields[name] for name in PROMPT_FIELDS if name in fields), None)
    if not isinstance(prompt, str):
        raise ConfigError(f"{where}: an object with the text field `prompt` (or `text`) is expected")
    return prompt


def _write_lines(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Replace `path` by one JSON object a line; it appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
