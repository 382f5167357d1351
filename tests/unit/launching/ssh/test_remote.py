"""Flags win over the config, the config over the variables; what is no machine is rejected before ssh sees it."""

from __future__ import annotations

import pytest

from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError
from llmtrain.launching.ssh.remote import Remote, remote_of

MAKE = {"REMOTE_USER": "me  ", "REMOTE_HOST": "192.168.1.100  ", "REMOTE_DIR": "~/Dev/project  "}


def remote(keys: dict[str, object] | None = None, environ: dict[str, str] | None = None, **given: object) -> Remote:
    config = Config.model_validate({"data": {"name": "synthetic"}, "remote": keys or {}})
    return remote_of(config, given, environ=environ or {})


def test_variables_from_a_makefile_are_enough() -> None:
    machine = remote(environ=MAKE).first
    assert (machine.destination, machine.folder, machine.port) == ("me@192.168.1.100", "~/Dev/project", None)


def test_flags_win_over_the_config_and_the_config_over_variables() -> None:
    found = remote({"host": "b", "dir": "/b", "user": "two"}, MAKE, host=["a", "me@c:2222"], dir=None)
    assert [(machine.destination, machine.port) for machine in found.machines] == [("two@a", None), ("me@c", 2222)]
    assert {machine.folder for machine in found.machines} == {"/b"}
    assert [machine.name for machine in remote({"host": ["x", "y"]}, MAKE).machines] == ["me@x", "me@y"]
    assert len(remote(environ={**MAKE, "REMOTE_HOST": "a, b c"}).machines) == 3
    assert remote(host=["[::1]:22"], dir="/x").first.host == "::1"


@pytest.mark.parametrize(
    "host",
    ["-oProxyCommand=x", "a;b", "a'b", "$(x)", "me@-x", "-l@a", "a:0", "a:70000", "a:b", "user@", "`x`", "a\x00"],
)
def test_a_malformed_host_is_rejected(host: str) -> None:
    with pytest.raises(ConfigError, match="is not a machine"):
        remote(host=[host], dir="/x")


@pytest.mark.parametrize("folder", ["/", "~", "~/", ".", "//"])
def test_a_home_folder_or_a_root_is_rejected_as_project_folder(folder: str) -> None:
    with pytest.raises(ConfigError, match="one for this project alone"):
        remote(host=["a"], dir=folder)


def test_a_missing_or_repeated_host_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"--host USER@HOST, remote\.host in the config, or REMOTE_HOST"):
        remote(dir="/x")
    with pytest.raises(ConfigError, match=r"--dir DIR, remote\.dir in the config, or REMOTE_DIR"):
        remote(host=["a"])
    with pytest.raises(ConfigError, match="named twice"):
        remote(host=["a", "a"], dir="/x")
    with pytest.raises(ConfigError, match="only ~/"):
        remote(host=["a"], dir="~other/x")
