"""What goes in comes out: the files of a base model, in the run, the merged or exported model and the published folder.

Each is compared with the base's, file by file: equal, or changed for the reason in REASONS.
"""

from __future__ import annotations

import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from llmtrain.api import load_model
from llmtrain.config.loading.load import load_config
from llmtrain.errors import ConfigError
from llmtrain.publishing.exported import Request
from llmtrain.verbs.evaluate import evaluate
from llmtrain.verbs.export import export
from llmtrain.verbs.merge import merge
from llmtrain.verbs.publish import publish
from llmtrain.verbs.train import train
from tests.support.full_base import TOOL_USE, write_full_base
from tests.support.tiny_run import tiny_tuning, write_config

REASONS = {
    "config.json": "transformers writes it: its version, the dtype of the weights",
    "*.safetensors": "other weights, in one file where they are small",
    "model.safetensors.index.json": "one file of weights has none",
    "README.md": "the base's card is of the base; a published model has its own",
    "notes.txt": "belongs to no model",
}
"""Why a file of the base is another one or is missing afterwards."""
NEW = {
    "README.md": "the card",
    "model.safetensors": "the weights",
    "adapter_*": "the adapter",
    "export.json": "what was made of what",
    "publish.json": "what was published",
    "config.yaml": "the run's config, for the card",
    "curves.svg": "the losses, for the card",
}
"""What a later folder has besides."""
ENDS_ADDED = "generation_config.json"
"""In results that are made for others the end of a turn, which was learned, is an end token too; the rest is equal."""

GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1},
    "unsaid": {"temperature": 0.6, "top_k": 20, "eos_token_id": [1, 4]},
    "sampled": {"do_sample": True, "temperature": 1.5, "min_p": 0.1, "eos_token_id": 1, "a_key_of_its_own": "ü"},
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(base: Path, folder: Path, *, ends: list[int] | None = None) -> None:
    before, after = files_of(base), files_of(folder)
    for name, content in before.items():
        if any(fnmatch(name, pattern) for pattern in REASONS):
            continue
        assert name in after, f"{folder.name} lacks {name}"
        if name == ENDS_ADDED and ends is not None:
            expected = {**json.loads(content), "eos_token_id": ends}
            assert json.loads(after[name]) == expected
        else:
            assert after[name] == content, f"{name} of {folder.name} is another one"
    new = after.keys() - before.keys()
    assert not [name for name in new if not any(fnmatch(name, pattern) for pattern in NEW)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora", "base_has"),
    [
        ("greedy", {"r": 2}, {"tied": True}),
        ("unsaid", None, {"tied": True, "template_files": False}),
        ("sampled", None, {"code": True}),
        ("sampled", {"r": 2}, {"code": True}),
        ("greedy", {"r": 2, "target_modules": ["q_proj", "lm_head"]}, {"tied": True, "template_files": False}),
    ],
    ids=["lora", "full", "code", "lora-and-code", "lora-on-a-tied-head"],
)
def test_all_files_of_the_base_go_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lora: dict[str, Any] | None, base_has: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_full_base(tmp_path / "base", generation=GENERATION[kind], **base_has)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It is."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": turns, "id": n}) + "\n" for n in range(24)))
    model = {"name": "huggingface", "path": str(base), "lora": lora, "trust_remote_code": "code" in base_has}
    keys = tiny_tuning(tmp_path, tmp_path / "rows.jsonl", model, seq_len=64, max_steps=1)
    keys["data"]["val_fraction"] = 0
    keys["output"]["run_id"] = "one"
    done = train(load_config(str(write_config(tmp_path / "tuned.yaml", keys))))

    assert_same(base, Path(done["model"]).resolve())
    make = merge if lora else export
    make("one", Request(to="made", device="cpu"))
    turn_ends = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    declared = GENERATION[kind]["eos_token_id"]
    ends = sorted({turn_ends, 1, 2, *(declared if isinstance(declared, list) else [declared])})
    assert_same(base, tmp_path / "made", ends=ends)
    if "code" in base_has:
        with pytest.raises(ConfigError, match="--trust-remote-code"):
            load_model("made", device="cpu")
        assert load_model("made", device="cpu", trust_remote_code=True).generate("What?", max_new_tokens=2)
        asked = {"data": ["rows.jsonl"], "max_samples": 2, "max_new_tokens": 2, "baseline": str(base)}
        with pytest.raises(ConfigError, match="--trust-remote-code"):
            evaluate("made", settings=asked)
        found = evaluate("made", settings=asked, trust_remote_code=True, root_dir="elsewhere")
        assert found["baseline"] == str(base)
        assert found["comparison"]["exact_match"]["ties"] == 2
        publish("made", given={"license": "mit", "to": "published-again"})
        assert_same(base, tmp_path / "published-again", ends=ends)
    publish("one", given={"license": "mit", "to": "published", "tags": ["no", "chat"]})
    assert_same(base, tmp_path / "published", ends=ends)

    assert GenerationConfig.from_pretrained(tmp_path / "made").do_sample == GENERATION[kind].get("do_sample")
    assert AutoTokenizer.from_pretrained(tmp_path / "published").get_chat_template(tools=[{}]) == TOOL_USE
    card = (tmp_path / "published" / "README.md").read_text()
    assert str(tmp_path) not in card + (tmp_path / "published" / "config.yaml").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    if lora:
        assert "base, the model that this adapter was trained on, is not published with it" in code
        code = code.replace('"BASE"', repr(str(base)))
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "published", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    if "code" in base_has:
        asked = {"data": ["rows.jsonl"], "max_samples": 2, "max_new_tokens": 2, "subject": "base", "baseline": None}
        assert evaluate("one", settings=asked)["model"] == str(base), "the run trusts its base's code"
