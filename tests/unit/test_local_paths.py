"""Addresses of object stores: rejected for every key and option that takes paths of this machine; no folder is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError

from llmtrain.cli.app import program, run
from llmtrain.config.loading.load import load_config, plain_config
from llmtrain.config.loading.walk import Key, leaf_types, walk
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.data import HuggingFaceDataConfig
from llmtrain.config.sections.schema import Config
from llmtrain.config.sections.sources import MixedSource
from llmtrain.errors import ConfigError
from llmtrain.local_paths import ADDRESS, LOCAL, LOCAL_OR_HUB, STORE, checked_path

ADDRESSES = ("s3://b/x", "gs://b/x", "az://c/x", "https://h/x", "lakefs://r/m/x", "memory://x", "ftp://h/x", "s3:/b/x")
READABLE = [address for address in ADDRESSES if not address.startswith("ftp")]

# Keys whose text is no path; and rows, which are read from any file system that fsspec knows.
NO_PATHS = {
    *("name", "description", "limits", "license", "tags", "notes", "precision", "metric", "keep_best", "revision"),
    *("run_id", "adapter", "text_column", "include", "exclude", "prompts", "options", "file_name", "device", "configs"),
    *("experiment", "run_name", "project", "entity", "tracking_uri", "metrics", "init_method", "master_addr", "split"),
    *("base_model", "require_improvement", "target_modules", "modules_to_save", "attn_implementation"),
    *("target_parameters", "keep", "function", "email", "ip"),
}
ELSEWHERE = ("kubernetes", "remote")
"""Sections whose texts are about other machines; their paths of this one are marked all the same."""

NO_PATH_WORDS = {
    *("KEY=VALUE", "NAME", "TEXT", "TOKEN", "METRIC", "ID", "STATE", "BY", "ADDRESS", "HOST:PORT", "OUT"),
    *("SEC", "N", "T", "P", "K", "R", "X", "I", "SHARE"),
}
"""What the help calls parameters that are no path; OUT of convert is checked with the rest of it."""
READS_RUNS = {"root_dir", "resume", "names"}
"""Parameters that name runs, or the folder of all runs: they may be in a store."""
READS_ADDRESSES_OPTIONS = {"paths", "word", "data"}
"""Parameters of commands that take rows (or a config in their place): convert, inspect; --data of eval and export."""


def text_keys() -> list[Key]:
    return [key for key in walk(Config) if str in leaf_types(key.field.annotation)]


def is_marked(key: Key) -> bool:
    return key.field.json_schema_extra in (LOCAL, LOCAL_OR_HUB, ADDRESS, STORE)


def takes_addresses(key: Key) -> bool:
    return key.field.json_schema_extra == ADDRESS


def is_written(key: Key) -> bool:
    return key.field.json_schema_extra == STORE


def test_every_key_that_takes_text_is_a_path_of_this_machine_or_known_to_be_none() -> None:
    unknown = {
        key.dotted
        for key in text_keys()
        if not is_marked(key)
        and key.path[-1] not in NO_PATHS
        and key.owner is not HuggingFaceDataConfig  # whose train and val are splits
        and key.path[0] not in ELSEWHERE
    }
    assert unknown == set()


ONLY_HERE = [key for key in text_keys() if is_marked(key) and not takes_addresses(key) and not is_written(key)]
WRITTEN = [key for key in text_keys() if is_written(key)]
ANYWHERE = [key for key in text_keys() if takes_addresses(key)]


def errors_of(key: Key, value: Any) -> list[str]:
    """What is wrong with a value of a key, apart from what the section lacks."""
    try:
        key.owner.model_validate({key.path[-1]: value})
    except ValidationError as caught:
        return [error["msg"] for error in caught.errors() if error["loc"][:1] == (key.path[-1],)]
    return []


@pytest.mark.parametrize("key", ANYWHERE, ids=lambda key: key.dotted)
def test_what_is_read_takes_the_address_of_every_store_and_no_password(key: Key) -> None:
    for address in READABLE:
        assert errors_of(key, address) == []
    (wrong,) = errors_of(key, "ftp://h/x")
    assert "no store has the scheme ftp: give one of file, s3" in wrong
    (secret,) = errors_of(key, "https://me:secret@h/x")
    assert "https://***@h/x has a user in it" in secret
    assert "secret@" not in secret


@pytest.mark.parametrize("key", WRITTEN, ids=lambda key: key.dotted)
def test_what_is_written_takes_the_address_of_a_store_of_runs_alone(key: Key) -> None:
    for address in ("s3://b/x", "gs://b/x", "az://c/x", "lakefs://r/m/x", "memory://x"):
        assert errors_of(key, address) == []
    for address in ("https://h/x", "hf://owner/name/x"):
        (wrong,) = errors_of(key, address)
        assert f"{address}: runs are not kept there: name a folder, or a store that is one of s3" in wrong


@pytest.mark.parametrize("key", [*ONLY_HERE, *WRITTEN, *ANYWHERE], ids=lambda key: key.dotted)
def test_a_file_address_is_a_path_everywhere(key: Key) -> None:
    assert not [error for error in errors_of(key, "file:///a/b%20c") if "address" in error]


def test_the_config_has_the_path_of_a_file_address() -> None:
    weighted = {"path": "file:///rows.jsonl", "weight": 1}
    chat = ChatConfig.model_validate({"train": [weighted], "val": ["s3://b/x", "file:///v"], "cache_dir": "file:///c"})
    assert chat.train == [MixedSource(path="/rows.jsonl", weight=1)]
    assert (chat.val, chat.cache_dir) == (["s3://b/x", "/v"], "/c")


@pytest.mark.parametrize("key", ONLY_HERE, ids=lambda key: key.dotted)
@pytest.mark.parametrize("as_list", [False, True])
def test_every_path_of_the_config_rejects_addresses(key: Key, as_list: bool) -> None:
    name = key.path[-1]
    for address in ADDRESSES:
        with pytest.raises(ValidationError) as caught:
            key.owner.model_validate({name: ["here", address] if as_list else address})
        errors = [error for error in caught.value.errors() if error["loc"][:1] == (name,)]
        assert errors
        # A key that takes no list, or nothing but lists, says that instead.
        assert all("is an address" in error["msg"] or error["type"].endswith("_type") for error in errors)
        assert as_list or "is an address" in str(caught.value) or key.field.annotation == list[str]


def test_the_message_names_place_key_address_and_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {name: tokens, train: x, cache_dir: 's3://b/x'}\n")
    with pytest.raises(
        ConfigError, match=rf"{file}:1: data\.cache_dir: s3://b/x is an address, .* name a file or folder"
    ):
        load_config(str(file))
    with pytest.raises(ConfigError, match=r"override .*: output\.root_dir: https://b/x: runs are not kept there"):
        plain_config(["output.root_dir=https://b/x"])


def test_paths_and_names_of_the_hub_pass() -> None:
    for path in ("runs", "./a:b/c", "/x/2024:01/y", "c:/data", "~/x", "owner/name", "hub:owner/name", "a,b"):
        assert checked_path(path, LOCAL) == path
    for kind in (LOCAL_OR_HUB, ADDRESS):
        assert checked_path("hf://owner/name", kind) == "hf://owner/name"
    with pytest.raises(ConfigError, match="a model of the Hub as owner/name"):
        checked_path("hf://owner/name", LOCAL)


@pytest.mark.parametrize("path", ["a\0b", "x/" + "é" * 128, "file:///" + "a" * 256])
def test_a_path_that_no_file_system_takes_is_one_message(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (LOCAL, LOCAL_OR_HUB, ADDRESS):
        with pytest.raises(ConfigError, match=r"key: .*(NUL in it|more than 255 bytes)"):
            checked_path(path, kind, key="key")
    for command in ("inspect", "validate", "lineage", "runs") if "\0" not in path else ():
        assert run([command, path]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_file_address_means_its_path() -> None:
    for kind in (LOCAL, LOCAL_OR_HUB, ADDRESS, STORE):
        assert checked_path("file:///a/b%20c", kind) == "/a/b c"
        assert checked_path("file://localhost/a", kind) == "/a"
    with pytest.raises(ConfigError, match="key: file://server/a: files of another machine are not read"):
        checked_path("file://server/a", LOCAL, key="key")


PROGRAM: Any = typer.main.get_command(program())
PARAMETERS = [
    (f"{verb} {parameter.name}", parameter)
    for verb, command in PROGRAM.commands.items()
    for parameter in command.params
    if parameter.metavar is not None
    and parameter.metavar not in NO_PATH_WORDS
    and parameter.name not in READS_ADDRESSES_OPTIONS
    and parameter.metavar != "MODEL"
    and parameter.name not in READS_RUNS
]


@pytest.mark.parametrize("parameter", [one for _, one in PARAMETERS], ids=[name for name, _ in PARAMETERS])
def test_every_path_of_the_command_line_rejects_addresses(parameter: Any) -> None:
    several = parameter.multiple or parameter.nargs == -1
    for address in ADDRESSES:
        with pytest.raises(ConfigError, match="is an address"):
            parameter.process_value(typer.Context(PROGRAM), [address] if several else address)


@pytest.mark.parametrize(
    "argv",
    [
        ["publish", "--to", "s3://b/x"],
        ["merge", "--to", "s3://b/x"],
        ["export", "--to", "az://b/x"],
        ["train", "quickstart", "prepare.output=lakefs://r/main/x"],
        ["convert", "rows.jsonl", "s3://b/out.jsonl"],
        ["report", "--output", "s3://b/x.html"],
    ],
)
def test_no_folder_is_made(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert run(argv) == 2
    assert "is an address, and only paths of this machine work" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
