"""A store of checkpoints, and the folder in which it keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.training.checkpoint import CheckpointStore
from tests.support.checkpoints import new_store


@pytest.fixture
def store(folder: Path) -> Iterator[CheckpointStore]:
    made = new_store(folder)
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"
