"""Writes docs/configuration.md from the schema, so that the manual cannot differ from the program."""

from pathlib import Path

from llmtrain.config.reference import markdown

Path(__file__).with_name("configuration.md").write_text(markdown(), encoding="utf-8")
