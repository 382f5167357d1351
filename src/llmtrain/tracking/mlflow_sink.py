"""Sends parameters, metrics, the resolved config and, if configured, the best model to MLflow.

The client is used without MLflow's global run, so that nothing else of this process (its command line, its code) is
recorded. MLflow's run id is in <run>/tracking/mlflow.json, so that a resumed run continues the same MLflow run.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llmtrain.config.loading.flat import flat
from llmtrain.config.sections.running import MlflowConfig
from llmtrain.contracts import Unreachable
from llmtrain.tracking.redaction import redact
from llmtrain.tracking.remote_run import record_run, recorded_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("llmtrain.tracking")

DEFAULT_URI: Final = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT: Final = "llmtrain"
MAX_PARAMS_A_CALL: Final = 100
MAX_METRICS_A_CALL: Final = 1000
MAX_PARAM_CHARS: Final = 500
"""Limit of the oldest servers."""
_FLUSH_INTERVAL_SEC = 2.0
_MAX_PENDING = 500
_STATUS = {"finished": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}
_PASSING_ERRORS = frozenset({"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "IO_ERROR"})
"""Error codes of MLflow after which another try may succeed. MLflow reports a missing answer as INTERNAL_ERROR."""
_PRESETS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the sink's thread tries again, and logs that
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class MlflowSink:
    """One run of an MLflow experiment. Metrics are sent every two seconds, several lines at once.

    Raises ImportError when made, if MLflow is not installed.
    """

    def __init__(self, config: MlflowConfig, *, run: Path) -> None:
        for name, value in _PRESETS.items():
            os.environ.setdefault(name, value)
        import mlflow  # here, in the main thread: it takes two seconds  # noqa: F401

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self._run_name, self._log_models = config.run_name, config.log_models
        self._recorded = recorded_run(run, "mlflow")
        recorded_uri = self._recorded.get("tracking_uri")
        wanted = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or recorded_uri
        self._uri = absolute_uri(wanted or DEFAULT_URI)
        if self._uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow discourages it, and fails without this
        self._experiment = config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
        self._client: MlflowClient | None = None
        self._run_id: str | None = None
        self._is_new = False
        self._folder = run
        self._pending: list[tuple[int, int, Mapping[str, float]]] = []
        self._flushed = 0.0

    @property
    def num_waiting(self) -> int:
        """Number of lines that were accepted but not sent yet."""
        return len(self._pending)

    def start(self, run_info: Mapping[str, Any]) -> None:
        """Create an MLflow run, or continue that of a resumed run. Raises Unreachable, or an error of MLflow."""
        from mlflow import MlflowClient

        with _unreachable_if_temporary(self._uri):
            self._client = client = MlflowClient(tracking_uri=self._uri)
            if self._run_id is None:  # else an earlier try, which failed later, has set it
                self._run_id = self._recorded_run(client, run_info) or self._new_run(client, run_info)
            if self._is_new:
                self._log_params(client, run_info["config"])
            client.log_dict(self._run_id, dict(run_info["config"]), "config.yaml")
        log.info("MLflow: run %s in experiment %s at %s", self._run_id, self._experiment, redact(self._uri))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Accept a line of metrics. If the server does not answer, raise Unreachable and do not accept the line."""
        self._pending.append((step, int(time.time() * 1000), metrics))
        if time.monotonic() - self._flushed < _FLUSH_INTERVAL_SEC and len(self._pending) < _MAX_PENDING:
            return
        try:
            self._flush()
        except BaseException:
            del self._pending[-1]
            raise

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Send the remaining lines, the best model if configured, and the state in which the run ended."""
        self._flush()
        assert self._client is not None
        assert self._run_id is not None
        state = str(summary.get("state", "failed"))
        with _unreachable_if_temporary(self._uri):
            model = self._folder / "model"
            if self._log_models and state == "finished" and model.is_dir():
                log.info("MLflow: storing the best model")
                self._client.log_artifacts(self._run_id, str(model.resolve()), "model")
            self._client.set_terminated(self._run_id, _STATUS[state])

    def _recorded_run(self, client: MlflowClient, run_info: Mapping[str, Any]) -> str | None:
        """Reopen the MLflow run that this run continues, and return its id; None if there is none."""
        from mlflow.exceptions import MlflowException

        run_id: str | None = self._recorded.get("run_id")
        if (
            run_info["resumed_step"] is None
            or run_id is None
            or self._recorded.get("tracking_uri") != redact(self._uri)
        ):
            return None
        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning("MLflow has no run %s any more: a new one continues from here", run_id)
            return None
        return run_id

    def _new_run(self, client: MlflowClient, run_info: Mapping[str, Any]) -> str:
        section = run_info["config"].get("run", {})
        tags = {"llmtrain.run_id": run_info["run_id"], **{f"tag.{tag}": "true" for tag in section.get("tags") or []}}
        if section.get("notes"):
            tags["mlflow.note.content"] = section["notes"]
        name = self._run_name or run_info["run_id"]
        run_id = str(client.create_run(self._experiment_id(client), run_name=name, tags=tags).info.run_id)
        record_run(self._folder, "mlflow", {"tracking_uri": redact(self._uri), "run_id": run_id})
        self._is_new = True
        return run_id

    def _log_params(self, client: MlflowClient, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in flat(config).items()]
        for first in range(0, len(params), MAX_PARAMS_A_CALL):
            client.log_batch(self._run_id, params=params[first : first + MAX_PARAMS_A_CALL])

    def _experiment_id(self, client: MlflowClient) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(client.create_experiment(self._experiment))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(self._experiment)  # another run has just made it
        assert found is not None
        return str(found.experiment_id)

    def _flush(self) -> None:
        from mlflow.entities import Metric

        assert self._client is not None, "start comes first"
        metrics = [
            Metric(name, value, time_ms, step)
            for step, time_ms, values in self._pending
            for name, value in values.items()
        ]
        with _unreachable_if_temporary(self._uri):
            for first in range(0, len(metrics), MAX_METRICS_A_CALL):
                self._client.log_batch(self._run_id, metrics=metrics[first : first + MAX_METRICS_A_CALL])
        self._pending.clear()
        self._flushed = time.monotonic()


def absolute_uri(uri: str) -> str:
    """Return `uri` with an absolute path to its folder or database, so that a resume from another folder finds it."""
    if uri.startswith("sqlite:///"):
        path = uri.removeprefix("sqlite:///")
        return uri if path.startswith(("/", ":")) else f"sqlite:///{Path(path).absolute()}"
    if "://" in uri or uri.startswith(("file:", "databricks")):
        return uri
    return Path(uri).expanduser().absolute().as_uri()


@contextmanager
def _unreachable_if_temporary(uri: str) -> Iterator[None]:
    """Raise Unreachable instead of an MLflow error after which another try may succeed."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in _PASSING_ERRORS:
            raise
        raise Unreachable(f"{redact(uri)}: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
