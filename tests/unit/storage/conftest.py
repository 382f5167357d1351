"""What tests of stores share: no credentials of the machine, and no waiting between attempts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.storage import failures
from llmtrain.storage.store import forget_stores


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "LAKEFS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(failures, "FIRST_WAIT_SECONDS", 0.01)
    forget_stores()
    yield
    forget_stores()
