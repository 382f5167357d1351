"""Makes every page of HTML and every SVG, from the templates beside this file; text from runs is escaped, and its
control characters are written out.

    templates/base.html ◀─ runs.html, live.html, evaluation.html, blocks.html        assets/: our styles and scripts

A page that is one file carries its styles and scripts inside. Its Content-Security-Policy lets only these scripts run,
by their hashes, and no address be reached. Text of a run that came into the markup could do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from llmtrain.screen import CONTROL, visible

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """Return `template`, a file of templates/, filled with `values`."""
    return _environment().get_template(template).render(values)


def render_file(
    template: str, *, style: str, scripts: Sequence[str] = (), has_images: bool = False, **values: Any
) -> str:
    """Return a page that needs no other file and no network.

    `style`: a file of assets/. `scripts`: their texts, in order. `has_images`: whether its scripts draw images.
    """
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = [
        "default-src 'none'",
        *([f"script-src {hashes}"] if scripts else []),
        "style-src 'unsafe-inline'",
        *(["img-src data: blob:"] if has_images else []),
        "base-uri 'none'",
        "form-action 'none'",
    ]
    return render(template, policy="; ".join(policy), style=asset(style), scripts=scripts, **values)


@cache
def asset(name: str) -> str:
    """Return the text of a file of assets/. Raises FileNotFoundError for any other name."""
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


@cache
def plotly_script() -> str:
    """Return Plotly's own script, from its Python package."""
    from plotly.offline import get_plotlyjs  # here, since only the pages of runs need it

    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")  # the same text in JavaScript


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # here: a run without a report needs none

    environment = Environment(
        loader=PackageLoader("llmtrain.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = _number
    environment.policies["json.dumps_function"] = _json
    return environment


def _finalize(value: Any) -> Any:
    """Return what a template writes for a value: text with control characters written out; markup as it is."""
    return visible(value) if type(value) is str else value


def _json(value: Any, **_: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _number(value: Any, *, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:+.4g}" if sign and value else f"{value:.4g}"


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
