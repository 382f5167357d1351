"""Draws docs/analysis-zipf.svg and docs/analysis-bigrams.svg: the words of Python's own library.

python -m docs.analysis_picture
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from llmtrain.data.inspection.analysis_options import AnalysisOptions
from llmtrain.data.inspection.plain_text import inspect_texts
from llmtrain.reports.analysis_pictures import analysis_pictures

CORPUS = Path(sysconfig.get_path("stdlib"), "asyncio", "*.py")
PICTURES = ("zipf", "bigrams")


def main() -> None:
    """Analyse and draw."""
    pictures = analysis_pictures(inspect_texts(str(CORPUS), AnalysisOptions())["analysis"])
    for name in PICTURES:
        path = Path(__file__).with_name(f"analysis-{name}.svg")
        path.write_text(pictures[name], encoding="utf-8")
        print(f"{path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
