"""What tests of stores share: one server of S3 for all, and no credentials of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from llmtrain.storage import failures
from llmtrain.storage.store import forget_stores
from tests.support.lakefs import LocalLakeFS
from tests.support.moto_s3 import LocalS3


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[None]:
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "LAKEFS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", f"{tmp_path}/aws-config")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", f"{tmp_path}/aws-credentials")
    monkeypatch.setattr(failures, "FIRST_WAIT_SECONDS", 0.01)
    forget_stores()
    yield
    forget_stores()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LocalS3]:
    with LocalS3() as server:
        yield server


@pytest.fixture
def s3(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> LocalS3:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def lake(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalLakeFS]:
    with LocalLakeFS() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
