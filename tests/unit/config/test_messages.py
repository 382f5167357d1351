"""Messages about a config name the line, the key, the expected and the given value, and the nearest valid name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config.loading.load import load_config
from llmtrain.config.loading.walk import dotted, walk
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError
from tests.support.configs import message_of

DATA = "data: {name: tokens, train: shards}\n"
BROKEN = """\
run:
  device: gpu
  name: ""
data:
  name: tokens
  train:
    - path: a
      wieght: 1
  seq_len: 0
model:
  attention: {num_heads: 6, num_kv_heads: 4, variant: gqa}
  ffn:
    varient: mlp
optimizer:
  name: adamm
  betas: [0.9]
trainer:
  lr: 1e-3
  micro_batch_size: true
  max_epochs: .inf
  compile: maybe
loging: {level: INFO}
"""


def test_all_faults_are_listed_in_the_order_of_the_file(tmp_path: Path) -> None:
    assert message_of(tmp_path, BROKEN).splitlines() == [
        "13 faults in the config",
        'c.yaml:2: run.device: expected text: auto, cpu, cuda, cuda:N or mps (got "gpu")',
        'c.yaml:3: run.name: expected text that is not empty (got "")',
        "c.yaml:8: data.train[0].wieght: unknown key; did you mean data.train[0].weight?",
        "c.yaml:9: data.seq_len: expected a number ≥ 1 (got 0)",
        "c.yaml:11: model.attention: num_heads 6 is not divisible by num_kv_heads 4",
        "c.yaml:13: model.ffn.varient: unknown key; did you mean model.ffn.variant?",
        'c.yaml:15: optimizer.name: expected one of adamw, adam, sgd, muon, adamw8bit (got "adamm"); did you mean '
        "adam?",
        "c.yaml:16: optimizer.betas: expected a longer list (got [0.9])",
        "c.yaml:18: trainer.lr: unknown key: it is optimizer.lr now",
        "c.yaml:19: trainer.micro_batch_size: expected a number (got true)",
        "c.yaml:20: trainer.max_epochs: expected a finite number (got Infinity)",
        'c.yaml:21: trainer.compile: expected auto or true or false (got "maybe")',
        "c.yaml:22: loging: unknown key; did you mean logging?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "trainer:\n\n  # why\n  max_step: 3\n",
            "c.yaml:5: trainer.max_step: unknown key; did you mean trainer.max_steps?",
        ),
        ("trainer: {LR: 1}\n", "trainer.LR: unknown key"),
        ("trainer: {num_heads: 3}\n", "trainer.num_heads: unknown key here; it is model.attention.num_heads"),
        ("optimizer: {enabled: true}\n", "optimizer.enabled: unknown key here; it is tracking.tensorboard.enabled"),
        ("prepare: {input: a, output: b, tokenizer: {vocab: 9}}\n", "prepare.tokenizer.vocab: unknown key"),
        ("model: {norm: {typ: rmsnorm}}\n", "model.norm.typ: unknown key; did you mean model.norm.type?"),
        ("foo: 1\n", "foo: unknown key; the top has schema_version, run, model"),
        ("foo: {max_epochs: 1}\n", "foo.max_epochs: unknown key here; it is trainer.max_epochs"),
        ("quantizaton: 4bit\n", "quantizaton: unknown key"),
        ("run: {'1': 2}\n", "run.1: unknown key; run has name, seed"),
        ("logging: {level: debug}\n", 'expected one of DEBUG, INFO, WARNING, ERROR (got "debug"); did you mean DEBUG?'),
        (
            "model: {name: decodr}\n",
            'model.name: expected one of decoder, huggingface, package.module:Class (got "decodr"); did you mean dec',
        ),
        ("schema_version: 2\n", "schema_version: expected 1 (got 2)"),
        ("run: 5\n", "run: expected a section, with keys of its own (got 5)"),
        ("run: {seed: -1}\n", "run.seed: expected a number ≥ 0 (got -1)"),
        ("run: {seed: 9223372036854775808}\n", "run.seed: expected a number < 9223372036854775808"),
        ("run: {seed: ten}\n", 'run.seed: expected an integer (got "ten")'),
        ("run: {tags: one}\n", 'run.tags: expected a list (got "one")'),
        ("run: {deterministic: sometimes}\n", 'run.deterministic: expected true or false (got "sometimes")'),
        ("model: {dropout: 1.0}\n", "model.dropout: expected a number < 1 (got 1.0)"),
        ("optimizer: {betas: [1, 2, 3]}\n", "optimizer.betas: expected a list of 2 (got [1, 2, 3])"),
        ("optimizer: {betas: 0.9}\n", "optimizer.betas: expected a list (got 0.9)"),
        ("logging: {file_name: a/b}\n", "logging.file_name: expected text: Name of the log file"),
        (f"run: {{device: {'x' * 100}}}\n", "x…)"),
    ],
)
def test_a_fault_says_what_was_expected(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in message_of(tmp_path, DATA + text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "run: {name: x}\n",
            "c.yaml:1: data: missing: Which tokens the run reads, by `name`. Its name is one of tokens, corpus, ",
        ),
        ("data:\n  train: x\n", "c.yaml:1: data.name: missing: one of tokens, corpus, huggingface, chat, synthetic"),
        (
            "data:\n  name: token\n",
            'expected one of tokens, corpus, huggingface, chat, synthetic, package.module:Class (got "token"); did',
        ),
        ("data:\n  name: tokens\n", "c.yaml:1: data.train: missing: Training shards"),
        ("data: {name: tokens, train: []}\n", "data: train is an empty list"),
        ("data: {name: tokens, train: [a, {path: b, weight: 1}]}\n", "data: some of train's sources have a weight"),
        (
            "data: {name: tokens, train: [{path: a}]}\n",
            "data.train[0]: give weight, the share of the source, or epochs",
        ),
        (
            "data: {name: tokens, train: [{path: a, weight: 1}, {path: b, epochs: 2}]}\n",
            "data: some of train's sources have a weight and some have epochs: give all of them weights",
        ),
        ("data: {name: tokens, train: [{path: a, weight: 0}]}\n", "data: the weights of train: all are 0"),
        ("data: {name: tokens, train: [{path: a, weight: -1}]}\n", "data.train[0].weight: expected a number ≥ 0"),
        (
            "data: {name: tokens, train: [{path: a, epochs: 2}], mixture: {max_epochs: 3}}\n",
            "data: mixture is for sources with weights, and those of train have epochs, which leave nothing to it",
        ),
        (
            "data: {name: tokens, train: a, mixture: {by: tokens}}\n",
            "and those of train have no weights: remove mixture",
        ),
        (
            "data: {name: tokens, train: [{path: a, weight: 1}], mixture: {stages: [{from_step: 3, weights: [1, 2]}]}}",
            "data: a stage of mixture has 2 weights, but train has 1 sources: give one for each, in their order",
        ),
        (
            "data: {name: tokens, train: [{path: a, weight: 1}], mixture: {stages: [{weights: [1]}]}}\n",
            "data.mixture.stages[0]: give from_step or from_fraction: where the stage begins",
        ),
        (
            "data: {name: tokens, train: [{path: a, weight: 1}], mixture: {stages: [{from_step: 2, weights: [0]}]}}",
            "data.mixture.stages[0]: weights: all are 0, so nothing would be read",
        ),
        (
            "data: {name: tokens, train: [{path: a, weight: 1}], "
            "mixture: {stages: [{from_fraction: 0.5, weights: [1]}]}}\n",
            "a share of the run's steps, but trainer does not limit these: give trainer.max_steps",
        ),
        (
            "data: {name: corpus, train: a, mixture: {by: tokens}}\n",
            "data.mixture: a key of data.name: tokens or chat, but data.name is corpus",
        ),
        ("data: {name: tokens, train: [[a]]}\n", "data.train[0]: expected text or a section"),
        ("data: {name: tokens, train: 1.5e}\ntrain: x", "c.yaml:2: train: unknown key"),
    ],
)
def test_faults_of_the_data_section(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in message_of(tmp_path, text)


def test_a_fault_of_two_keys_stands_where_one_of_them_stands_and_not_at_line_1(tmp_path: Path) -> None:
    text = (
        "run: {name: x}\nmodel:\n  d_model: 64\n  max_seq_len: 128\ndata:\n  name: tokens\n  train: a\n  seq_len: 256\n"
    )
    assert message_of(tmp_path, text) == (
        "c.yaml:8: data.seq_len 256 is over model.max_seq_len 128: lower the first or raise the second"
    )
    assert message_of(tmp_path, text, "model.max_seq_len=200").startswith(
        'override "model.max_seq_len=200": data.seq_len 256'
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.max_epochs=1", "trainer.max_steps=2"], "give max_steps or max_epochs, not both (null"),
        (["model.d_model=100", "model.attention.num_heads=3"], "d_model 100 is not divisible by attention.num_heads 3"),
        (["model.attention.num_kv_heads=2"], "num_kv_heads is 2: remove it, or set variant: gqa"),
        (["scheduler.warmup_steps=1", "scheduler.warmup_ratio=0.1"], "give warmup_steps or warmup_ratio, not both"),
        (
            ["trainer.micro_batch_size=4", "trainer.grad_accum_steps=3", "trainer.global_batch_size=16"],
            "global_batch_size 16 is not a multiple of micro_batch_size 4 × grad_accum_steps 3 = 12",
        ),
        (["trainer.global_batch_size=12"], "global_batch_size 12 is not a multiple of micro_batch_size 8 = 8"),
    ],
)
def test_keys_that_contradict_each_other(overrides: list[str], expected: str, tmp_path: Path) -> None:
    assert expected in message_of(tmp_path, DATA, *overrides)


def test_the_same_wrong_override_is_named_once(tmp_path: Path) -> None:
    assert message_of(tmp_path, DATA, "run.sed=1", "run.sed=1").count("run.sed: unknown key") == 1


@given(st.sampled_from(sorted({key.dotted for key in walk(Config) if key.dotted != "data.train.weight"})), st.data())
def test_a_slip_of_one_letter_finds_its_key_again(key: str, data: st.DataObject) -> None:
    *section, name = key.split(".")
    lists = (
        ["data", "train"],
        ["data", "mixture"],
        ["data", "tokenizer"],
        ["prepare", "input"],
        ["prepare", "steps"],
        ["tracking", "sinks"],
    )
    if section[:2] in lists or len(name) < 5:
        return
    cut = data.draw(st.integers(1, len(name) - 1))
    typo = ".".join([*section, name[:cut] + name[cut + 1 :]])
    if typo in {known.dotted for known in walk(Config)}:
        return
    with pytest.raises(ConfigError, match=r"unknown key|a key of data.name") as caught:
        load_config("quickstart", [f"{typo}=1"])
    assert name in str(caught.value)


def test_paths_are_shown_as_people_write_them() -> None:
    assert dotted(("data", "train", 0, "weight")) == "data.train[0].weight"
    assert dotted(()) == ""
