"""The analysis of whole corpora: text, rows, shards and rows of a config, hostile ones too, as page, JSON and PNG."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.data.inspection import excerpts
from llmtrain.data.inspection.analysis_options import AnalysisOptions
from llmtrain.data.inspection.plain_text import holds_text, inspect_texts
from llmtrain.data.inspection.rows import inspect_rows
from llmtrain.data.tokenizers import Tokenizer, train_bpe
from llmtrain.reports import analysis_pictures
from llmtrain.screen import CONTROL
from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.planted import PLANTED
from tests.support.tiny_run import write_config
from tests.support.token_shards import write_token_shards

TEXTS = [f"def f_{number}(x):\n    return x + {number}\n" * (1 + number % 4) for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, vocab_size=300)


def write_texts(folder: Path, texts: list[str]) -> Path:
    for number, text in enumerate(texts):
        path = folder / ("a", "b")[number % 2] / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def analysis_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(["inspect", *argv, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    found: dict[str, Any] = report["analysis"]
    return found


def check_counts(found: dict[str, Any], documents: list[list[Any]], names: Callable[[Any], str]) -> None:
    """The numbers are those of these documents."""
    counts = Counter(token for document in documents for token in document)
    pairs = Counter(pair for document in documents for pair in pairwise(document))
    assert found["documents"] == len(documents)
    assert found["lengths"]["total"] == counts.total() == found["frequencies"]["total"]
    assert found["lengths"]["longest"] == max(map(len, documents))
    assert {row["token"]: row["count"] for row in found["frequencies"]["top"]} == {
        names(token): count for token, count in counts.items()
    }
    assert found["bigrams"]["transitions"] == pairs.total()
    assert Counter({(row["from"], row["to"]): row["count"] for row in found["bigrams"]["top"]}) == Counter(
        {(names(a), names(b)): count for (a, b), count in pairs.items()}
    )
    texts = Counter(map(tuple, documents))
    assert found["duplicates"]["duplicates"] == len(documents) - len(texts)


def test_text_is_counted_in_words_by_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [*TEXTS, TEXTS[0]]
    folder = write_texts(tmp_path, texts)
    assert holds_text(str(folder))
    found = analysis_of([str(folder), "--num-listed", "1000"], capsys)
    assert (found["unit"], found["vocabulary_size"]) == ("words", None)
    check_counts(found, [words_of(text) for text in texts], str)
    assert {row["source"]: row["documents"] for row in found["sources"]} == {"a": 21, "b": 20}
    num_words = sum(len(words_of(text)) for text in texts)
    assert found["bytes_per_unit"] == pytest.approx(sum(map(len, texts)) / num_words)
    assert found["sample"]["is_all"]
    assert found["duplicates"]["most_repeated"][0]["copies"] == 2


def test_text_and_rows_are_counted_in_the_tokens_of_a_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    folder = write_texts(tmp_path / "texts", TEXTS)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for path in (folder, rows):
        options = ["--tokenizer", str(tmp_path / "tokenizer"), "--num-listed", "1000"]
        found = analysis_of([str(path), *options], capsys)
        assert (found["unit"], found["vocabulary_size"]) == ("tokens", 300)
        assert sum(row["total"] for row in found["frequencies"]["by_id"]) == found["frequencies"]["total"]
        by_id = {row["id"]: row["count"] for row in found["frequencies"]["top"]}
        assert by_id == Counter(token for text in TEXTS for token in tokenizer.encode(text))


def write_shards(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    cut = [[documents[begin : begin + 5]] for begin in range(0, len(documents), 5)]
    write_token_shards(folder, {"train": cut}, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    tokenizer.save(folder / "tokenizer")
    return documents


def test_shards_are_counted_with_their_end_tokens(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = write_shards(tmp_path, tokenizer, TEXTS)
    found = analysis_of([str(tmp_path), "--analyse", "--num-listed", "100000"], capsys)
    by_id = {row["id"]: row["count"] for row in found["frequencies"]["top"]}
    assert by_id == Counter(token for document in documents for token in document)
    pairs = {(row["from_id"], row["to_id"]): row["count"] for row in found["bigrams"]["top"]}
    assert pairs == Counter(pair for document in documents for pair in pairwise(document))
    assert found["lengths"]["total"] == sum(map(len, documents))
    assert [row["documents"] for row in found["shards"]] == [5] * 8
    assert found["shards"][0]["file"] == str(tmp_path / "train/shard_00000.parquet")
    assert found["shards"][0]["total"] == sum(map(len, documents[:5]))
    assert found["bytes_per_unit"] == 3  # as the manifest says


def test_a_sample_of_shards_is_of_row_groups_and_says_so(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, tokenizer, TEXTS)
    asked = [str(tmp_path), "--sample", "0.5", "--sample-seed", "3"]
    found, again = analysis_of(asked, capsys), analysis_of(asked, capsys)
    assert found == again
    sample = found["sample"]
    assert (sample["share_asked"], sample["seed"], sample["blocks"]) == (0.5, 3, 8)
    assert 0 < sample["blocks_analysed"] < 8
    assert found["documents"] == 5 * sample["blocks_analysed"]
    assert run(["inspect", *asked]) == 0
    out = capsys.readouterr().out
    assert f"a sample: {found['documents']} documents" in out
    assert f"{sample['blocks_analysed']} of 8 blocks" in out
    assert "copies outside of the sample are not seen" in out
    assert run(["inspect", str(tmp_path), "--sample", "0.0001"]) == 2
    assert "--sample 0.0001 takes none of the 8 blocks" in capsys.readouterr().err


def test_a_large_corpus_of_text_is_sampled_unless_all_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 5))
    monkeypatch.setattr("llmtrain.data.inspection.analysis_options.SAMPLE_BYTES", rows.stat().st_size // 2)
    part = inspect_rows(str(rows), analyse=AnalysisOptions())["analysis"]
    assert part["sample"]["share_asked"] == pytest.approx(0.5, abs=0.01)
    assert 50 < part["documents"] < 150
    assert inspect_rows(str(rows), analyse=AnalysisOptions(share=1.0))["analysis"]["documents"] == 200


def test_rows_of_a_config_are_counted_as_a_run_sees_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tokenizer"
    tiny_chat_tokenizer(CHATML, adds_bos=True).save_pretrained(folder)
    rows = [
        {"messages": [{"role": "user", "content": f"{n} red"}, {"role": "assistant", "content": "green " * n}]}
        for n in range(1, 30)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "model": {"name": "huggingface", "path": str(folder)},
        "data": {"name": "chat", "train": str(tmp_path / "rows.jsonl"), "seq_len": 32, "val_fraction": 0.3},
    }
    config = str(write_config(tmp_path / "c.yaml", keys))
    for split in ("train", "val"):
        assert run(["inspect", config, "--analyse", "--split", split, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        found, part = report["analysis"], report[split]
        assert found["documents"] == part["samples"]
        assert found["lengths"]["total"] == part["tokens"]
        assert found["sources"][0]["source"] == str(tmp_path / "rows.jsonl")
        assert found["unit"] == "tokens"


HOSTILE: dict[str, list[str]] = {
    "planted": [PLANTED, f"\ufeff{PLANTED} \ufffe\uffff \x00"],
    "a very long word": ["x" * 1_000_000],
    "one document": ["only this"],
    "all the same": ["the same text again and again"] * 30,
    "nothing but blanks": [" \n\t" * 50, ""],
    "one token": ["x"],
    "marks alone": ["\u0301" * 400, "!?." * 300],
    "not latin": ["你好世界 " * 50, "שלום עולם " * 50, "नमस्ते दुनिया " * 50],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_corpus_makes_a_page_pictures_and_numbers(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = HOSTILE[kind]
    folder = write_texts(tmp_path / "texts", texts)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for path in [folder] if kind == "nothing but blanks" else [folder, rows]:  # blank rows are faults
        page, pictures = tmp_path / "page.html", tmp_path / "png"
        assert run(["inspect", str(path), "--html", str(page), "--png", str(pictures)]) == 0
        out = capsys.readouterr().out
        assert CONTROL.search(out) is None
        html = page.read_text(encoding="utf-8")
        assert CONTROL.search(html) is None
        assert "://" not in re.sub(re.escape(str(tmp_path)) + "|http://planted", "", html)
        assert not re.search("<(script|img)", html.partition("</head>")[2])
        assert len(html) < 400_000
        assert all(file.read_bytes().startswith(b"\x89PNG") for file in pictures.iterdir())
        found = analysis_of([str(path), "--analyse"], capsys)
        assert found["documents"] == len(texts)
        assert found["duplicates"]["duplicates"] == len(texts) - len(set(texts))


def test_an_empty_corpus_is_one_message_or_a_report_without_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    assert run(["inspect", str(tmp_path / "nothing"), "--analyse"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("")
    assert run(["inspect", str(tmp_path / "empty.txt"), "--html", str(tmp_path / "page.html")]) == 0
    assert "all: 1 document, 0 words" in capsys.readouterr().out
    (tmp_path / "empty.jsonl").write_text("")
    assert run(["inspect", str(tmp_path / "empty.jsonl"), "--analyse"]) == 2  # an empty file of rows is a fault


def test_text_that_cannot_be_read_is_a_fault_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path, ["good text"])
    (tmp_path / "bad.txt").write_bytes(b"one\ntwo \xff\n")
    assert run(["inspect", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "bad.txt:2: " in out
    assert "all: 1 document, 2 words" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sample", "0"], "--sample is 0"),
        (["--sample", "1.5"], "--sample is 1.5"),
        (["--tokenizer", "/no/such/folder"], "no such folder"),
        (["--num-rows", "1"], "--num-rows does not apply"),
        (["--html", "no/such/page.html"], "cannot be written"),
        (["--png", "text.txt/png"], "cannot be written"),
    ],
)
def test_a_wrong_option_gives_one_message_and_exit_code_2(
    tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    assert run(["inspect", "text.txt", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_tokenizer_is_not_for_data_that_have_one(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, tokenizer, TEXTS[:5])
    assert run(["inspect", str(tmp_path), "--tokenizer", str(tmp_path / "tokenizer")]) == 2
    assert "--tokenizer does not apply" in capsys.readouterr().err


def test_what_is_not_installed_is_said_with_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some text")
    monkeypatch.setattr(analysis_pictures, "find_spec", lambda name: None)
    monkeypatch.setattr(excerpts, "find_spec", lambda name: None)
    assert run(["inspect", str(tmp_path / "text.txt"), "--png", str(tmp_path / "png")]) == 2
    error = capsys.readouterr().err
    assert "resvg-py" in error
    assert "[png]" in error
    assert not (tmp_path / "png").exists()
    found = inspect_texts(str(tmp_path / "text.txt"), AnalysisOptions())["analysis"]
    assert "[quality]" in found["languages"]["not_measured"]
    assert run(["inspect", str(tmp_path / "text.txt")]) == 0
    assert "not measured: telling languages needs py3langid" in capsys.readouterr().out.replace("\n", " ")


def test_a_machine_without_fonts_gets_a_message_and_no_pictures_without_text(tmp_path: Path) -> None:
    class WithoutFonts:
        def svg_to_bytes(self, **_: Any) -> bytes:
            return b"\x89PNG"

    assert not analysis_pictures._has_fonts(WithoutFonts())
    import resvg_py

    assert analysis_pictures._has_fonts(resvg_py)


def test_the_report_fits_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_texts(tmp_path, TEXTS)
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["inspect", str(folder), "--num-documents", "0"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
