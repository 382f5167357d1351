"""The hash of a user's function covers the code that it is made of, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llmtrain.import_path import code_sha256

FILES = {
    "beside.py": "WORDS = ['a']\n",
    "unused.py": "",
    "cleaning_pkg/__init__.py": "raise RuntimeError('a hash imports nothing')\n",
    "cleaning_pkg/steps.py": "import numpy\nfrom . import rules\n\ndef step(t):\n    from beside import WORDS\n",
    "cleaning_pkg/rules/__init__.py": "from .words import split\n",
    "cleaning_pkg/rules/words.py": "import cleaning_pkg.steps\nsplit = str.split\n",
    "cleaning_pkg/other.py": "",
}
USED = [name for name in FILES if name not in ("unused.py", "cleaning_pkg/other.py")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_the_hash_changes_with_each_file_that_the_function_uses(folder: Path, name: str) -> None:
    before = code_sha256("cleaning_pkg.steps:step")
    with (folder / name).open("a") as file:
        file.write("# more\n")
    assert (code_sha256("cleaning_pkg.steps:step") != before) == (name in USED)


def test_a_module_alone_has_the_hash_of_its_file(folder: Path) -> None:
    assert code_sha256("beside:WORDS") == hashlib.sha256(FILES["beside.py"].encode()).hexdigest()
    assert code_sha256("sys:exit") is None


def test_the_hash_does_not_tell_where_the_code_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_sha256("cleaning_pkg.steps:step")
    moved = folder.parent / "moved"
    folder.rename(moved)
    monkeypatch.syspath_prepend(str(moved))
    assert code_sha256("cleaning_pkg.steps:step") == before
