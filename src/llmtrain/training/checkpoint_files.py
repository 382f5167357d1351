"""One checkpoint's folder: what is in it, how it is made durable, how it is checked and read.

    step_000500/
      MANIFEST.json   size and sha256 of every file, every tensor's dtype and shape; written last
      config.yaml     the run's resolved config
      state.json      the loop's state
      model/          written by the caller's `write_model`
      optimizer/      shard_00000.safetensors …, tensors named <parameter>/<state>

Several ranks that write together each write files of their own: whole tensors of `model/`, and of `optimizer/` the
pieces that they hold (`checkpoint_pieces.py`). One of them then writes the rest, the manifest last.

Nothing in it is a pickle. How checkpoints stand beside each other is in `checkpoint_shelf.py`, how one is saved while
training goes on in `checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtrain._version import __version__
from llmtrain.config.errors import RunError
from llmtrain.distributed.sharding import Part
from llmtrain.files import sync
from llmtrain.testing.faults import reach
from llmtrain.training.checkpoint_pieces import CUT, StoredTensor, stored_tensors, why_not_covered

FORMAT_VERSION = 2
"""What is read. 1 has no tensors in pieces, and is what is written where there are none."""
MANIFEST = "MANIFEST.json"
CONFIG = "config.yaml"
STATE = "state.json"
MODEL = "model"
OPTIMIZER = "optimizer"
WEIGHTS_INDEX = "model.safetensors.index.json"

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


@dataclass(frozen=True)
class SplitModel:
    """How several ranks write a model's weights together, each some of them, whole."""

    unit_of: Callable[[str], str]
    """What a tensor of a name has to be in one file with."""
    write_weights: WriteModel
    """Writes some units into one file of safetensors."""
    write_rest: Callable[[Path, torch.dtype], None]
    """Writes all but the weights, which are of that dtype, into `model/`."""


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


Records = dict[str, dict[str, Any]]
"""Path under the checkpoint's folder → what the manifest says of the file."""


def begin_files(folder: Path, *, config_yaml: str) -> None:
    """Make the parts of an empty folder that ranks then fill."""
    (folder / CONFIG).write_text(config_yaml, encoding="utf-8")
    sync(folder / CONFIG)
    (folder / MODEL).mkdir()
    (folder / OPTIMIZER).mkdir()


def write_model_files(folder: Path, write: Callable[[Path], None]) -> Records:
    """Let `write` put files into `model/`, where nobody else writes meanwhile, and fsync them."""
    before = _files_on_disk(folder / MODEL)
    write(folder / MODEL)
    return _make_durable(folder, [f"{MODEL}/{name}" for name in sorted(_files_on_disk(folder / MODEL) - before)])


def write_weights_file(folder: Path, name: str, write: Callable[[Path], None]) -> Records:
    """Let `write` make one file of `model/`, beside those that other ranks write, and fsync it."""
    write(folder / MODEL / name)
    return _make_durable(folder, [f"{MODEL}/{name}"])


def write_optimizer_files(folder: Path, parts: Mapping[str, Part], *, prefix: str) -> Records:
    """Write the parts in shards of `optimizer/` whose names begin with `prefix`, and fsync them."""
    return _make_durable(folder, [f"{OPTIMIZER}/{name}" for name in _write_shards(folder / OPTIMIZER, parts, prefix)])


