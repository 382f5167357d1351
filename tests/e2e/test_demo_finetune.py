"""`make demo-finetune`, on a corpus and a model of a few seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.demos.finetune import demo_finetune
from llmtrain.errors import ConfigError, RunError
from llmtrain.verbs.train import train

FILE = '''"""Functions of module {number}."""

def get_{number}(self, name, default=None):
    """Return the value of item {number} of the table."""
    return self.table_{number}.get(name, default)

def put_{number}(self, name, value):
    """Store a value as item {number} of the table."""
    self.table_{number}[name] = value
'''
PLAIN = ["run.device=cpu", "trainer.compile=false"]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    for number in range(150):
        (tmp_path / "source" / f"module_{number}.py").write_text(FILE.format(number=number))
    return [f"prepare.input={tmp_path / 'source'}", "prepare.val_fraction=0.2", "prepare.tokenizer.vocab_size=400"]


def tiny_quickstart(corpus: list[str]) -> None:
    small = [
        "model.d_model=32",
        "model.num_layers=1",
        "model.attention.num_heads=2",
        "trainer.max_steps=3",
        "trainer.micro_batch_size=2",
    ]
    train(load_config("quickstart", [*corpus, *small, *PLAIN]))


SMALL = [*PLAIN, "data.cache_dir=cache", "trainer.max_epochs=null", "trainer.micro_batch_size=4"]


@pytest.mark.slow
def test_it_ends_with_a_comparison_and_a_published_model_that_transformers_loads(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_quickstart(corpus)
    assert demo_finetune(corpus=corpus, overrides=[*SMALL, "trainer.max_steps=12"], required="loss", num_test=6) == 0
    printed = capsys.readouterr().out
    assert "6 held-out questions, before and after" in printed
    assert [printed.count(f"\n    {who} ") for who in ("expected", "before", "after")] == [3, 3, 3]
    assert "3 of 3 answers are the same there" in printed
    (published,) = (tmp_path / "artifacts" / "models").iterdir()
    assert {"README.md", "adapter_model.safetensors", "evaluation.json"} <= {path.name for path in published.iterdir()}


@pytest.mark.slow
def test_what_did_not_become_better_is_not_published(corpus: list[str], tmp_path: Path) -> None:
    tiny_quickstart(corpus)
    with pytest.raises(RunError, match="exact_match is not shown to be better"):
        demo_finetune(corpus=corpus, overrides=[*SMALL, "trainer.max_steps=1"], num_test=3)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.slow
def test_without_the_model_of_the_first_demo_it_says_what_is_missing(corpus: list[str]) -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        demo_finetune(corpus=corpus, overrides=SMALL)
