"""Make a run's id and meta.json, which says with what code, on what machine and how it was started.

Nothing secret gets in: argv goes through `redaction`, of the environment only the variables listed here are taken.
"""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from llmtrain._version import __version__
from llmtrain.distributed.limits import machine_cores, memory_bytes, usable_cores
from llmtrain.tracking.redaction import redact

RECORDED_ENVIRONMENT: Final = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_ENABLE_MPS_FALLBACK"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY", "LD_PRELOAD"),
    *("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"),
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"),
    *("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"),
    *("NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_P2P_DISABLE", "GLOO_SOCKET_IFNAME"),
    *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("TORCH_LOGS", "TORCH_COMPILE_DISABLE", "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_FREEZING"),
    *("PYTHONHASHSEED", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_NODEID"),
)
RECORDED_PACKAGES: Final = (
    *("torch", "lightning-fabric", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "tensorboard"),
)
_GIT_TIMEOUT_SEC: Final = 10
_MAX_SLUG_LENGTH: Final = 40


@dataclass(frozen=True)
class GitState:
    """A checkout: its commit, and whether tracked files differ from it."""

    sha: str
    dirty: bool


def new_run_id(name: str, *, now: datetime, git_sha: str | None, mark: str = "") -> str:
    """Return an id: UTC time, commit and a slug of `name`, as `20261120-231502-1a2b3c4-quickstart`. Ids sort by time.

    `mark` (letters and digits) stands behind the commit, after a dot. Raises ValueError if `now` has no time zone.
    """
    if now.tzinfo is None:
        raise ValueError(f"now={now!r} has no time zone")
    commit = git_sha[:7] if git_sha else "nogit"
    return f"{now.astimezone(UTC):%Y%m%d-%H%M%S}-{commit}{mark and f'.{mark}'}-{slug(name)}"


def name_in(run_id: str) -> str | None:
    """Return the slug of the name in an id that `new_run_id` made; None of another id."""
    found = re.fullmatch(r"\d{8}-\d{6}-[0-9a-z.]+-(.+)", run_id)
    return found[1] if found else None


def slug(name: str) -> str:
    """Return `name` as part of a folder's name and of a URL: a to z, 0 to 9 and single dashes, at most 40 of them."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:_MAX_SLUG_LENGTH].strip("-") or "run"


def run_metadata(
    argv: Sequence[str],
    *,
    now: datetime,
    environ: Mapping[str, str] = os.environ,
    working_folder: Path | None = None,
) -> dict[str, Any]:
    """Return the content of meta.json as plain values. `working_folder`: the current one when not given."""
    folder = (working_folder or Path.cwd()).absolute()
    return {
        "time": now.astimezone(UTC).isoformat(timespec="seconds"),
        "argv": redact(list(argv)),
        "working_folder": str(folder),
        "git": {"code": _as_dict(code_git_state()), "working_folder": _as_dict(git_state(folder))},
        "environment": {name: redact(environ[name]) for name in RECORDED_ENVIRONMENT if name in environ},
        "versions": installed_versions(),
        "hardware": hardware(),
        "hostname": socket.gethostname(),
    }


def code_git_state() -> GitState | None:
    """Return the checkout that this package runs from; None for an installed one, though it may lie in a checkout."""
    package = Path(__file__).resolve().parents[1]
    is_tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    return git_state(package) if is_tracked else None


def git_state(folder: Path) -> GitState | None:
    """Return the checkout that `folder` is in; None if it is in none, or there is no commit yet, or no git here."""
    sha = _git(folder, "rev-parse", "--verify", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no") if sha else None
    return GitState(sha=sha.strip(), dirty=bool(changes)) if sha and changes is not None else None


def _git(folder: Path, *arguments: str) -> str | None:
    # A hook that starts a run sets GIT_DIR to its own repository; the status of this one is not to take its index lock.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_TIMEOUT_SEC,
            env=environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _as_dict(state: GitState | None) -> dict[str, Any] | None:
    return None if state is None else asdict(state)


def installed_versions() -> dict[str, str | None]:
    """Return the versions of Python, this package and its dependencies; None for one that is not installed."""
    import torch  # here, since who only lists runs needs none

    versions: dict[str, str | None] = {"llmtrain": __version__, "python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions | {"cuda": torch.version.cuda}


def hardware() -> dict[str, Any]:
    """Platform, processor, cores, GPUs, and memory in bytes: the machine's, or what a container leaves of it."""
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": machine_cores(),
        "usable_cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
