"""What tests of runs in stores share: a store by its address, machines, and no waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.runs import upload, upload_owner
from llmtrain.storage import failures
from tests.support.run_in_store import Machines


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Machines; this process is the one named here."""
    monkeypatch.setattr(failures, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(upload, "EVERY_SECONDS", 0.05)
    monkeypatch.setattr(upload, "END_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(upload_owner, "RENEW_SECONDS", 0.05)
    found = Machines(tmp_path, monkeypatch)
    found.be("here")
    return found


@pytest.fixture
def root(request: pytest.FixtureRequest) -> str:
    """The address of a folder of runs that is empty, in memory."""
    return f"memory://bucket/{request.node.name}/runs"
