"""README and manual: every command and every page is named there, and every link between them leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from llmtrain.cli.app import program

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs" / "index.md"
GENERATED = [ROOT / "docs" / name for name in ("configuration.md", "from-older-systems.md")]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]


def anchors(page: Path) -> set[str]:
    """As GitHub and the manual make them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", INDEX], ids=lambda page: page.name)
def test_every_command_stands_in_the_table_of_commands(page: Path) -> None:
    table = "\n".join(line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `llmtrain "))
    named = {word for code in re.findall(r"`([^`]*)`", table) for word in code.removeprefix("llmtrain ").split()[:1]}
    commands = typer.main.get_command(program()).commands  # type: ignore[attr-defined]
    assert len(commands) > 15
    assert set(commands) - named == set()


def test_the_manual_begins_with_links_to_all_its_pages() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", INDEX.read_text(encoding="utf-8")))
    pages = set(INDEX.parent.glob("*.md")) - set(GENERATED) - {INDEX}
    assert {page.name for page in pages} - linked == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        if file in GENERATED or not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(f"{target}#{anchor}")
    assert broken == []