def write_index(folder: Path, records: Records) -> Records:
    """With the weights in several files, the index that readers of such folders look for."""
    tensors = {Path(name).name: found["tensors"] for name, found in records.items() if _is_weights(name)}
    if len(tensors) < 2:
        return {}
    weight_map = {name: file for file in sorted(tensors) for name in tensors[file]}
    total = sum(found["size"] for name, found in records.items() if _is_weights(name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / MODEL / WEIGHTS_INDEX).write_text(render_json(index), encoding="utf-8")
    return _make_durable(folder, [f"{MODEL}/{WEIGHTS_INDEX}"])


def write_state(folder: Path, state_json: str, *, step: int) -> None:
    """state.json, fsynced."""
    (folder / STATE).write_text(state_json, encoding="utf-8")
    sync(folder / STATE)
    reach("state-written", step=step)


def write_manifest(folder: Path, *, step: int, sequence: int, links: Sequence[str], records: Records) -> None:
    """Write the manifest of what is in `folder`, and fsync it and the folder. `records`: what is hashed already.

    Raises CheckpointError if pieces of tensors do not make up the whole.
    """
    names = sorted(_files_on_disk(folder))
    files = {name: records.get(name) or _describe(folder / name) for name in names}
    if gone := sorted(records.keys() - files.keys()):
        raise CheckpointError(f"{folder / gone[0]} was written, and is gone: do all ranks see the same folder?")
    if fault := _fault_of_pieces(files):
        raise CheckpointError(f"{folder}: {fault}")
    body = {
        "format_version": FORMAT_VERSION if _has_pieces(files) else 1,
        "llmtrain_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "sequence": sequence,
        "links": list(links),
        "files": files,
    }
    for parent in (folder / MODEL, folder / OPTIMIZER):
        sync(parent)
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


def load_optimizer(folder: Path) -> dict[str, StoredTensor]:
    """`<parameter>/<state>` → tensor, to be read by index. The folder is taken to be verified."""
    return stored_tensors(sorted((folder / OPTIMIZER).glob("*.safetensors")))


def _make_durable(folder: Path, names: Iterable[str]) -> Records:
    """fsync files that this rank has written, give them the mode of any other new file, and hash them.

    The safetensors writer makes files that only their owner can read, which is no use in a folder that is shared.
    """
    mode = stat.S_IMODE((folder / CONFIG).stat().st_mode)
    records, parents = {}, set[Path]()
    for name in names:
        path = folder / name
        path.chmod(mode)
        sync(path)
        records[name] = _describe(path)
        parents.add(path.parent)
    for parent in parents:
        sync(parent)
    return records


def _write_shards(folder: Path, parts: Mapping[str, Part], prefix: str) -> list[str]:
    """Write the shards, and make sure that they hold every tensor that was given; their names."""
    shards: list[dict[str, Part]] = []
    room = 0
    for name, part in sorted(parts.items()):  # a resumed run has them in another order, and writes the same files
        if not shards or part.local.nbytes > room:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = part
        room -= part.local.nbytes
    written: dict[str, Any] = {}
    names = [f"{prefix}{index:05d}.safetensors" for index in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        cut = {name: {"shape": part.shape, "offset": part.offset} for name, part in shard.items() if not part.is_whole}
        metadata = {CUT: json.dumps(cut)} if cut else None
        save_file({name: part.local for name, part in shard.items()}, folder / file, metadata=metadata)
        written |= _read_header(folder / file)
    given = {name: _entry_of(part) for name, part in parts.items()}
    if written != given:
        odd = sorted(name for name in written.keys() | given.keys() if written.get(name) != given.get(name))
        raise CheckpointError(f"{folder}: {odd[0]} was not written as it was given ({len(odd)} such tensors)")
    return names


def _entry_of(part: Part) -> dict[str, Any]:
    """What a manifest says of a tensor, or of a piece of one."""
    entry: dict[str, Any] = {"dtype": _DTYPE_NAMES[part.local.dtype], "shape": list(part.local.shape)}
    return entry if part.is_whole else entry | {"of": list(part.shape), "offset": list(part.offset)}


def _is_weights(name: str) -> bool:
    return name.startswith(f"{MODEL}/model") and name.endswith(".safetensors")


def _has_pieces(files: Mapping[str, Mapping[str, Any]]) -> bool:
    return any("of" in entry for found in files.values() for entry in found.get("tensors", {}).values())


def _fault_of_pieces(files: Mapping[str, Mapping[str, Any]]) -> str | None:
    shards = {name: found.get("tensors", {}) for name, found in files.items() if name.startswith(f"{OPTIMIZER}/")}
    return why_not_covered(shards)


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
    if fault := _fault_of_pieces(manifest.files):
        raise CheckpointError(f"{folder}: {fault}")
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
    """Name → dtype, shape of a safetensors file's tensors, and of pieces what they are of.

    The format: 8 bytes of length, then JSON.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    cut = json.loads((header.pop("__metadata__", None) or {}).get(CUT, "{}"))
    entries: dict[str, dict[str, Any]] = {}
    for name, entry in header.items():
        entries[name] = {"dtype": entry["dtype"], "shape": entry["shape"]}
        if name in cut:
            entries[name] |= {"of": cut[name]["shape"], "offset": cut[name]["offset"]}
    return entries


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
