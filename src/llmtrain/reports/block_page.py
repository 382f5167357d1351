"""Makes a page of blocks: one file without a script, dark where the reader's system is.

Colours alone say nothing: learned text is underlined too.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmtrain._version import __version__
from llmtrain.reports.blocks import Block, legend_at
from llmtrain.reports.html import render_file


def block_page(*, title: str, blocks: Sequence[Block]) -> str:
    """Return the page."""
    return render_file(
        "blocks.html",
        style="blocks.css",
        title=title,
        blocks=blocks,
        legend_at=legend_at(blocks),
        version=__version__,
    )
