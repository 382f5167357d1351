"""A key on the command line takes the place of its alternatives in the file; every key with a default takes null."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.config.loading.walk import Key, walk
from llmtrain.config.sections.base import Section
from llmtrain.config.sections.quality import QualityStep
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError

SAMPLES: dict[str, Any] = {
    "max_steps": 5,
    "max_epochs": 2.0,
    "max_tokens": 100,
    "grad_accum_steps": 2,
    "global_batch_size": 32,
    "warmup_steps": 3,
    "warmup_ratio": 0.1,
    "d_ff": 64,
    "expansion": 3.0,
    "val": "held_out.jsonl",
    "val_fraction": 0.05,
    "text_column": "body",
    "adapter": "c4",
    "data": ["rows.jsonl"],
    "tasks": ["arc_easy"],
}
CORPUS = {"name": "corpus", "train": "a"}
REQUIRED: dict[str, dict[str, Any]] = {
    "data": CORPUS,
    "ChatConfig data": {"name": "chat", "train": "a"},
    "TokensConfig data": {"name": "tokens", "train": "a"},
    "SyntheticConfig data": {"name": "synthetic"},
    "HuggingFaceDataConfig data": {"name": "huggingface", "path": "a"},
    "OwnDataConfig data": {"name": "a:B"},
    "HuggingFaceConfig model": {"name": "huggingface", "path": "a"},
    "MixtureConfig data": {"name": "tokens", "train": [{"path": "a", "weight": 1}]},
    "LoraConfig model": {"name": "huggingface", "path": "a"},
    "OwnModelConfig model": {"name": "a:B"},
    "RopeScalingConfig model": {"positional": {"rope_scaling": {"rope_type": "linear", "factor": 2}}},
    "prepare": {"input": "a", "output": "b"},
    "publish": {"license": "mit"},
}
"""What a section needs before any other key can be given in it; by its class too, where there are variants."""


class Pair(NamedTuple):
    owner: type[Section]
    section: tuple[str, ...]
    one: str
    other: str
    may_agree: bool

    def __str__(self) -> str:
        return f"{'.'.join(self.section)}.{self.one}-over-{self.other}-{self.owner.__name__}"


def pairs() -> Iterator[Pair]:
    """Every key of the schema with each of its alternatives."""
    for key in walk(Config):
        for group in key.owner.alternatives:
            for other in set(group.keys) - {key.path[-1]} if key.path[-1] in group.keys else ():
                yield Pair(key.owner, key.path[:-1], key.path[-1], other, group.may_agree)


IN_LISTS = {
    "MixedSource",
    "StageConfig",
    "DatasetInput",
    "SinkConfig",
    *(step.__name__ for step in get_args(get_args(QualityStep)[0])),
}
"""Sections that are entries of a list: an override takes the place of the list."""
PAIRS = sorted({pair for pair in pairs() if pair.owner.__name__ not in IN_LISTS}, key=str)


def values_for(owner: type[Section], section: tuple[str, ...], **keys: Any) -> dict[str, Any]:
    """Return a config in which `section`, of the class `owner`, has these keys, and whatever else it needs."""
    top = section[0] if section else ""
    values: dict[str, Any] = {"data": dict(CORPUS)}
    if top:
        values[top] = dict(REQUIRED.get(f"{owner.__name__} {top}", REQUIRED.get(top, {})))
    inside = values
    for part in section:
        inside = inside.setdefault(part, {})
    inside.update(keys)
    return values


def load(folder: Path, values: dict[str, Any], *overrides: str) -> Config:
    file = folder / "c.json"
    file.write_text(json.dumps(values))
    return load_config(str(file), overrides).config


def section_of(config: Config, path: tuple[str, ...]) -> Any:
    found: Any = config
    for part in path:
        found = getattr(found, part)
    return found


def test_the_schema_names_the_keys_that_are_known_to_exclude_each_other() -> None:
    names = {frozenset((pair.one, pair.other)) for pair in PAIRS}
    assert {"val", "val_fraction"} in names
    assert {"max_steps", "max_epochs"} in names
    assert all(
        name in key.owner.model_fields for key in walk(Config) for g in key.owner.alternatives for name in g.keys
    )


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_later_key_takes_the_place_of_its_alternative(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    override = f"{'.'.join((*pair.section, pair.one))}={json.dumps(SAMPLES[pair.one])}"
    in_file = values_for(pair.owner, pair.section, **{pair.other: SAMPLES[pair.other]})
    found = section_of(load(tmp_path, in_file, override), pair.section)
    assert getattr(found, pair.one) == SAMPLES[pair.one]
    assert not pair.owner.is_given(pair.other, getattr(found, pair.other))
    here, there = (".".join((*pair.section, name)) for name in (pair.one, pair.other))
    assert caplog.messages == [f"{here} takes the place of {there} ({tmp_path}/c.json:1)"]


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not pair.may_agree], ids=str)
def test_two_alternatives_in_one_place_contradict_each_other(pair: Pair, tmp_path: Path) -> None:
    both = {name: SAMPLES[name] for name in (pair.one, pair.other)}
    overrides = [f"{'.'.join((*pair.section, name))}={value}" for name, value in both.items()]
    for values, words in ((both, []), ({}, overrides)):
        with pytest.raises(ConfigError, match=r"give \w+ or \w+, not both \(null removes one\)"):
            load(tmp_path, values_for(pair.owner, pair.section, **values), *words)


def test_null_and_a_default_take_nobodys_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_file = {"data": {"name": "chat", "train": "a", "val": "b"}, "trainer": {"max_epochs": 2}}
    config = load(tmp_path, in_file, "data.val_fraction=0", "trainer.max_steps=null")
    assert config.trainer.max_epochs == 2
    assert section_of(config, ("data", "val")) == "b"
    assert caplog.messages == []


def test_of_several_processes_the_first_alone_says_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_file = {"data": CORPUS, "trainer": {"max_epochs": 2}}
    for rank, said in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        load(tmp_path, in_file, "trainer.max_steps=5")
        assert len(caplog.messages) == said


OPTIONAL = [
    key
    for key in walk(Config)
    if not key.field.is_required()
    and key.owner.__name__ not in IN_LISTS
    and key.dotted not in ("data.name", "model.name")
]


@pytest.mark.parametrize("key", OPTIONAL, ids=lambda key: f"{key.dotted}-{key.owner.__name__}")
def test_every_key_with_a_default_takes_null(key: Key, tmp_path: Path) -> None:
    config = load(tmp_path, values_for(key.owner, key.path[:-1]), f"{key.dotted}=null")
    found = getattr(section_of(config, key.path[:-1]), key.path[-1])
    assert found is None or found == key.field.default


def test_a_section_without_keys_has_its_defaults_and_a_required_key_needs_a_value(tmp_path: Path) -> None:
    assert load(tmp_path, {"data": CORPUS, "run": None}).run.seed == 1337
    with pytest.raises(ConfigError, match=r"data\.train"):
        load(tmp_path, {"data": {"name": "corpus", "train": None}})
