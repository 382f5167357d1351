"""Run tasks on the nodes of a Ray cluster. The only module that imports ray.

    connected ─→ RayExecutor ─ check ─→ one look on each node: the same versions, the output folder, the inputs
                             └ run ──→ a Ray task on any node, again if its worker or node is lost

The driver cuts the corpus into pieces, plans the shards and keeps the journal; nodes read, encode and write. A task
gets its piece as an argument. What all tasks of a stage share (reader, tokenizer) is stored in Ray once, and unpacked
once by each worker process.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmtrain._version import __version__
from llmtrain.data.prepare.inputs import CorpusInput
from llmtrain.data.prepare.output import sibling
from llmtrain.errors import ConfigError, Preempted
from llmtrain.screen import counted
from llmtrain.storage.address import is_remote, parse_address
from llmtrain.storage.failures import StorageError
from llmtrain.storage.store import open_store

logger = logging.getLogger("llmtrain.prepare")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

MAX_ATTEMPTS = 4
"""Times that a task is begun before its losses end the preparation."""

_CONNECT_SEC = 10.0

_LOSSES = {
    OutOfMemoryError: "its node had no memory left",
    NodeDiedError: "its node was lost",
    WorkerCrashedError: "its process died",
    ObjectStoreFullError: "the object store of its node was full",
    ObjectLostError: "what it needed was on a node that was lost",
}
"""Errors that say nothing about the task, but about the place where it ran."""

_LIBRARIES = ("pyarrow", "tokenizers", "tiktoken")
"""Libraries whose version may show in the bytes of a shard."""

_Facts = tuple[tuple[tuple[str, str], ...], str, tuple[str, str], tuple[tuple[str, int], ...]]
"""Facts that a worker is compared with: versions, the driver's working folder, a file beside the output with its
content, files and objects of the inputs with their sizes. Plain values, since a node without this version of llmtrain
must be able to unpack them."""


@contextmanager
def connected(address: str | None, *, num_workers: int | None, local_workers: int) -> Iterator[RayExecutor]:
    """Connect to the cluster at `address` (`auto`: the one on this machine), and let go of it at the end.

    None stands for RAY_ADDRESS, and where that is not set, for a cluster of this process alone with `local_workers`
    cores. `num_workers` tasks run at once; None: one for each core of the cluster. Raises ConfigError when there is no
    cluster at the address, or one of another version of Ray or Python.
    """
    named = f"--address {address}" if address else f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}"
    address = address or os.environ.get("RAY_ADDRESS")
    if address not in (None, "", "auto", "local"):
        _reach(address, named=named)
    own: dict[str, Any] = {} if address else {"num_cpus": local_workers, "include_dashboard": False}
    with redirect_stdout(sys.stderr), _same_sigterm():  # a thread of Ray prints the cluster's messages
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"{named if address else 'Ray'}: no cluster that can be used ({reason[0]})") from error
        executor = RayExecutor(num_workers or max(1, int(ray.cluster_resources().get("CPU", 0))))
        try:
            yield executor
        finally:
            executor.close()
            ray.shutdown()


def _reach(address: str, *, named: str) -> None:
    """Raise ConfigError when nothing listens at the address; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ConfigError(f"{named}: give HOST:PORT of the head of a Ray cluster (not of a Ray client), or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SEC).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{named}: no Ray cluster can be reached there ({error})") from error


