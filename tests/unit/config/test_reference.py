"""The reference in the docs is made from the schema, and leaves nothing out."""

from __future__ import annotations

from llmtrain.config.loading.reference import markdown
from llmtrain.config.loading.walk import walk
from llmtrain.config.sections.schema import Config


def test_every_key_stands_in_the_table_of_its_section() -> None:
    text = markdown()
    headings = {line.lstrip("# ").split("`")[1] for line in text.splitlines() if line.startswith("#") and "`" in line}
    for key in walk(Config):
        section = ".".join(key.path[:-1])
        assert not section or section in headings
        assert f"| `{key.path[-1]}` |" in text


def test_rows_say_type_default_and_meaning() -> None:
    rows = markdown().splitlines()
    assert "| `lr` | number, > 0 | `0.0003` | Peak learning rate. |" in rows
    assert "| `tags` | list of text | `[]` | Free labels, kept in meta.json. |" in rows
    assert "| `betas` | list of 2 × number | `[0.9, 0.95]` | Decay rates of adamw and adam. |" in rows
    assert any(row.startswith('| `compile` | `auto` or true or false | `"auto"` |') for row in rows)
    assert any(row.startswith("| `train` | text or list of text or section | required |") for row in rows)
    assert "## `data` with `name: synthetic`" in rows


def test_every_key_has_a_meaning() -> None:
    sections = {"run", "model", "trainer", "optimizer", "scheduler", "distributed", "tracking", "logging", "output"}
    without = {key.dotted for key in walk(Config) if not key.field.description}
    nested = {key for key in without if any(other.dotted.startswith(f"{key}.") for other in walk(Config))}
    assert without == nested
    assert sections <= without
