"""The page about the older systems has every name of the table, and its answers are true."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import typer

from llmtrain.cli.app import program
from llmtrain.config.loading.load import shipped_configs
from llmtrain.config.loading.older_systems import SYSTEMS, VARIABLES, flag_today, key_today, markdown
from llmtrain.config.loading.renamed import CONFIGS, RENAMED
from llmtrain.config.loading.walk import walk
from llmtrain.config.sections.presets import PRESETS
from llmtrain.config.sections.schema import Config

KEYS = {key.dotted for key in walk(Config)}
COMMANDS = typer.main.get_command(program()).commands  # type: ignore[attr-defined]
ROWS = [line.split(" | ")[-1].removesuffix(" |") for line in markdown().splitlines() if line.startswith("| `")]
TYPED = sorted({text for row in ROWS for text in re.findall(r"`([^`]*)`", row)})


def test_every_name_of_the_table_stands_on_the_page() -> None:
    names = {key for system in SYSTEMS for key in system.keys}
    names |= {flag.removeprefix("--").replace("-", "_") for system in SYSTEMS for flag in system.flags}
    names |= {name.rpartition(".")[2] for name in names} | {name.partition(".")[0] for name in names}
    names |= {name.partition("=")[0].partition(".")[0] for name in names}
    elsewhere = {"samples", "features", "classes", "repo", "public", "config_name"}  # rows of commands
    more = {
        name for name in RENAMED if " " in name or name.startswith("prepare.") or name.endswith("avg_jaccard_overlap")
    }
    presets = {f"model.name={preset}" for preset in PRESETS}
    assert RENAMED.keys() - names - elsewhere - more - presets == set()
    assert {name for system in SYSTEMS for name in system.configs} == CONFIGS.keys()
    assert {name for system in SYSTEMS for name in system.variables} == VARIABLES.keys()


@pytest.mark.parametrize("text", [text for text in TYPED if text.startswith("llmtrain ")])
def test_command_lines_of_the_page_have_commands_and_flags_that_exist(text: str) -> None:
    _, verb, *words = text.split()
    commands = with_groups(verb, COMMANDS[verb])
    flags = {
        flag for command in commands.values() for each in command.params for flag in (*each.opts, *each.secondary_opts)
    }
    assert {word for word in words if word.startswith("--")} <= flags
    assert {
        word for word in words if word.islower() and not word.startswith(("-", "hub"))
    } <= shipped_configs().keys() | {"rougeL"} | commands.keys()


def with_groups(name: str, command: Any) -> dict[str, Any]:
    """A command by its name, and all commands below it where it is a group."""
    below = [with_groups(*each) for each in getattr(command, "commands", {}).items()]
    return {name: command} | {key: value for each in below for key, value in each.items()}


@pytest.mark.parametrize("text", [text for text in TYPED if text.partition(".")[0] in Config.model_fields])
def test_keys_of_the_page_are_in_the_schema(text: str) -> None:
    assert text.partition(": ")[0] in KEYS or text == "config.yaml"


def test_nothing_of_the_page_is_absent() -> None:
    assert {row for row in ROWS if "not part of" in row} == set()


@pytest.mark.parametrize("answer", [key_today, flag_today])
def test_a_name_that_nothing_is_known_of_is_an_error_of_the_page(answer: Callable[[str], str]) -> None:
    with pytest.raises(KeyError):
        answer("nothing_of_the_kind")


def test_a_key_that_kept_its_name_is_the_same() -> None:
    assert key_today("run.seed") == "the same"
    assert key_today("trainer.lr") == "`optimizer.lr`"
    assert flag_today("--max-steps") == "`trainer.max_steps`"
