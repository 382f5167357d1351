"""Files that belong to a model besides its weights: tokenizer, chat templates, generation config, processors, code.

    base ─ train ─▶ run ─ merge, export ─▶ result ─ publish ─▶ published: each copies them from the one before it

They are copied byte for byte. Only the end tokens of the generation config change, if the model has learned others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from llmtrain.contracts import TOKENIZER_FILES
from llmtrain.errors import ConfigError

CHAT_TEMPLATE = "chat_template.jinja"
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of the templates that have a name, such as tool_use.jinja."""
GENERATION_CONFIG = "generation_config.json"
_PATTERNS = (GENERATION_CONFIG, "*processor_config.json", "chat_template.json", "LICENSE*", "NOTICE*")


def tokenizer_files(folder: Path) -> list[str]:
    """Return the paths of the tokenizer's files in a folder, including named chat templates."""
    named = sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{NAMED_TEMPLATES}/*.jinja"))
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()] + named


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer, and not only chat templates."""
    return any(not name.endswith(".jinja") for name in tokenizer_files(folder))


def has_chat_template(folder: Path) -> bool:
    """Return whether the tokenizer in a folder has a chat template, in a file or in its config."""
    in_files = any(name.endswith(".jinja") for name in tokenizer_files(folder))
    return in_files or "chat_template" in optional_json(folder / "tokenizer_config.json")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Replace the tokenizer in `folder` by the one in `source`. Raises ConfigError if `source` has none."""
    if not tokenizer_files(source):
        raise ConfigError(f"{source}: no tokenizer here (none of {', '.join(TOKENIZER_FILES)})")
    for name in tokenizer_files(folder):
        (folder / name).unlink()
    _copy(tokenizer_files(source), source, folder)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the model's files in `source`, except weights, config and tokenizer, to `folder`."""
    found = {path.name for pattern in _PATTERNS for path in source.glob(pattern) if path.is_file()}
    if has_code(source):
        found |= {path.name for path in source.glob("*.py")}
    _copy(sorted(found), source, folder)


def has_code(folder: Path) -> bool:
    """Return whether the model in a folder has Python code of its own, which transformers runs if it is trusted."""
    return "auto_map" in optional_json(folder / "config.json") and any(folder.glob("*.py"))


def end_tokens(folder: Path) -> Iterator[int]:
    """Yield the end tokens that generation_config.json and config.json declare; the former may name several."""
    for name in (GENERATION_CONFIG, "config.json"):
        yield from _listed(optional_json(folder / name).get("eos_token_id"))


def set_end_tokens(folder: Path, eos_ids: Collection[int]) -> None:
    """Write the end tokens into the generation config in `folder`, unless it has just these."""
    file = folder / GENERATION_CONFIG
    settings = optional_json(file)
    if eos_ids and set(_listed(settings.get("eos_token_id"))) != set(eos_ids):
        settings["eos_token_id"] = min(eos_ids) if len(eos_ids) == 1 else sorted(eos_ids)
    elif file.is_file():
        return
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def optional_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if there is no file or no object. Raises ConfigError if it is not JSON."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _copy(names: Collection[str], source: Path, folder: Path) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _listed(declared: Any) -> list[int]:
    return declared if isinstance(declared, list) else [declared] if isinstance(declared, int) else []