class RayExecutor:
    """Runs tasks on the nodes of the cluster that this process is connected to."""

    shares_gil = False

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._facts: _Facts | None = None
        self._work = ray.remote(max_retries=0)(_work)  # `run` counts the attempts: Ray's count leaves out some losses
        self._lock = threading.Lock()
        self._shared: dict[int, tuple[object, Any]] = {}
        self._running: set[Any] = set()
        self._stopped = threading.Event()

    def check(self, output: Path, inputs: Sequence[CorpusInput]) -> None:
        """Raise ConfigError unless every node has the same versions, can write beside `output`, and has the inputs.

        The first file of each input stands for all. A node that joins later is checked when it gets its first task.
        """
        probe, content = sibling(output, "ray"), secrets.token_hex()
        probe.write_text(content)
        firsts = [source.files[0] for source in inputs if source.files and source.files[0].dataset is None]
        files = tuple((file.path, file.size) for file in firsts if os.path.isfile(file.path))
        objects = tuple((str(file.remote.address), file.size) for file in firsts if file.remote is not None)
        self._facts = (_versions(), os.getcwd(), (str(probe), content), files + objects)
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        looks = [
            ray.remote(num_cpus=0)(_look_from_afar())
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(self._facts)
            for node in nodes
        ]
        for node, look in zip(nodes, looks, strict=True):
            try:
                fault = ray.get(look)
            except (TaskUnschedulableError, *_LOSSES) as error:
                logger.warning("Ray lost the node %s (%s)", node["NodeManagerAddress"], type(error).__name__)
                continue
            if fault is not None:
                raise ConfigError(_node_fault(node["NodeManagerAddress"], fault))
        logger.info("Ray: %s, %s at once", counted(len(nodes), "node"), counted(self.num_workers, "task"))

    def run(self, task: Callable[[_Item], _Result], item: _Item) -> _Result:
        """Return `task(item)` from some node, or raise what it raises there.

        A task whose worker or node is lost is begun again. Raises Preempted after MAX_ATTEMPTS losses.
        """
        shared, stopped = self._share(task), self._stopped
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                result: _Result = self._result(self._work.remote(self._facts, [shared], item), stopped)
                return result
            except RayError as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                loss = next((why for kind, why in _LOSSES.items() if isinstance(cause, kind)), None)
                if loss is None or stopped.is_set():
                    raise cause from None
                logger.warning("Ray lost a task: %s; attempt %d of %d ended", loss, attempt, MAX_ATTEMPTS)
                if attempt < MAX_ATTEMPTS:
                    stopped.wait(attempt - 1)  # memory may be free again
        raise Preempted(
            f"Ray lost the same task {MAX_ATTEMPTS} times, the last time because {loss}. The finished shards are kept: "
            "give the workers more memory, or let fewer of them run on a node, and start the same command again"
        )

    def stop(self) -> None:
        """End the running tasks; `run` raises for each."""
        with self._lock:
            self._stopped.set()
            self._stopped = threading.Event()  # of the tasks to come
            for reference in self._running:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        """Delete the file that nodes look for."""
        if self._facts is not None:
            Path(self._facts[2][0]).unlink(missing_ok=True)

    def _share(self, task: object) -> Any:
        """Return Ray's reference to a task; equal references are the same task."""
        with self._lock:
            if id(task) not in self._shared:
                self._shared[id(task)] = (task, ray.put(task))  # the task itself too: it keeps its id
            return self._shared[id(task)][1]

    def _result(self, reference: Any, stopped: threading.Event) -> Any:
        with self._lock:
            self._running.add(reference)
            if stopped.is_set():
                ray.cancel(reference, force=True)
        try:
            return ray.get(reference)
        finally:
            with self._lock:
                self._running.discard(reference)


@contextmanager
def _same_sigterm() -> Iterator[None]:
    """Keep SIGTERM as it is: Ray would make it an exit of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- on the nodes ------------------------------------------------------------------------------------------------------


def _work(facts: _Facts, shared: list[Any], item: Any) -> Any:
    """Do a task in a worker process. `shared` holds the reference to it, which Ray would unpack for every call."""
    _enter(facts)
    return _task(shared[0])(item)


@lru_cache(maxsize=1)
def _enter(facts: _Facts) -> None:
    """Make this process like the driver's, once. Raises ConfigError when it cannot do the driver's work."""
    if (fault := find_fault(facts)) is not None:
        raise ConfigError(_node_fault(ray.util.get_node_ip_address(), fault))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one core


@lru_cache(maxsize=4)
def _task(reference: Any) -> Callable[[Any], Any]:
    task: Callable[[Any], Any] = ray.get(reference)
    return task


def _look_from_afar() -> Callable[[_Facts], str | None]:
    """Return `find_fault` for a node that may lack this module: a function of a function travels with its code."""

    def look(facts: Any) -> str | None:
        try:
            from llmtrain.data.prepare.ray_cluster import find_fault as find
        except ImportError as error:
            return f"has no llmtrain of this version ({error}): install the same one on every node"
        return find(facts)

    return look


def find_fault(facts: _Facts) -> str | None:
    """Return why this process cannot do the work of the driver that has these facts; None when it can.

    Goes to the driver's working folder, if it is there, since inputs may be named relative to it.
    """
    versions, working_folder, (probe, content), files = facts
    for (name, wanted), (_, found) in zip(versions, _versions(), strict=True):
        if wanted != found:
            return f"runs {name} {found}, and this command {wanted}: install the same version on every node"
    if os.path.isdir(working_folder):
        os.chdir(working_folder)
    folder = os.path.dirname(probe)
    if not os.path.exists(probe) or Path(probe).read_text() != content:
        return f"does not see {folder}: set prepare.output to a folder that all nodes share"
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"cannot write into {folder} ({error.strerror}): set prepare.output to a folder that all nodes can write"
    for path, size in files:
        if is_remote(path):
            if (fault := _object_fault(path, size)) is not None:
                return fault
        elif not os.path.exists(path) or os.path.getsize(path) != size:
            return f"does not see the same {path}: put prepare.input into a folder that all nodes share"
    return None


def _object_fault(address: str, size: int) -> str | None:
    place = parse_address(address)
    try:
        found = open_store(place).size(place.key)
    except (StorageError, ConfigError) as error:
        return f"cannot read what prepare.input names ({error}): it has to read it as this machine does"
    return None if found == size else f"finds {found} bytes at {place.shown}, and this command {size}"


def _versions() -> tuple[tuple[str, str], ...]:
    libraries = tuple((name, version(name)) for name in _LIBRARIES)
    return (("llmtrain", __version__), ("Python", platform.python_version()), *libraries)


def _node_fault(node: str, fault: str) -> str:
    return f"the Ray node {node} {fault}"
