"""One checkpoint's folder: what is in it, how it is made durable, how it is checked and read.

    step_000500/
      MANIFEST.json   size and sha256 of every file, every tensor's dtype and shape; written last
      config.yaml     the run's resolved config
      state.json      the loop's state
      model/          written by the caller's `write_model`
      optimizer/      shard_00000.safetensors …, tensors named <parameter>/<state>

Nothing in it is a pickle. How checkpoints stand beside each other is in `checkpoint_shelf.py`, how one is saved while
training goes on in `checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmtrain._version import __version__
from llmtrain.config.errors import RunError
from llmtrain.files import sync
from llmtrain.testing.faults import reach

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
CONFIG = "config.yaml"
STATE = "state.json"
MODEL = "model"
OPTIMIZER = "optimizer"

MAX_SHARD_BYTES = 2 * 1024**3
"""A shard of the optimizer's state is closed before it grows over this."""

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

WriteModel = Callable[[Path, Mapping[str, Tensor]], None]
"""Writes model files into an existing, empty folder. Must keep no tensor that it got: the next save overwrites them."""


class CheckpointError(RunError):
    """A checkpoint cannot be written, or is not what was written. One message, meant for the user."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint's MANIFEST.json says."""

    step: int
    sequence: int
    """The checkpoint's number among those of its run: a later save has a higher one, whatever its step."""
    files: Mapping[str, Mapping[str, Any]]
    """Path under the folder → size (bytes), sha256, and for safetensors `tensors`: name → dtype, shape."""
    links: tuple[str, ...]
    """Links that the save was to move here; the next start does so if the save was killed before."""
    created: str
    """UTC time, ISO 8601."""


def render_json(content: Mapping[str, Any]) -> str:
    """Strict JSON text. Raises TypeError or ValueError for what JSON cannot hold, NaN and infinities included."""
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_files(
    folder: Path,
    *,
    config_yaml: str,
    state_json: str,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    write_model: WriteModel,
    step: int,
) -> None:
    """Write all but the manifest into `folder` (existing, empty), each file fsynced. Tensors are on the CPU."""
    (folder / CONFIG).write_text(config_yaml, encoding="utf-8")
    sync(folder / CONFIG)
    (folder / MODEL).mkdir()
    write_model(folder / MODEL, model)
    reach("model-written", step=step)
    _sync_tree(folder / MODEL, mode=stat.S_IMODE((folder / CONFIG).stat().st_mode))
    reach("model-synced", step=step)
    (folder / OPTIMIZER).mkdir()
    _write_optimizer(folder / OPTIMIZER, optimizer)
    reach("optimizer-written", step=step)
    _sync_tree(folder / OPTIMIZER, mode=stat.S_IMODE((folder / CONFIG).stat().st_mode))
    (folder / STATE).write_text(state_json, encoding="utf-8")
    sync(folder / STATE)
    reach("state-written", step=step)


def write_manifest(folder: Path, *, step: int, sequence: int, links: Sequence[str]) -> None:
    """Hash every file of `folder`, write the manifest, and fsync it and the folder."""
    files = {name: _describe(folder / name) for name in sorted(_files_on_disk(folder))}
    body = {
        "format_version": FORMAT_VERSION,
        "llmtrain_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "sequence": sequence,
        "links": list(links),
        "files": files,
    }
    (folder / MANIFEST).write_text(_seal(body), encoding="utf-8")
    reach("manifest-written", step=step)
    sync(folder / MANIFEST)
    sync(folder)
    reach("manifest-synced", step=step)


