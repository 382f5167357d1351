"""Which files are the corpus."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.sections.data import DatasetInput, PrepareConfig
from llmtrain.data.prepare.inputs import find_inputs, inputs_are_here, named_inputs
from llmtrain.errors import ConfigError


def _make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def _found(folder: Path, source: str | list[str], **options: object) -> list[list[str]]:
    config = PrepareConfig.model_validate({"input": source, "output": str(folder / "out"), **options})
    return [[file.name for file in found.files] for found in find_inputs(config)]


def test_a_folder_is_read_recursively_and_sorted(tmp_path: Path) -> None:
    _make(tmp_path / "in", "b.txt", "a/z.md", "a/b/c.py", "rows.jsonl", "a.ndjson", "image.png", "a/x.pyc", "README")
    assert _found(tmp_path, str(tmp_path / "in")) == [["a.ndjson", "a/b/c.py", "a/z.md", "b.txt", "rows.jsonl"]]
    found = find_inputs(PrepareConfig(input=str(tmp_path / "in"), output="out"))
    assert [file.format for file in found[0].files] == ["jsonl", "text", "text", "text", "jsonl"]


def test_hidden_files_and_folders_and_the_output_are_left_out(tmp_path: Path) -> None:
    _make(tmp_path, "a.txt", ".hidden.txt", ".git/b.txt", "out/train/c.txt", "sub/d.txt")
    assert _found(tmp_path, str(tmp_path)) == [["a.txt", "sub/d.txt"]]
    assert _found(tmp_path, f"{tmp_path}/**/*.txt") == [["a.txt", "sub/d.txt"]]


def test_include_takes_unknown_kinds_and_exclude_leaves_out_folders(tmp_path: Path) -> None:
    _make(tmp_path / "in", "a.py", "b.log", "site-packages/c.py", "x/site-packages/d.py", "x/e.py", "x/y/f.py")
    source = str(tmp_path / "in")
    assert _found(tmp_path, source, include=["*.log"]) == [["b.log"]]
    assert _found(tmp_path, source, include=["*.py"], exclude=["site-packages"]) == [["a.py", "x/e.py", "x/y/f.py"]]
    assert _found(tmp_path, source, include=["*.py"], exclude=["x/y"]) == [["a.py", "site-packages/c.py", "x/e.py",
                                                                          "x/site-packages/d.py"]]  # fmt: skip
    assert _found(tmp_path, source, include=["x"]) == [["x/e.py", "x/site-packages/d.py", "x/y/f.py"]]
    assert _found(tmp_path, f"{source}/**/*.py", exclude=["site-packages", "x/y"]) == [["a.py", "x/e.py"]]


def test_a_named_file_is_always_taken(tmp_path: Path) -> None:
    _make(tmp_path, "corpus", "odd[1].txt")
    assert _found(tmp_path, [str(tmp_path / "corpus"), str(tmp_path / "odd[1].txt")], exclude=["*"]) == [
        ["corpus"],
        ["odd[1].txt"],
    ]


def test_a_file_that_two_inputs_name_is_read_once(tmp_path: Path) -> None:
    _make(tmp_path / "in", "a.txt", "b.txt")
    (tmp_path / "in" / "c.txt").symlink_to(tmp_path / "in" / "a.txt")
    inputs = [str(tmp_path / "in" / "b.txt"), str(tmp_path / "in"), f"{tmp_path}/in/*.txt"]
    assert _found(tmp_path, inputs) == [["b.txt"], ["a.txt"], []]


def test_links_to_folders_are_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _make(tmp_path / "in", "a.txt")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert _found(tmp_path, str(tmp_path / "in")) == [["a.txt"]]
    assert "1 link to a folder is not followed" in caplog.text


def test_inputs_are_named_by_the_shortest_distinct_end_of_their_path(tmp_path: Path) -> None:
    _make(tmp_path, "one/data/a.txt", "two/data/b.txt", "three/c.txt")
    inputs: list[str | DatasetInput] = [
        str(tmp_path / "one/data"),
        f"{tmp_path}/two/data/*.txt",
        str(tmp_path / "three/c.txt"),
    ]
    found = find_inputs(PrepareConfig(input=inputs, output="out"))
    assert [source.name for source in found] == ["one/data", "two/data", "three"]
    assert [source.path for source in found] == inputs


def test_relative_paths_start_at_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path, "texts/a.txt")
    monkeypatch.chdir(tmp_path)
    for source in ("texts", "texts/a.txt", "texts/*.txt", "*/a.txt", "**/*.txt"):
        assert [name.removeprefix("texts/") for [name] in _found(tmp_path, source)] == ["a.txt"]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nothing", {}, "no such file or folder"),
        ("*.nothing", {}, "the glob matches no file"),
        ("empty", {}, "no files of text or rows in this folder"),
        ("pictures", {}, r"files of other kinds: \.png \(2\): name the wanted ones in prepare.include"),
        ("in", {"include": ["*.rs"]}, r"no files of text or rows in this folder with include \['\*\.rs'\]"),
        ("in/a.tar.gz", {}, r"\.tar\.gz files are not read"),
        ("in/a.zip", {}, r"\.zip files are not read"),
        ([], {}, "empty list"),
        (["in", "nothing"], {}, "nothing: no such file"),
    ],
)
def test_missing_input_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | list[str], options: dict[str, object], message: str
) -> None:
    _make(tmp_path, "in/a.txt", "in/a.tar.gz", "in/a.zip", "pictures/a.png", "pictures/b.png")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        _found(tmp_path, source, **options)


def test_a_dataset_of_the_hub_is_named_as_everywhere() -> None:
    named = PrepareConfig(input=["hf://owner/name@en:train[:10%]", "hf://name"], output="out")
    assert named_inputs(named) == [
        DatasetInput(path="hf://owner/name", configs=["en"], split="train[:10%]"),
        DatasetInput(path="hf://name"),
    ]


def test_inputs_are_here_tells_whether_all_are(tmp_path: Path) -> None:
    _make(tmp_path, "a.txt")
    here, gone = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    assert inputs_are_here(PrepareConfig(input=here, output="out"))
    assert inputs_are_here(PrepareConfig(input=f"{tmp_path}/*.txt", output="out"))
    assert not inputs_are_here(PrepareConfig(input=[here, gone], output="out"))


def test_a_file_name_of_any_bytes_has_a_label(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    try:
        (tmp_path / "in" / name).write_text("x")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    [source] = find_inputs(PrepareConfig(input=str(tmp_path / "in"), output="out"))
    assert source.files[0].label == "caf\\xe9.txt"
