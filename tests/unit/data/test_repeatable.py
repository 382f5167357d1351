"""What is done twice is the same: in another process, with another hash seed, whatever a tokenizer's files say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.chat.encoding import ChatEncoder
from llmtrain.data.chat.supervision import Rendered
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.chat.tokenizer import load_fast_tokenizer
from llmtrain.data.tokenizers import load_hf_tokenizer, load_tokenizer
from llmtrain.errors import ConfigError
from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.tiny_run import write_config

TEXT = "What is it? It is the answer, of the assistant user system."


def change(folder: Path, **keys: Any) -> None:
    """Change keys of the tokenizer.json in a folder; `model` is changed key by key."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"].update(keys.pop("model", {}))
    file.write_text(json.dumps(content | keys))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A tokenizer, and the same with everything that makes its tokens another number, or others each time."""
    for name in ("plain", "odd"):
        tiny_chat_tokenizer(CHATML, adds_bos=True).save_pretrained(tmp_path / name)
    padding = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    change(
        tmp_path / "odd", model={"dropout": 0.5}, truncation=truncation, padding={**padding, "pad_to_multiple_of": None}
    )
    return tmp_path / "plain", tmp_path / "odd"


def test_truncation_padding_and_dropout_of_a_tokenizer_change_no_token(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    plain, odd = folders
    ids = load_tokenizer(plain).encode(TEXT)
    expected = ChatEncoder(ChatTemplate(load_fast_tokenizer(plain)))
    for _ in range(5):
        assert load_tokenizer(odd).encode(TEXT) == ids
        assert load_hf_tokenizer(str(odd)).encode(TEXT) == ids
        encoder = ChatEncoder(ChatTemplate(load_fast_tokenizer(odd)))
        assert encoder.encode_prompt(TEXT, is_complete=False) == expected.encode_prompt(TEXT, is_complete=False)
        (one,), (other,) = (
            each.encode([Rendered(TEXT, [(8, len(TEXT))], TEXT[:8], is_complete=False)]) for each in (encoder, expected)
        )
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.supervised.tolist() == other.supervised.tolist()
    assert "has BPE dropout (0.5): switched off" in caplog.text


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ ['a', 'b'] | random }}", "random"),
        ("{%- for message in messages %}{{ message['content'] |\n random | trim }}{% endfor %}", "random"),
        ("{% filter random %}ab{% endfilter %}", "random"),
        ("{{ lipsum(n=1) }}", "lipsum"),
    ],
)
def test_a_template_that_draws_at_random_is_rejected(template: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(ConfigError, match=rf"t\.jinja draws at random \(Jinja's '{name}'\).*data\.chat_template"):
        ChatTemplate(tiny_chat_tokenizer(CHATML), file=str(tmp_path / "t.jinja"))
    with pytest.raises(ConfigError, match="the tokenizer's chat template draws at random"):
        ChatTemplate(tiny_chat_tokenizer(template))


def test_a_template_may_use_the_words_and_its_date_is_said(caplog: pytest.LogCaptureFixture) -> None:
    words = CHATML + "{# a | random lipsum( #} | random {{ messages[0].random }}{% set random = 1 %}"
    assert "| random" in ChatTemplate(tiny_chat_tokenizer(words)).render([{"role": "user", "content": "a"}], None)
    caplog.set_level("INFO")
    dated = ChatTemplate(tiny_chat_tokenizer(CHATML + "{{ strftime_now('%d %b %Y') }}"))
    assert dated.render([{"role": "user", "content": "a"}], None).endswith("26 Jul 2024")
    assert "writes today's date: 26 Jul 2024 stands in its place" in caplog.text


TWICE = """
import hashlib, json, sys
from pathlib import Path
from llmtrain.config.loading.load import load_config
from llmtrain.data.chat.items import RowItems
from llmtrain.data.chat.parts import find_parts
from llmtrain.data.chat.prepare_rows import PreparedRows
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.chat.tokenizer import load_fast_tokenizer
from llmtrain.data.inspection.rows import inspect_rows
from llmtrain.data.prepare.token_shards import prepare
from llmtrain.evaluation.questions import read_questions
import numpy as np

folder, out = map(Path, sys.argv[1:])
prepare(load_config(str(folder / "text.yaml"), [f"prepare.output={out / 'shards'}"]).config)
files = sorted(path for path in (out / "shards").rglob("*") if path.is_file() and path.name != "manifest.json")
found = {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
chat = load_config(str(folder / "chat.yaml"), [f"data.cache_dir={out / 'cache'}"]).config.data
parts = find_parts(chat)
prepared = PreparedRows(chat, ChatTemplate(load_fast_tokenizer(folder / "tokenizer")), parts, num_workers=0)
stores = [prepared.ensure(part)[0] for part in parts.all]
found["samples"] = [[[ids.tolist(), learned.tolist()] for ids, learned in map(s.tokens, range(len(s)))] for s in stores]
options = dict(mixture=None, seed=3, seq_len=24, packing=True, mask_documents=True, pad_id=0)
items = RowItems(stores=stores[1:], **options)
places = items.open(shuffled=True).locate(np.arange(items.num_items))
found["order"] = [np.asarray(part).tolist() for part in places]
found["questions"] = str(read_questions([str(folder / "rows")], key="data"))
found["inspect"] = inspect_rows(str(folder / "rows"))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_ids_rows_splits_and_order_are_the_same_in_processes_with_other_hash_seeds(tmp_path: Path) -> None:
    tiny_chat_tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    change(tmp_path / "tokenizer", model={"dropout": 0.3})
    (tmp_path / "rows").mkdir()
    for name in "zax":
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{name}{n}?"},
                    {"role": "assistant", "content": "it is " * (n % 9 + 1)},
                ]
            }
            for n in range(30)
        ]
        (tmp_path / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.txt").write_text(f"{name} " + " ".join(f"word{n} é" for n in range(400)))
    data = {"name": "chat", "train": str(tmp_path / "rows"), "seq_len": 24, "val_fraction": 0.2}
    write_config(
        tmp_path / "chat.yaml", {"model": {"name": "huggingface", "path": str(tmp_path / "tokenizer")}, "data": data}
    )
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(40)))
    inputs = [str(tmp_path / "*.txt"), str(tmp_path / "texts.jsonl")]
    prepare = {"input": inputs, "output": "unused", "val_fraction": 0.3, "tokenizer": {"vocab_size": 400}}
    keys = {"data": {"name": "tokens", "train": "unused", "seq_len": 16}, "prepare": prepare}
    write_config(tmp_path / "text.yaml", keys)
    printed = []
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": str(1 + int(seed))}
        done = subprocess.run(
            [sys.executable, "-c", TWICE, str(tmp_path), str(tmp_path / f"out{seed}")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout.splitlines()[-1]))
    assert printed[0] == printed[1]
    assert {"order", "questions", "inspect"} < printed[0].keys()