def read_manifest(folder: Path) -> Manifest:
    """The manifest. Raises CheckpointError if it is missing, damaged, or of a format that this program cannot read."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing, so the checkpoint was never finished") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if not isinstance(body, dict) or not isinstance(body.get("format_version"), int):
        raise CheckpointError(f"{path} is damaged: it is no JSON object with a format_version")
    if body["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {body['format_version']}, and this llmtrain ({__version__}) reads up to "
            f"{FORMAT_VERSION}: use the newer llmtrain that wrote it ({body.get('llmtrain_version')})"
        )
    if _seal(body) != text:
        raise CheckpointError(f"{path} is damaged: its text does not have the checksum that it names")
    return Manifest(
        step=body["step"],
        sequence=body["sequence"],
        files=body["files"],
        links=tuple(body["links"]),
        created=body["created"],
    )


def verify(folder: Path, *, content: bool = True) -> None:
    """Raise CheckpointError that names the first missing, extra or damaged file or tensor; else return.

    Without `content`, only the manifest and the files' names and sizes are checked, which costs no reading. Hidden
    files (.DS_Store, .nfs…) are nobody's and are passed over.
    """
    try:
        _verify(folder, content=content)
    except OSError as error:  # an unreadable disk; or somebody deletes the checkpoint at this moment
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def load_state(folder: Path) -> dict[str, Any]:
    """The content of state.json. The folder is taken to be verified."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    assert isinstance(state, dict)
    return state


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    """`<parameter>/<state>` → tensor on the CPU, in memory of its own. The folder is taken to be verified."""
    tensors: dict[str, Tensor] = {}
    for path in sorted((folder / OPTIMIZER).glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  # a handle, which only keys() goes over
                # safetensors maps the file: without a copy the optimizer would live in a file that may be deleted
                tensors[name] = shard.get_tensor(name).clone()
    return tensors


def _sync_tree(folder: Path, *, mode: int) -> None:
    """fsync all files and folders of a tree, and give the files the mode of any other new file.

    The safetensors writer makes files that only their owner can read, which is no use in a folder that is shared.
    """
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            path.chmod(mode)
            sync(path)
        sync(Path(parent))


def _write_optimizer(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the shards, and make sure that they hold every tensor that was given."""
    shards: list[dict[str, Tensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    written: dict[str, Any] = {}
    for index, shard in enumerate(shards):
        path = folder / f"shard_{index:05d}.safetensors"
        save_file(shard, path)
        written |= _read_header(path)
    given = {name: {"dtype": _DTYPE_NAMES[t.dtype], "shape": list(t.shape)} for name, t in tensors.items()}
    if written != given:
        odd = sorted(name for name in written.keys() | given.keys() if written.get(name) != given.get(name))
        raise CheckpointError(f"{folder}: {odd[0]} was not written as it was given ({len(odd)} such tensors)")


def _seal(body: Mapping[str, Any]) -> str:
    """The manifest's text: `body` and, last, the sha256 of its text without one. So the manifest guards itself."""
    unsealed = {name: value for name, value in body.items() if name != "checksum"}
    checksum = hashlib.sha256(render_json(unsealed).encode()).hexdigest()
    return render_json(unsealed | {"checksum": checksum})


def _describe(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"{path} is no plain file, which is all that a checkpoint holds")
    described: dict[str, Any] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    if path.suffix == ".safetensors":
        described["tensors"] = _read_header(path)
    return described


def _verify(folder: Path, *, content: bool) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no checkpoint folder")
    manifest = read_manifest(folder)
    on_disk = _files_on_disk(folder)
    for name in sorted(manifest.files.keys() | on_disk | {CONFIG, STATE}):
        if name not in on_disk:
            raise CheckpointError(f"{folder / name} is missing")
        if name not in manifest.files:
            raise CheckpointError(f"{folder / name} is extra: {MANIFEST} does not know it")
        size, expected = (folder / name).stat().st_size, manifest.files[name]["size"]
        if size != expected:
            raise CheckpointError(f"{folder / name} has {size} bytes instead of {expected}")
    if content:
        for name in manifest.files:
            _verify_content(folder / name, manifest.files[name])


def _verify_content(path: Path, expected: Mapping[str, Any]) -> None:
    if _sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}")
    if "tensors" not in expected:
        return
    found, wanted = _read_header(path), expected["tensors"]
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(f"{path}: tensor {name} is {found.get(name)} instead of {wanted.get(name)}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name → dtype, shape of a safetensors file's tensors: 8 bytes of length, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {
        name: {"dtype": entry["dtype"], "shape": entry["shape"]}
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _files_on_disk(folder: Path) -> set[str]:
    """Everything in the folder but folders, hidden names and the manifest; paths relative to it, with slashes."""
    names: set[str] = set()
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        names |= {
            Path(parent, name).relative_to(folder).as_posix() for name in files + links if not name.startswith(".")
        }
    return names - {MANIFEST}
