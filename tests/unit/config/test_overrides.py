"""Overrides of the command line replace values of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.sections.data import SyntheticConfig, TokensConfig
from tests.support.configs import MINIMAL, load, message_of


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "trainer.max_steps=5",
        "trainer.max_steps=7",
        "optimizer.lr=1e-3",
        "optimizer.betas=[0.8, 0.9]",
        "trainer.compile=true",
        "trainer.max_grad_norm=null",
        "prepare.output=a=b",
        "prepare.input=texts",
        "scheduler={name: wsd, decay_ratio: 0.5}",
        "run.notes=",
        "data.train=data/*.parquet",
    )
    assert config.trainer.max_steps == 7
    assert config.optimizer.lr == 0.001
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.trainer.compile is True
    assert config.trainer.max_grad_norm is None
    assert config.prepare is not None
    assert config.prepare.output == "a=b"
    assert config.scheduler.decay_ratio == 0.5
    assert config.run.notes is None
    assert isinstance(config.data, TokensConfig)
    assert config.data.train == "data/*.parquet"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", 'override "foo": expected key=value, such as trainer.max_steps=100'),
        ("=x", 'override "=x": expected key=value'),
        ("run..name=x", 'override "run..name=x": expected key=value'),
        ("data.train[0]=x", "a list is replaced whole: key=[a, b]"),
        (
            "data.train.x=1",
            'override "data.train.x=1": data.train is not a section; it was given as a value at c.yaml:1',
        ),
        ("data.train=*.parquet", "'data.train=\"*.parquet\"'"),
        (
            "trainer.max_step=3",
            'override "trainer.max_step=3": trainer.max_step: unknown key; did you mean trainer.max_steps?',
        ),
        ("data.seq_len=3.5", 'override "data.seq_len=3.5": data.seq_len: expected an integer (got 3.5)'),
        ("run.seed=true", 'override "run.seed=true": run.seed: expected a number (got true)'),
        ("prepare.output=x", 'override "prepare.output=x": prepare.input: missing'),
        ("data.vocab_size=9", "data.vocab_size: a key of data.name: synthetic, but data.name is tokens"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str, tmp_path: Path) -> None:
    assert message in message_of(tmp_path, MINIMAL, override)


def test_another_data_source_keeps_only_the_keys_that_it_has(tmp_path: Path) -> None:
    text = "data: {name: tokens, train: a, val: b, seq_len: 64, num_workers: 2, mask_documents: false}\n"
    data = load(tmp_path, text, "data.name=synthetic", "data.num_items=8").data
    assert data == SyntheticConfig(seq_len=64, num_workers=2, num_items=8)


def test_keys_of_another_data_source_are_faults_in_the_file_and_as_overrides(tmp_path: Path) -> None:
    text = "data:\n  name: synthetic\n  train: a\n"
    assert "c.yaml:3: data.train: a key of data.name: tokens" in message_of(tmp_path, text)
    assert "c.yaml:3: data.train" in message_of(tmp_path, text, "data.name=synthetic")
    assert 'override "data.train=x": data.train' in message_of(tmp_path, MINIMAL, "data.train=x", "data.name=synthetic")
