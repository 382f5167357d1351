"""configs/every-key.yaml is made from the schema, is complete, and loads with every default."""

from __future__ import annotations

import re

from llmtrain.config.loading.every_key import EXAMPLES, PATH, PLACEHOLDER, WIDTH, every_key
from llmtrain.config.loading.load import load_config
from llmtrain.config.loading.walk import walk
from llmtrain.config.sections.schema import Config


def test_the_file_is_what_the_schema_makes() -> None:
    assert PATH.read_text(encoding="utf-8") == every_key(), (
        "the schema has changed: `python -m llmtrain.config.loading.every_key` writes configs/every-key.yaml again"
    )


def test_it_loads_and_shows_the_defaults() -> None:
    required = {"data": {"name": "tokens"}, "prepare": {}}
    for path, value in EXAMPLES.items():
        section, key = path.split(".")
        required[section][key] = value
    expected = Config.model_validate(required)
    assert expected.prepare is not None
    loaded = load_config("every-key").config
    assert loaded.prepare is not None
    assert loaded.prepare.input != EXAMPLES["prepare.input"], "the variable in it is filled in"
    assert loaded.model_copy(update={"prepare": expected.prepare}) == expected
    assert loaded.prepare.model_copy(update={"input": expected.prepare.input}) == expected.prepare


def test_every_key_of_every_variant_is_shown() -> None:
    text = every_key()
    for key in walk(Config):
        assert re.search(rf"^[ #-]*{key.path[-1]}:( |$)", text, re.MULTILINE), key.dotted
    for name in ("tokens", "corpus", "huggingface", "synthetic"):
        assert re.search(rf"^[ #]*name: {name}\b", text, re.MULTILINE)


def test_nothing_is_left_open_and_no_line_is_too_long() -> None:
    for line in every_key().splitlines():
        assert len(line) <= WIDTH + 2, line
        assert PLACEHOLDER not in line or line.lstrip().startswith("#"), "give the key an example in EXAMPLES"
