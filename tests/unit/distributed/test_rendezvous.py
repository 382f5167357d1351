"""A process finds its rank and the address to meet at in the config and in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from llmtrain.config.sections.training import RendezvousConfig
from llmtrain.distributed.rendezvous import complete_environment, first_machine, rendezvous_file
from llmtrain.errors import ConfigError

MEET = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}
TWO = {**MEET, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def settled(config: Mapping[str, Any] | None = None, **environ: str) -> dict[str, str]:
    complete_environment(RendezvousConfig.model_validate(config or {}), environ=environ)
    return environ


def test_without_settings_there_is_one_process() -> None:
    assert settled() == {}
    assert settled({"local_rank": 0}) == {"LOCAL_RANK": "0"}


def test_the_environment_set_by_hand_is_enough() -> None:
    assert settled(None, RANK="1", WORLD_SIZE="2", **MEET)["LOCAL_RANK"] == "0"
    assert settled(None, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", **MEET)["LOCAL_RANK"] == "1"


def test_the_config_is_enough_and_becomes_the_environment() -> None:
    keys = {"rank": 1, "world_size": 2, "local_rank": 1, "master_addr": "host", "master_port": 29500}
    expected = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MEET}
    assert settled(keys) == expected
    assert settled(keys, **expected) == expected, "two places that agree contradict nothing"
    by_url = {"rank": 1, "world_size": 2, "local_rank": 1, "init_method": "tcp://host:29500"}
    assert settled(by_url) == expected


def test_a_file_url_is_enough_for_processes_to_meet() -> None:
    config = RendezvousConfig(rank=0, world_size=2, init_method="file:///shared/meet")
    environ: dict[str, str] = {}
    complete_environment(config, environ=environ)
    assert "MASTER_ADDR" not in environ
    assert rendezvous_file(config) == "file:///shared/meet"
    assert rendezvous_file(RendezvousConfig(init_method="env://")) is None


@pytest.mark.parametrize(
    ("config", "environ", "message"),
    [
        ({"rank": 1}, {"RANK": "0"}, "distributed.rendezvous.rank says 1, but RANK says 0: remove one of them"),
        ({"master_port": 5}, {"MASTER_PORT": "6"}, "distributed.rendezvous.master_port says 5, but MASTER_PORT says 6"),
        (
            {"init_method": "tcp://a:5", "master_addr": "b"},
            {},
            "distributed.rendezvous.init_method says a, but MASTER_ADDR says b",
        ),
        ({"init_method": "tcp://a"}, {}, "which is not tcp://HOST:PORT"),
        ({"world_size": 2}, MEET, "WORLD_SIZE is 2, but RANK is not set: set it or distributed.rendezvous.rank"),
        ({"world_size": 2, "rank": 0}, {}, "but MASTER_ADDR is not set: set it or distributed.rendezvous.master_addr"),
        ({"rank": 1}, {}, "RANK is 1, but WORLD_SIZE is not set: set WORLD_SIZE, or unset RANK"),
        ({"world_size": 2, "rank": 2}, MEET, "RANK is 2, but WORLD_SIZE is 2: ranks are numbered from 0"),
        (
            {"world_size": 4, "rank": 2, "local_rank": 2},
            {**MEET, "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2",
        ),
        ({}, {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is not a whole number of 1 or more"),
        ({}, {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', which is not a whole number of 1 or more"),
        ({}, {**TWO, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', which is not a whole number of 0 or more"),
        ({}, {**TWO, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000, but ports are 1 to 65535"),
        (
            {},
            {**TWO, "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_WORLD_SIZE is 2, which does not divide WORLD_SIZE, 3",
        ),
    ],
)
def test_contradictions_and_missing_values_are_errors_that_name_both_places(
    config: dict[str, Any], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        settled(config, **environ)
    assert message in str(caught.value)


def test_the_config_may_name_the_first_machine() -> None:
    both = RendezvousConfig(master_addr="host", master_port=5)
    assert first_machine(RendezvousConfig(), option="a:1") == "a:1"
    assert first_machine(both, option=None) == "host:5"
    with pytest.raises(ConfigError, match="says host:5, but --rendezvous says a:1"):
        first_machine(both, option="a:1")
    with pytest.raises(ConfigError, match=r"master_port is set, but distributed\.rendezvous\.master_addr is not"):
        first_machine(RendezvousConfig(master_port=5), option=None)


def test_under_nproc_workers_keep_the_address_that_torchrun_sets() -> None:
    keys = {"master_addr": "host", "master_port": 29400}
    told = {**TWO, "MASTER_ADDR": "here", "LLMTRAIN_EXIT_FOLDER": "/tmp"}
    assert settled(keys, **told) == told
