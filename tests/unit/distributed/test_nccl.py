"""What the environment says about NCCL: older names are taken for today's, and what names nothing here is found."""

from __future__ import annotations

import pytest

from llmtrain.distributed.nccl import contradictions, nccl_settings, network_faults

INTERFACES = ["docker0", "eth0", "eth1", "lo"]
ADAPTERS = ["mlx5_0", "mlx5_1"]


@pytest.mark.parametrize(
    ("environ", "added"),
    [
        ({}, {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}),
        ({"NCCL_ASYNC_ERROR_HANDLING": "1"}, {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, {}),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "NCCL_ASYNC_ERROR_HANDLING": "1"}, {}),
        (
            {"NCCL_BLOCKING_WAIT": "1", "NCCL_DEBUG": "INFO"},
            {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3", "TORCH_NCCL_BLOCKING_WAIT": "1"},
        ),
    ],
)
def test_todays_names_get_the_values_of_older_names_or_defaults(environ: dict[str, str], added: dict[str, str]) -> None:
    assert nccl_settings(environ) == added


def test_an_older_name_that_contradicts_todays_is_reported() -> None:
    environ = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "NCCL_ASYNC_ERROR_HANDLING": "1"}
    assert contradictions(environ) == [
        "NCCL_ASYNC_ERROR_HANDLING is 1, but TORCH_NCCL_ASYNC_ERROR_HANDLING, its name today, is 0 and takes precedence"
    ]
    assert contradictions({**environ, "NCCL_ASYNC_ERROR_HANDLING": "0"}) == []


@pytest.mark.parametrize("value", ["eth", "eth0", "=eth1", "ib,eth0", "^docker", "^=lo,docker0"])
def test_existing_interfaces_are_no_fault(value: str) -> None:
    assert network_faults({"NCCL_SOCKET_IFNAME": value}, interfaces=INTERFACES, adapters=[]) == []


@pytest.mark.parametrize("value", ["ib", "=eth", "=eth7,ib0", "^docker,eth,lo"])
def test_a_selection_that_matches_no_interface_is_listed_with_those_that_exist(value: str) -> None:
    assert network_faults({"NCCL_SOCKET_IFNAME": value}, interfaces=INTERFACES, adapters=[]) == [
        (
            f"NCCL_SOCKET_IFNAME={value} matches no network interface of this machine",
            "name one of docker0, eth0, eth1, lo, or unset it",
        )
    ]


def test_adapters_log_levels_and_connection_numbers_are_checked() -> None:
    good = {"NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1", "NCCL_DEBUG": "info", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert network_faults(good, interfaces=INTERFACES, adapters=ADAPTERS) == []
    assert network_faults(good, interfaces=INTERFACES, adapters=[]) == [
        ("NCCL_IB_HCA==mlx5_0:1,mlx5_1:1 matches no InfiniBand adapter of this machine", "unset it: there is none here")
    ]
    bad = {"NCCL_IB_HCA": "mlx4", "NCCL_DEBUG": "LOUD", "CUDA_DEVICE_MAX_CONNECTIONS": "64"}
    said = [what for what, _ in network_faults(bad, interfaces=INTERFACES, adapters=ADAPTERS)]
    assert said == [
        "NCCL_IB_HCA=mlx4 matches no InfiniBand adapter of this machine",
        "NCCL_DEBUG=LOUD is not a log level",
        "CUDA_DEVICE_MAX_CONNECTIONS=64 is not a number from 1 to 32",
    ]
