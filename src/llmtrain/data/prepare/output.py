"""The output folder: one process at a time makes it, and it changes from old to new as a whole.

data/.stdlib.ray        shows the nodes of a cluster that they share the folder; there while one prepares
data/.stdlib.lock       held (flock) by the process that prepares; stays, empty, afterwards
data/.stdlib.partial/   what is being made; left by a killed process, and the next goes on with it (`journal`)
data/.stdlib.old/       the folder that is being replaced, for the moment between two renames
data/stdlib/            always complete
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.data.manifest import MANIFEST_NAME
from llmtrain.errors import ConfigError, Preempted, RunError
from llmtrain.faults import reach

logger = logging.getLogger("llmtrain.prepare")

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_WRITE_ERRORS = (*_DISK_ERRORS, errno.EROFS, errno.EACCES, errno.EPERM)
_OURS = re.compile(
    r"(manifest\.json|dropped\.jsonl)(\.(\d+\.)?tmp)?|tokenizer/.+|(train|val)/(.+/)?shard_\d{5,}\.parquet|(.+/)?\.DS_Store"
)


def resolve_cache_dir(cache_dir: str) -> Path:
    """Return the absolute folder of data.cache_dir. Raises ConfigError for `~` where this user has no home folder."""
    expanded = os.path.expanduser(cache_dir)
    if expanded.startswith("~"):
        raise ConfigError(
            f"data.cache_dir is {cache_dir}, and this user has no home folder: set data.cache_dir to a folder that can "
            "be written, and HF_HOME for what is fetched from the Hub"
        )
    return Path(os.path.abspath(expanded))


def resolve_output(output: str) -> Path:
    """Return the real folder behind `output` (a link may stand for it)."""
    return Path(os.path.realpath(os.path.expanduser(output)))


@contextmanager
def output_lock(output: Path, *, key: str = "prepare.output") -> Iterator[None]:
    """Hold the lock of `output`; waits while another process holds it. Raises ConfigError when it cannot be written.

    `key` is the config's, for messages.

    The system lets go of the lock when its holder dies, however it dies.
    """
    path = sibling(output, "lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unwritable(output, error, key) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process is preparing it; waiting until it is done", output)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        old = sibling(output, "old")
        if old.exists() and not output.exists():
            old.rename(output)  # a process was killed between the two renames of `_replace`
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staged_output(output: Path, *, key: str = "prepare.output", made_by_us: re.Pattern[str] = _OURS) -> Iterator[Path]:
    """Yield a folder that takes the place of `output` when the block ends well.

    It holds what a process left in it that was killed, whose disk was full, or that lost its workers (Preempted). After
    any other error it vanishes.
    Call it under `output_lock`. Raises ConfigError when `output` holds files that were not made by `prepare` (that do
    not match `made_by_us`), or cannot be written or replaced; RunError when the disk fills up.
    """
    partial, old = sibling(output, "partial"), sibling(output, "old")
    try:
        _refuse_foreign_files(output, key, made_by_us)
        if old.exists():
            shutil.rmtree(old)
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(output, error, key) from error
    try:
        yield partial
        for folder, _, names in os.walk(partial):
            for name in names:
                _sync(os.path.join(folder, name))
            _sync(folder)
        _replace(output, partial=partial, old=old)
    except Exception as error:
        is_kept = isinstance(error, Preempted) or (isinstance(error, OSError) and error.errno in _DISK_ERRORS)
        if not is_kept:
            shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError) or error.errno not in _WRITE_ERRORS:
            raise
        raise _unwritable(output, error, key) from error


def sibling(output: Path, kind: str) -> Path:
    """Return the path beside `output` of the file or folder of this kind."""
    return output.parent / f".{output.name}.{kind}"


def _replace(output: Path, *, partial: Path, old: Path) -> None:
    if output.exists():
        output.rename(old)
        reach("old-moved")
    partial.rename(output)
    _sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_foreign_files(output: Path, key: str, made_by_us: re.Pattern[str]) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"{key}: {output}: is a file; name a folder")
    if os.path.ismount(output):
        raise ConfigError(f"{key}: {output}: is a mount point and cannot be replaced; name a folder inside it")
    files = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir())
    foreign = [name for name in files if not made_by_us.fullmatch(name)]
    if files and MANIFEST_NAME not in files:
        foreign = files
    if foreign:
        raise ConfigError(
            f"{key}: {output}: holds files that prepare did not make ({', '.join(foreign[:3])}"
            f"{', …' if len(foreign) > 3 else ''}), and would be replaced as a whole: name another folder, or move them"
        )


def _sync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(output: Path, error: OSError, key: str) -> ConfigError | RunError:
    what = f"{output} cannot be written ({error.filename or output}: {error.strerror or error})"
    if error.errno in _DISK_ERRORS:
        return RunError(
            f"{what}; what was there before is as it was. Make room and start again, which goes on from here, or name "
            f"another {key}"
        )
    return ConfigError(f"{key}: {what}; name another folder as {key}")
