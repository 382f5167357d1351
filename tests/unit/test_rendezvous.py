"""Who a process is: the config and the environment brought together, and what is refused before anything starts."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from llmtrain.config.errors import ConfigError, Hang
from llmtrain.config.load import load_config
from llmtrain.config.running import RunConfig
from llmtrain.config.training import DistributedConfig, RendezvousConfig, TrainerConfig
from llmtrain.distributed.asked import address_of, refuse_strategy, refuse_what_cannot_run
from llmtrain.distributed.engine import meeting, resolve
from llmtrain.distributed.launch import Gang, launch
from llmtrain.distributed.rendezvous import file_to_meet_at, settle
from llmtrain.testing.ranks import free_port
from llmtrain.testing.tiny_run import write_config

MEET = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}
TWO = {**MEET, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def settled(config: Mapping[str, Any] | None = None, **environ: str) -> dict[str, str]:
    settle(RendezvousConfig.model_validate(config or {}), environ=environ)
    return environ


def test_nothing_said_is_one_process() -> None:
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


def test_a_file_is_a_place_to_meet() -> None:
    config = RendezvousConfig(rank=0, world_size=2, init_method="file:///shared/meet")
    environ: dict[str, str] = {}
    settle(config, environ=environ)
    assert "MASTER_ADDR" not in environ
    assert file_to_meet_at(config) == "file:///shared/meet"
    assert file_to_meet_at(RendezvousConfig(init_method="env://")) is None


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
        ({"rank": 1}, {}, "RANK is 1, but nobody says of how many: set WORLD_SIZE"),
        ({"world_size": 2, "rank": 2}, MEET, "RANK is 2, but WORLD_SIZE is 2: ranks are numbered from 0"),
        (
            {"world_size": 4, "rank": 2, "local_rank": 2},
            {**MEET, "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2",
        ),
        ({}, {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no such number"),
        ({}, {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', which is no such number"),
        ({}, {**TWO, "MASTER_PORT": "http"}, "MASTER_PORT is 'http', which is no such number"),
        ({}, {**TWO, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000, but ports are 1 to 65535"),
        ({}, {**TWO, "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is 2, which does not divide the 3"),
    ],
)
def test_what_contradicts_or_is_missing_is_a_mistake_that_names_both_places(
    config: dict[str, Any], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        settled(config, **environ)
    assert message in str(caught.value)


def test_the_first_machine_may_stand_in_the_config() -> None:
    both = RendezvousConfig(master_addr="host", master_port=5)
    assert address_of(RendezvousConfig(), given="a:1") == "a:1"
    assert address_of(both, given=None) == "host:5"
    with pytest.raises(ConfigError, match="says host:5, but --rendezvous says a:1"):
        address_of(both, given="a:1")
    with pytest.raises(ConfigError, match=r"master_port needs distributed\.rendezvous\.master_addr"):
        address_of(RendezvousConfig(master_port=5), given=None)


def test_where_machines_meet_is_the_launchers_and_its_processes_meet_where_torchrun_says() -> None:
    keys = {"master_addr": "host", "master_port": 29400}
    told = {**TWO, "MASTER_ADDR": "here", "LLMTRAIN_EXIT_FOLDER": "/tmp"}
    assert settled(keys, **told) == told


def test_why_processes_do_not_meet_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {**MEET, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=f"cannot meet at port {port}, where another program listens"), meeting():
            TCPStore("127.0.0.1", port, 2, is_master=True)
    absent = r"the 2 processes did not meet at host:\d+ \(.*1/2 clients joined.*\): start all"
    with pytest.raises(Hang, match=absent), meeting():
        TCPStore("127.0.0.1", free_port(), 2, is_master=True, timeout=timedelta(seconds=1))


@pytest.mark.parametrize(
    ("gang", "message"),
    [
        (Gang(2, rendezvous="host:29500"), "host:29500 is where several machines would meet, but --nnodes is 1"),
        (Gang(2, node_rank=1), "--node-rank is 1, but --nnodes is 1: machines are numbered from 0"),
        (Gang(2, nnodes=2, node_rank=2, rendezvous="host:29500"), "--node-rank is 2, but --nnodes is 2"),
        (Gang(2, nnodes=2, node_rank=0, rendezvous="host"), "host is no HOST:PORT with a port of 1 to 65535"),
        (Gang(2, nnodes=2, rendezvous="host:port"), "host:port is no HOST:PORT"),
        (Gang(2, nnodes=2), "--nnodes over 1 needs --rendezvous HOST:PORT of the first machine, or MASTER_ADDR"),
    ],
)
def test_machines_that_cannot_meet_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, gang: Gang, message: str
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError) as caught:
        launch(gang, ["version"], capture=False)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distributed.strategy=single"], "strategy is single, but 2 processes were asked for"),
        (["trainer.global_batch_size=48"], "48 is not divisible by micro_batch_size 16 × 2 ranks: make it 64"),
        (["run.device=cuda", "distributed.backend=gloo"], "distributed.backend gloo does not work on cuda"),
        (["run.device=cpu", "distributed.backend=nccl"], "distributed.backend nccl does not work on cpu"),
        (["run.device=cuda:1"], "run.device is cuda:1, one GPU, but 2 processes were asked for"),
        (["distributed.rendezvous.rank=0"], "rendezvous.rank is 0, but --nproc starts the processes and numbers them"),
    ],
)
def test_what_cannot_run_in_so_many_processes_is_said_before_they_start(overrides: list[str], message: str) -> None:
    config = load_config("quickstart", overrides).config
    with pytest.raises(ConfigError) as caught:
        refuse_what_cannot_run(config, world_size=2)
    assert message in str(caught.value)


SPLIT = ["distributed.strategy=fsdp_tp", "distributed.tensor_parallel=4"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attention.num_heads=6"], "tensor_parallel is 4, but model.attention.num_heads is 6, which is not"),
        (["model.attention.variant=gqa", "model.attention.num_kv_heads=2"], "but model.attention.num_kv_heads is 2"),
        (["model.ffn.d_ff=514"], "but model.ffn.d_ff is 514"),
        (["distributed.tensor_parallel=3"], "tensor_parallel 3 does not divide the 4 processes: start a multiple of 3"),
        (["model.lora.dora=true", "model.init_from=x"], "model.lora.dora is true, which needs whole matrices"),
    ],
)
def test_matrices_that_cannot_be_split_are_refused_before_anything_starts(overrides: list[str], message: str) -> None:
    heads = ["model.d_model=384", "model.attention.num_heads=8", "optimizer.name=adamw"]
    config = load_config("quickstart", [*SPLIT, *heads, *overrides]).config
    with pytest.raises(ConfigError) as caught:
        refuse_what_cannot_run(config, world_size=4)
    assert message in str(caught.value)


def test_heads_of_a_model_of_transformers_are_known_before_it_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_attention_heads": 6, "hidden_size": 96}')
    model = {"model": {"name": "huggingface", "path": str(tmp_path)}}
    base = load_config("quickstart", SPLIT).config.model_dump(mode="json")
    keys: dict[str, Any] = {name: base[name] for name in ("data", "trainer", "distributed")} | model
    config = load_config(str(write_config(tmp_path / "run.yaml", keys))).config
    with pytest.raises(ConfigError, match=r"num_attention_heads in .*config\.json is 6, which is not divisible by it"):
        refuse_what_cannot_run(config, world_size=4)


@pytest.mark.parametrize(
    ("key", "value"), [("tracking.samples.prompts", "[x]"), ("evaluation.every_steps", "5")], ids=["samples", "answers"]
)
def test_questions_are_refused_where_heads_are_split(key: str, value: str) -> None:
    asking = [f"{key}={value}", "evaluation.data=rows.jsonl"]
    for strategy in ("ddp", "fsdp"):
        config = load_config("quickstart", [*asking, f"distributed.strategy={strategy}"]).config
        refuse_strategy(config, strategy=strategy, world_size=2)
    with pytest.raises(ConfigError, match=rf"{key} asks the model for text, and with .* fsdp_tp .* take strategy fsdp"):
        load_config("quickstart", [*asking, *SPLIT])


def test_a_size_without_the_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel is 2, but strategy is fsdp: set strategy to fsdp_tp"):
        load_config("quickstart", ["distributed.strategy=fsdp", "distributed.tensor_parallel=2"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_tp"])
def test_a_strategy_without_processes_is_refused(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed = DistributedConfig.model_validate({"strategy": strategy})
    with pytest.raises(ConfigError, match=f"strategy is {strategy}, but this is one process: add --nproc N"):
        resolve(RunConfig(device="cpu"), TrainerConfig(precision="32", compile=False), distributed)


def test_what_can_run_is_not_refused() -> None:
    refuse_what_cannot_run(load_config("quickstart").config, world_size=4)
    refuse_what_cannot_run(load_config("quickstart", ["distributed.strategy=single"]).config, world_size=1)
