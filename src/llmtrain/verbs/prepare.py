"""`prepare`: make the data of a config ready ahead of a run.

CONFIG whose data are rows       ─▶ data/chat/prepare_rows.py: tokenised rows in the cache
CONFIG with a `prepare` section  ─▶ data/prepare/token_shards.py: token shards of text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtrain.config.commits import with_commits
from llmtrain.config.loading.load import LoadedConfig
from llmtrain.errors import ConfigError
from llmtrain.tracking.logs import setup_logging

if TYPE_CHECKING:
    from llmtrain.data.prepare.parallel import EngineName


def prepare(
    loaded: LoadedConfig, *, num_workers: int = 0, engine: EngineName = "local", address: str | None = None
) -> dict[str, Any]:
    """Make the token shards that the config describes, or tokenise its rows; return what was made.

    `num_workers` processes tokenise rows where they are many; for text prepare.num_workers counts, and `engine` says
    where the work is done: here, or on the Ray cluster at `address`. The shards are the same. Raises ConfigError for a
    mistake in the config, and for bad files and rows, with the line of each; RunError when the disk is full; Preempted
    when the cluster loses its workers again and again.
    """
    setup_logging(loaded.config.logging, run_folder=None, rank=0)
    config, _ = with_commits(loaded.config)
    if config.data.name == "chat":
        from llmtrain.data.chat.prepare_rows import prepare_rows

        if engine != "local":
            raise ConfigError(
                f"--engine {engine} is for text; the rows of data.name: chat are tokenised on this machine"
            )
        return prepare_rows(config, num_workers=num_workers)
    if config.prepare is None:
        raise ConfigError(f"{loaded.source} has no prepare section, which says what text becomes shards and where")
    from llmtrain.data.prepare.parallel import open_executor
    from llmtrain.data.prepare.token_shards import prepare as prepare_token_shards

    with open_executor(engine, num_workers=config.prepare.num_workers, address=address) as executor:
        return prepare_token_shards(config, executor=executor)
