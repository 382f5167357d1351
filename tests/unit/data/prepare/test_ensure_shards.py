"""`ensure_shards`: what is missing is made once, what was made otherwise is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.sections.schema import Config
from llmtrain.data.prepare.token_shards import ensure_shards, prepare
from llmtrain.errors import ConfigError


def _config(folder: Path, *, data: dict[str, Any] | None = None, **options: Any) -> Config:
    section = {
        "input": str(folder / "in"),
        "output": str(folder / "out"),
        "val_fraction": 0.3,
        "tokenizer": {"vocab_size": 300},
        **options,
    }
    paths = {"train": str(folder / "out/train"), "val": str(folder / "out/val")}
    return Config.model_validate({"data": {"name": "tokens", "seq_len": 16, **(data or paths)}, "prepare": section})


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for number in range(20):
        (tmp_path / "in" / f"{number}.txt").write_text(f"this is document {number}")
    return tmp_path


def _made(config: Config) -> bool:
    stages: list[str] = []
    ensure_shards(config, progress=lambda stage, done, total, speed=None: stages.append(stage))
    return bool(stages)


def test_missing_shards_are_made_and_then_found(corpus: Path) -> None:
    assert _made(_config(corpus))
    assert not _made(_config(corpus))
    manifest = json.loads((corpus / "out" / "manifest.json").read_text())
    assert manifest["counts"]["read"] == 20


def test_globs_files_lists_and_links_name_the_same_shards(corpus: Path) -> None:
    (corpus / "link").symlink_to(corpus / "out")
    assert _made(_config(corpus))
    for train in (
        f"{corpus}/out/train/*.parquet",
        f"{corpus}/out/train/shard_00000.parquet",
        [{"path": f"{corpus}/out/train", "weight": 1}],
        f"{corpus}/link/train",
    ):
        config = _config(corpus, data={"train": train})
        assert not _made(config)
        with pytest.raises(ConfigError, match=r"prepare\.steps was \[.*exact_duplicates.*\], and is \[\]"):
            ensure_shards(_config(corpus, data={"train": train}, steps=[]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": {"vocab_size": 301}}, r"prepare\.tokenizer\.vocab_size was 300, and is 301"),
        ({"tokenizer": {}}, r"vocab_size was 300, and is 8192"),
        ({"tokenizer": {"kind": "hf", "path": "gpt2"}}, r"prepare\.tokenizer\.kind was bpe, and is hf"),
        ({"val_fraction": 0.2}, r"prepare\.val_fraction was 0\.3, and is 0\.2"),
        ({"keep_text": True}, r"prepare\.keep_text was False, and is True"),
        ({"include": ["1*.txt"]}, r"prepare\.include was \[\], and is \['1\*\.txt'\]"),
        ({"input": ["in", "in"]}, r"prepare\.input was 1 inputs, and is 2"),
    ],
)
def test_shards_that_were_made_otherwise_are_rejected(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(corpus)
    prepare(_config(corpus))
    with pytest.raises(ConfigError, match=rf"made otherwise: .*{message}.*llmtrain prepare CONFIG") as error:
        ensure_shards(_config(corpus, **options))
    assert "\n" not in str(error.value)


def test_changed_inputs_are_rejected_until_prepared_again(corpus: Path) -> None:
    prepare(_config(corpus))
    (corpus / "in" / "7.txt").write_text("THIS is document 7")
    with pytest.raises(ConfigError, match=r"in have changed: 20 files of 370 bytes then, 20 of 370 now"):
        ensure_shards(_config(corpus))
    prepare(_config(corpus))
    assert not _made(_config(corpus))
    (corpus / "in" / "7.txt").rename(corpus / "in" / "77.txt")
    with pytest.raises(ConfigError, match="have changed"):
        ensure_shards(_config(corpus))


def test_a_changed_tokenizer_is_rejected(corpus: Path) -> None:
    prepare(_config(corpus))
    path = corpus / "out" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ConfigError, match="tokenizer was changed afterwards"):
        ensure_shards(_config(corpus))


def test_a_changed_source_of_the_tokenizer_is_rejected(corpus: Path) -> None:
    prepare(_config(corpus, output=str(corpus / "first")))
    source = corpus / "first" / "tokenizer"
    config = _config(corpus, tokenizer={"kind": "hf", "path": str(source)})
    assert _made(config)
    assert not _made(config)
    (source / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "new": 1}')
    with pytest.raises(ConfigError, match=r"the tokenizer in .*first/tokenizer has changed"):
        ensure_shards(config)


def test_what_decides_nothing_may_change(corpus: Path) -> None:
    prepare(_config(corpus))
    assert not _made(_config(corpus, num_workers=1, on_error="skip", output=f"{corpus}/./out"))


def test_shards_are_used_where_the_inputs_are_not(corpus: Path) -> None:
    prepare(_config(corpus))
    (corpus / "in").rename(corpus / "elsewhere")
    assert not _made(_config(corpus))
    with pytest.raises(ConfigError, match="steps"):
        ensure_shards(_config(corpus, steps=[]))


def test_missing_shards_that_prepare_would_not_make_are_an_error(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train: .*/other/train: no token shards .* should be .*/out/train"):
        ensure_shards(_config(corpus, data={"train": f"{corpus}/other/train"}))
    with pytest.raises(ConfigError, match=r"data\.val: .* holds nothing when prepare\.val_fraction is 0"):
        ensure_shards(_config(corpus, val_fraction=0))
    config = _config(corpus).model_copy(update={"prepare": None})
    with pytest.raises(ConfigError, match=r"data\.train: .*/out/train: no token shards there.*llmtrain prepare CONFIG"):
        ensure_shards(config)
    assert not (corpus / "out").exists()


def test_shards_of_another_folder_are_not_compared(corpus: Path) -> None:
    prepare(_config(corpus))
    data = {"train": f"{corpus}/out/train", "val": f"{corpus}/out/val"}
    assert not _made(_config(corpus, data=data, output=str(corpus / "not made"), steps=[]))


def test_synthetic_data_needs_no_shards(corpus: Path) -> None:
    assert not _made(_config(corpus, data={"name": "synthetic"}))


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_ensure_shards import _config, _made
sys.stdin.readline()
print(_made(_config(Path({folder!r}))))
"""


def test_of_processes_that_start_together_one_prepares(corpus: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(corpus))
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert answers == ["False", "False", "True"]
    assert [process.returncode for process in processes] == [0, 0, 0]
