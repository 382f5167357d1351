"""A small corpus, prepared once, and a config that trains on it in a second."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.config.load import load_config
from llmtrain.recipes.prepare import prepare
from llmtrain.testing.gang import GangServer
from llmtrain.testing.tiny_run import tiny_config, write_config


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of three packages of the standard library."""
    folder = tmp_path_factory.mktemp("corpus") / "shards"
    config = write_config(folder.parent / "prepare.yaml", tiny_config(folder, folder.parent / "runs"))
    prepare(load_config(str(config)).config)
    return folder


@pytest.fixture
def config_file(shards: Path, tmp_path: Path) -> Path:
    """The tiny config, with its runs in `tmp_path/runs`."""
    return write_config(tmp_path / "tiny.yaml", tiny_config(shards, tmp_path / "runs"))


@pytest.fixture(scope="session")
def gangs() -> Iterator[GangServer]:
    """Starts the command line in one process or several, quickly."""
    with GangServer() as server:
        yield server
