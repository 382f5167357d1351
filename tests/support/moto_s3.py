"""S3 on 127.0.0.1, by moto's server, which keeps its objects in memory: one for a test session.

>>> with LocalS3() as s3:
...     ...  # with the variables s3.environment: llmtrain prepare … prepare.input=s3://bucket/texts
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

import requests


def environment_of(endpoint: str) -> dict[str, str]:
    """Return the variables that lead to a server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "AKIATESTACCESSKEY000",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test-server",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }


class LocalS3:
    """A server of S3 without buckets. `port`: a free one by default."""

    def __init__(self, port: int = 0) -> None:
        from moto.server import ThreadedMotoServer  # takes a second

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server: Any = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)

    def __enter__(self) -> LocalS3:
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self.environment = environment_of(self.endpoint)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the server to the end of the process: to stop it waits for connections that clients keep open."""

    def make_bucket(self, name: str) -> str:
        """Make a bucket; one that exists is as good. Return its address."""
        requests.put(f"{self.endpoint}/{name}", timeout=30).raise_for_status()
        return f"s3://{name}"
