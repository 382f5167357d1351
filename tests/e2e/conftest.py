"""A small corpus, prepared once, and a config that trains on it in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.data.prepare.token_shards import prepare
from tests.support.tiny_run import tiny_config, weight_hash, write_config
from tests.support.worker_groups import GroupServer


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
def undisturbed(shards: Path, groups: GroupServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The weights, as their hash, of the tiny run with such keys to which nothing happens; each is trained once."""
    known: dict[tuple[object, ...], str] = {}

    def weights(*keys: str, world_size: int) -> str:
        if (world_size, *keys) not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            config = write_config(folder / "tiny.yaml", tiny_config(shards, folder / "runs"))
            group = groups.start(["train", str(config), *keys, "output.run_id=whole"], world_size=world_size)
            assert group.wait() == [0] * world_size, group.stderr
            assert not list((folder / "runs" / "whole" / "logs").glob("stacks*"))
            known[world_size, *keys] = weight_hash(folder / "runs" / "whole")
        return known[world_size, *keys]

    return weights


@pytest.fixture(scope="session")
def groups() -> Iterator[GroupServer]:
    """Starts the command line in one process or several, quickly."""
    with GroupServer() as server:
        yield server
