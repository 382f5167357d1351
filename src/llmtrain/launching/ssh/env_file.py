"""Reads a file of environment variables, as `source .env` and `docker --env-file` do.

    HF_TOKEN=hf_…          export HF_HOME="~/.cache/huggingface"          # a comment

Values are literal: `$` has no meaning. A line that cannot be read is an error, since a missing token might be noticed
only hours later; python-dotenv would skip the line with a warning.
"""

from __future__ import annotations

import re
from pathlib import Path

from llmtrain.errors import ConfigError

_LINE = re.compile(
    r"""\s* (?:export\s+)? (?P<name>[A-Za-z_][A-Za-z0-9_]*) \s*=\s*
    (?: '(?P<single>[^']*)' | "(?P<double>(?:[^"\\]|\\.)*)" | (?P<bare>(?!['"])[^\n]*?) ) \s* (?:(?<=\s)\#.*)?""",
    re.VERBOSE,
)


def read_env_file(path: str) -> dict[str, str]:
    """Return the variables of the file. Raises ConfigError with the file and line, but not the value."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"the env file {path} cannot be read: {why}") from None
    variables = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None or "\0" in line:
            raise ConfigError(
                f"{path}:{number}: this line sets no variable: write NAME=VALUE, with quotes around a value that "
                "has blanks or #"
            )
        double = found["double"]
        value = found["single"] if found["single"] is not None else found["bare"] or ""
        variables[found["name"]] = value if double is None else re.sub(r'\\(["\\$`])', r"\1", double)
    return variables
