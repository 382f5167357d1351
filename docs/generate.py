"""Writes pages of the manual from the schema and the older names, so that they cannot differ from the program."""

from pathlib import Path

from llmtrain.config.loading import older_systems, reference

for name, markdown in (("configuration", reference.markdown), ("from-older-systems", older_systems.markdown)):
    Path(__file__).with_name(f"{name}.md").write_text(markdown(), encoding="utf-8")
