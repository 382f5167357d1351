"""The page as one file: our styles and scripts, Plotly's script, and the document that they draw, all inside.

Scripts run only if their hash stands in the page's own Content-Security-Policy, and no address may be reached, so text
from a run that found its way into the markup could do nothing. What the page shows is made in page.js, from text nodes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Final, Literal

STYLE: Final = "page.css"
SCRIPTS: Final = ("elements.js", "charts.js", "evaluations.js", "page.js")
"""In this order: each uses what the ones before it define."""

LIVE_SCRIPTS: Final = ("plotly.js", *SCRIPTS, "runs_list.js", "chat.js", "live.js")
"""Those of the pages that a server shows, in their order; plotly.js is `plotly_script`."""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main id="page"></main>
<noscript>This page draws itself with a script, which this browser does not run.</noscript>
"""

_LIVE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title} · llmtrain</title>
<link rel="stylesheet" href="/static/{style}">
</head>
<body data-kind="{kind}">
<main id="page"></main>
{scripts}</body>
</html>
"""


def standalone_page(document: Mapping[str, Any], *, title: str) -> str:
    """HTML that works from the disk and asks no network for anything."""
    scripts = [plotly_script(), *(asset(name) for name in SCRIPTS), "startReport();"]
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    # Inside <script> only "<" could end the data early; as an escape it is the same JSON.
    data = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return "".join(
        [
            _HEAD.format(policy=html.escape(policy), title=html.escape(title), style=asset(STYLE)),
            f'<script type="application/json" id="document">{data}</script>\n',
            *(f"<script>{script}</script>\n" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def live_page(*, title: str, kind: Literal["list", "runs"]) -> str:
    """HTML that loads its parts and its data from the server that sent it."""
    scripts = "".join(f'<script src="/static/{name}"></script>\n' for name in LIVE_SCRIPTS)
    return _LIVE.format(title=html.escape(title), kind=kind, style=STYLE, scripts=scripts)


@cache
def asset(name: str) -> str:
    """One of our own files beside this one. Raises FileNotFoundError for any other."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def plotly_script() -> str:
    """Plotly's own script, from its Python package."""
    from plotly.offline import get_plotlyjs  # here, since only who makes or shows a page needs it

    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")  # in a text of JavaScript that is the same


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
