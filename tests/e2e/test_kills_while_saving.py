"""SIGKILL at each named point of a save, in runs of several processes: a run loses at most one interval."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.save_kills import (
    AT_THE_END,
    BY_EVERY_WRITER,
    INTERVAL,
    POINTS,
    PUBLISHED,
    UNPUBLISHED,
    Kill,
    at_random,
    survive,
)
from tests.support.worker_groups import GroupServer

DOCUMENTED = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_runs_are_killed_at_each_point_that_the_docs_list() -> None:
    table = DOCUMENTED.read_text().split("The points of a save, in order:")[1]
    named = re.findall(r"`([a-z-]+)`", "\n".join(line for line in table.splitlines() if line.startswith("|")))
    assert set(named) == set(POINTS)
    assert len(POINTS) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_kill_at_any_point_of_a_save_costs_at_most_one_interval(
    config_file: Path, groups: GroupServer, strategy: str
) -> None:
    kills = [Kill(point) for point in (*UNPUBLISHED, *PUBLISHED, AT_THE_END[0])]
    if strategy == "fsdp":
        kills = [Kill(kill.point, rank=1 if kill.point in BY_EVERY_WRITER else 0) for kill in kills]
    found = survive(kills, config=config_file, groups=groups, strategy=strategy)
    assert (found.kills, found.not_reached, found.steps_lost) == (len(POINTS) - 1, 0, INTERVAL)
    last = survive([Kill(AT_THE_END[1])], config=config_file, groups=groups, strategy=strategy, run_id="last")
    assert (last.kills, last.steps_lost) == (1, 0)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_a_hundred_kills_at_random_points_cost_at_most_one_interval_each(
    config_file: Path, groups: GroupServer
) -> None:
    found = list(at_random(100, config=config_file, groups=groups, seed=1))
    assert sum(each.kills for each in found) == 100
    assert max(each.steps_lost for each in found) == INTERVAL
