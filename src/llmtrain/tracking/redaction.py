"""Redacts secrets in everything that a run writes or sends: argv, configs, URLs, log lines, tracker payloads.

A value is secret if its name has a secret word (`api_key`, `hfToken`). A part of a text is secret if it has the form of
a secret, or follows a secret name (`hf_…`, `--token x`, `https://u:p@host`). Names that only sound secret (`tokenizer`,
`max_tokens`, `eos_token`, `PWD`) are not redacted. No library does this: secret scanners search files for known forms,
and do not know the names of keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

REDACTED: Final = "***"

_SECRET_WORD = re.compile(
    "password|passwd|passphrase|secrets?|credentials?|authorization|bearer|cookie|signature"
    "|apikey|secretkey|accesskey|privatekey|apitoken|authtoken|accesstoken"
)
# A name that ends in one of these words is secret, unless the word before it matches.
_SECRET_ENDINGS = {
    "token": re.compile("eos|bos|pad|unk|sep|cls|mask|end|start|stop|special|image|per|each"),
    "key": re.compile(
        "sort|primary|foreign|group|column|row|field|text|messages?|role|content|prompt|completion|response"
        "|label|dict|cache|state|metric|query|public"
    ),
    "auth": None,
    "pwd": None,
    "sig": None,
    "sas": None,
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_URL_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,20}://)(?P<user>[^/\s\"'<>]+)@", re.IGNORECASE)
_AUTHORIZATION = re.compile(
    r"(?P<before>authorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|token)\s+|\bbearer\s+)[\w+/.~=-]{6,}", re.IGNORECASE
)
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|sk-(?=[\w-]{0,40}\d)[\w-]{16,}"  # OpenAI, Anthropic
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|AIza[\w-]{30,}"  # Google
    r"|xox[abeprs]-[\w-]{10,}"  # Slack
    r"|nvapi-[\w-]{20,}|pypi-[\w-]{20,}|npm_[A-Za-z0-9]{30,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"  # a JSON web token
    r")"
)
# A name, up to the beginning of its value. Each pattern reads a name only once, so a long line takes linear time.
_NAME = r"(?<![\w.-])(?P<name>[\w.-]+)"
_BEFORE_VALUE = (
    re.compile(r"(?<![\w.-])(?P<name>--?[A-Za-z][\w.-]*)\s+(?!-)"),
    re.compile(rf"{_NAME}[\"']?\s*=\s*"),
    re.compile(rf"(?P<quote>[\"']){_NAME}[\"']\s*:\s*"),
    # In prose only names of several words count: "the end token: 0" is not a secret.
    re.compile(r"(?<![\w.-])(?P<name>password|secret|authorization|(?=[A-Za-z0-9]*[_.-])[\w.-]++):\s+", re.IGNORECASE),
)
_CONFIG_LINE = re.compile(r"^[ \t-]*[\"']?(?P<name>[\w.-]+)[\"']?[ \t]*:[ \t]+", re.MULTILINE)
_VALUE = re.compile(r"\"[^\"]*\"|'[^']*'|[^\s\"'&;,]+")
_ASSIGNMENT = re.compile(r"(?P<name>[\w.-]+)=(?P<value>.+)", re.DOTALL)
_HARMLESS_VALUES = frozenset(("null", "None", "true", "True", "false", "False"))


def redact(value: Any) -> Any:
    """Return `value` with every secret replaced by `***`, in text, mappings and lists at any depth.

    A list is read like a command line: `["--token", "x"]`. Under a secret name every value is replaced except None,
    true and false, which only say whether there is a secret. Other values are returned unchanged.
    """
    if isinstance(value, str):
        return _redact_text(value)
    if isinstance(value, Mapping):
        return {key: _redact_named(key, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        items = [_redact_argument(item, before) for item, before in zip(value, [None, *value], strict=False)]
        return items if isinstance(value, list) else tuple(items)
    return value


def redact_config(text: str) -> str:
    """Return the text of a YAML or JSON file with the values under secret names, and other secrets, replaced."""
    return _redact_text(_hide_values(text, _CONFIG_LINE))


def line_with_secret(text: str, *, by_name: bool = True) -> int | None:
    """Return the number of the first line with a secret; None if there is none, as in a redacted file.

    A secret is recognized by its form and, with `by_name`, by the name before it.
    """
    hide = redact_config if by_name else _hide_forms
    if hide(text) == text:
        return None
    lines = text.split("\n")
    return next((number for number, line in enumerate(lines, start=1) if hide(line) != line), 1)


def is_secret_name(name: str) -> bool:
    """Return whether a key, flag or environment variable of this name is secret. Of `a.b.c` the last part counts."""
    words = [word.lower() for word in _WORD.findall(name.rpartition(".")[2])]
    if not words or words == ["pwd"]:
        return False
    if any(_SECRET_WORD.fullmatch(word) for word in words):
        return True
    harmless_before = _SECRET_ENDINGS.get(words[-1])
    is_harmless = harmless_before is not None and len(words) > 1 and harmless_before.fullmatch(words[-2])
    return words[-1] in _SECRET_ENDINGS and not is_harmless


def _redact_named(name: Any, value: Any) -> Any:
    if isinstance(name, str) and is_secret_name(name) and value is not None and not isinstance(value, bool):
        return REDACTED
    return redact(value)


def _redact_argument(item: Any, before: Any) -> Any:
    if not isinstance(item, str):
        return redact(item)
    if isinstance(before, str) and before.startswith("-") and "=" not in before and is_secret_name(before):
        return REDACTED
    assignment = _ASSIGNMENT.fullmatch(item)
    if assignment and is_secret_name(assignment["name"]) and assignment["value"] not in _HARMLESS_VALUES:
        return f"{assignment['name']}={REDACTED}"
    return _redact_text(item)


def _redact_text(text: str) -> str:
    text = _PRIVATE_KEY.sub(REDACTED, text)
    text = _URL_USER.sub(_hide_user, text)
    text = _AUTHORIZATION.sub(rf"\g<before>{REDACTED}", text)
    for pattern in _BEFORE_VALUE:
        text = _hide_values(text, pattern)
    return _SHAPES.sub(REDACTED, text)


def _hide_forms(text: str) -> str:
    """Return `text` with secrets that are recognized by their form replaced."""
    text = _PRIVATE_KEY.sub(REDACTED, text)
    return _SHAPES.sub(REDACTED, _URL_USER.sub(_hide_user, text))


def _hide_user(match: re.Match[str]) -> str:
    # `s3://bucket@v1` and `ssh://git@host` have no secret; in `https://abc@host`, abc can only be a token.
    is_web = match["scheme"].lower() in ("http://", "https://")
    return f"{match['scheme']}{REDACTED}@" if ":" in match["user"] or is_web else match[0]


def _hide_values(text: str, before_value: re.Pattern[str]) -> str:
    """Return `text` with the values after secret names replaced, also inside other values: `url=https://h?token=x`."""
    pieces, end = [], 0
    for match in before_value.finditer(text):
        value = _VALUE.match(text, match.end())
        if match.start() < end or value is None or value[0] in _HARMLESS_VALUES or not is_secret_name(match["name"]):
            continue
        quote = value[0][0] if value[0][0] in "\"'" else ""
        pieces += [text[end : match.end()], quote, REDACTED, quote]
        end = value.end()
    return "".join([*pieces, text[end:]])
