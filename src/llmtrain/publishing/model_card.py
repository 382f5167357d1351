"""Renders a model's card: README.md, with the front matter that the Hub reads. card.py collects its content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmtrain.config.loading.load import yaml_text
from llmtrain.publishing.markdown import block, code, plain, table, without_html

CARD_FILE = "README.md"
CURVES_FILE = "curves.svg"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class Card:
    """Content of a card, as plain text."""

    name: str
    license: str
    library: str
    """Library that loads the model: transformers, peft or llmtrain."""
    summary: str
    """Summary of the model in a sentence or two."""
    loading: str
    """Python that loads the model and generates text."""
    tags: Sequence[str] = ()
    base_model: str | None = None
    """Hub id of the base model for the front matter."""
    datasets: Sequence[str] = ()
    """Ids on the Hub."""
    description: str | None = None
    """Markdown of whoever publishes the model, as `limits`; HTML in it is shown, and not obeyed."""
    data: Sequence[Mapping[str, str]] = ()
    """Rows of the table of training data."""
    results: Mapping[str, str] = field(default_factory=dict)
    has_curves: bool = False
    comparison: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    comparison_about: str | None = None
    """Data, baseline and date of the comparison; or the reason why there is none."""
    making: Mapping[str, str] = field(default_factory=dict)
    """Facts of how the model was made: command, seed, commit, versions."""
    config: str | None = None
    """The full config as YAML."""
    limits: Sequence[str] = ()


def render(card: Card) -> str:
    """Return the text of README.md."""
    parts = [front_matter(card), f"# {plain(card.name)}\n", f"{plain(card.summary)}\n"]
    if card.description:
        parts.append(f"{without_html(card.description)}\n")
    parts.append(f"## Loading it\n\n{block(card.loading, language='python')}")
    if card.results or card.has_curves:
        parts.append("## Results\n")
        if card.results:
            parts.append(table(("metric", "value"), card.results.items()))
        if card.has_curves:
            parts.append(f"![The loss by step]({CURVES_FILE})\n")
    parts.append("## Against the baseline\n")
    if card.comparison_about:
        parts.append(f"{plain(card.comparison_about)}\n")
    if card.comparison:
        parts.append(_comparison(card.comparison))
    if card.data:
        columns = list(dict.fromkeys(name for row in card.data for name in row))
        rows = [[row.get(name, "") for name in columns] for row in card.data]
        parts += ["## What it was trained on\n", table(columns, rows)]
    if card.making:
        parts += ["## How it was made\n", table(("", ""), card.making.items())]
    if card.config:
        config = block(card.config, language="yaml")
        parts.append(f"<details><summary>The full config</summary>\n\n{config}\n</details>\n")
    parts += ["## Limits\n", "\n".join(f"- {without_html(line)}" for line in card.limits) + "\n"]
    terms = "" if card.license != "other" else ": terms of its own, or none yet. Ask whoever made it."
    parts.append(f"## Licence\n\n{code(card.license)}{terms}\n")
    return "\n".join(parts)


def front_matter(card: Card) -> str:
    """Return the YAML block between `---` lines."""
    values: dict[str, Any] = {
        "license": card.license,
        "library_name": card.library,
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(["llmtrain", *card.tags])),
    }
    if card.base_model:
        values["base_model"] = card.base_model
    if card.datasets:
        values["datasets"] = list(card.datasets)
    return f"---\n{yaml_text(values)}---\n"


def _comparison(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    head = ("metric", "this model", "baseline", "difference", "95 % interval", "rows better / same / worse", "")
    rows = [
        (
            name,
            *(f"{found[key]:.4g}" for key in ("tuned", "base")),
            f"{found['difference']:+.4g}",
            f"{found['low']:+.4g} … {found['high']:+.4g}",
            f"{found['wins']:,} / {found['ties']:,} / {found['losses']:,}",
            str(found["verdict"]),
        )
        for name, found in metrics.items()
        if all(isinstance(found.get(key), int | float) for key in ("tuned", "base", "difference", "low", "high"))
    ]
    return table(head, rows)
