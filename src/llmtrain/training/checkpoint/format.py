"""The format of one checkpoint: its files, how they are made durable, verified and read.

    step_000500/
      MANIFEST.json   size and sha256 of every file, dtype and shape of every tensor; written last
      config.yaml     the run's resolved config
      state.json      the state of the training loop
      model/          written by the model's own writer
      optimizer/      shard_00000.safetensors …, tensors named <parameter>/<state>

Where several ranks write a checkpoint, each writes files of its own: full tensors in `model/`, and in `optimizer/` the
slices that it holds (`slices.py`). Rank 0 then writes the rest, the manifest last. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmtrain._version import __version__
from llmtrain.atomic import file_sha256, sync, write_text
from llmtrain.distributed.sharding import Part
from llmtrain.errors import RunError
from llmtrain.faults import reach
from llmtrain.training.checkpoint.slices import (
    StoredTensor,
    TensorSlice,
    save_parts,
    slices_in,
    slices_of,
    stored_tensors,
    why_incomplete,
)

FORMAT_VERSION = 2
"""The newest format that is read. A checkpoint without sharded tensors is written as format 1."""
MANIFEST = "MANIFEST.json"
CONFIG = "config.yaml"
STATE = "state.json"
MODEL = "model"
OPTIMIZER = "optimizer"
WEIGHTS_INDEX = "model.safetensors.index.json"

MAX_SHARD_BYTES = 2 * 1024**3
"""A file of optimizer state is closed before it grows larger."""

Records = dict[str, dict[str, Any]]
"""Path under the checkpoint → what the manifest says of the file: size, sha256, and for safetensors its tensors."""


class CheckpointError(RunError):
    """A checkpoint cannot be written, or is not what was written. One message, meant for the user."""


class SaveFailed(CheckpointError):
    """The file system did not take a checkpoint: the run may go on, and save again."""


@dataclass(frozen=True)
class CheckpointManifest:
    """Content of MANIFEST.json."""

    step: int
    sequence: int
    """Number of the checkpoint in its run: a later save has a higher one, whatever its step."""
    files: Records
    links: tuple[str, ...]
    """Links that the save was to move here; the next start moves them if the save was killed before it did."""


def render_json(content: Mapping[str, Any]) -> str:
    """Return strict JSON text. Raises TypeError or ValueError for what JSON cannot hold, NaN and infinity included."""
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


# -- writing -----------------------------------------------------------------------------------------------------------


def begin_files(folder: Path, *, config_yaml: str) -> None:
    """Write the config into an empty folder, and make the folders that the ranks fill."""
    _write_durably(folder / CONFIG, config_yaml)
    (folder / MODEL).mkdir()
    (folder / OPTIMIZER).mkdir()


def finish_files(folder: Path, names: Iterable[str]) -> Records:
    """Make files that this rank wrote durable, give them the mode of any other new file, and describe them.

    The writer of safetensors makes files that only their owner can read, which is no use in a shared folder.
    """
    mode = stat.S_IMODE((folder / CONFIG).stat().st_mode)
    records: Records = {}
    for name in names:
        (folder / name).chmod(mode)
        sync(folder / name)
        records[name] = _describe(folder / name)
    for parent in {(folder / name).parent for name in records}:
        sync(parent)
    return records


def finish_model_files(folder: Path, *, known: Records) -> Records:
    """Finish all files of `model/` that are not known yet."""
    names = {f"{MODEL}/{name}" for name in _files_on_disk(folder / MODEL)}
    return finish_files(folder, sorted(names - known.keys()))


def write_optimizer_files(folder: Path, parts: Mapping[str, Part], *, prefix: str) -> Records:
    """Write parts of optimizer state into files of `optimizer/` whose names begin with `prefix`; describe the files.

    Raises CheckpointError if the files do not hold what was given.
    """
    shards: list[dict[str, Part]] = []
    room = 0
    for name, part in sorted(parts.items()):  # a resumed run has them in another order, and writes the same files
        if not shards or part.local.nbytes > room:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = part
        room -= part.local.nbytes
    names = [f"{OPTIMIZER}/{prefix}{index:05d}.safetensors" for index in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_parts(folder / name, shard)
    records = finish_files(folder, names)
    written = {name: tensor for record in records.values() for name, tensor in record["tensors"].items()}
    given = {name: stored.as_record() for name, stored in slices_of(parts).items()}
    if written != given:
        wrong = sorted(name for name in written.keys() | given.keys() if written.get(name) != given.get(name))
        raise CheckpointError(f"{folder}: {wrong[0]} was not written as it was given ({len(wrong)} such tensors)")
    return records


def write_index(folder: Path, records: Records) -> Records:
    """Write the index that readers of weights in several files look for; nothing where there is one file."""
    weights = {
        Path(name).name: record
        for name, record in sorted(records.items())
        if name.startswith(f"{MODEL}/model") and name.endswith(".safetensors")
    }
    if len(weights) < 2:
        return {}
    weight_map = {name: file for file, record in weights.items() for name in record["tensors"]}
    total = sum(record["size"] for record in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / MODEL / WEIGHTS_INDEX).write_text(render_json(index), encoding="utf-8")
    return finish_files(folder, [f"{MODEL}/{WEIGHTS_INDEX}"])


def write_state(folder: Path, state_json: str, *, step: int) -> None:
    """Write state.json."""
    _write_durably(folder / STATE, state_json)
    reach("state-written", step=step)


def write_manifest(folder: Path, *, step: int, sequence: int, links: Sequence[str], records: Records) -> None:
    """Write the manifest of what is in `folder`, and fsync it and the folder. `records`: files described already.

    Raises CheckpointError if the slices of a tensor do not make up the tensor.
    """
    names = sorted(_files_on_disk(folder))
    files = {name: records.get(name) or _describe(folder / name) for name in names}
    if gone := sorted(records.keys() - files.keys()):
        raise CheckpointError(f"{folder / gone[0]} was written, and is gone: do all ranks see the same folder?")
    sharded = _sharded_tensors(files)
    if fault := why_incomplete(sharded):
        raise CheckpointError(f"{folder}: {fault}")
    body = {
        "format_version": FORMAT_VERSION if sharded else 1,
        "llmtrain_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "sequence": sequence,
        "links": list(links),
        "files": files,
    }
    for parent in (folder / MODEL, folder / OPTIMIZER):
        sync(parent)
    (folder / MANIFEST).write_text(sealed(body), encoding="utf-8")
    reach("manifest-written", step=step)
    sync(folder / MANIFEST)
    sync(folder)
    reach("manifest-synced", step=step)


def renumber(folder: Path, sequence: int, *, links: Sequence[str]) -> None:
    """Give a finished checkpoint another number in its run, in one step: its other files stay as they are.

    Raises CheckpointError if its manifest cannot be read, and OSError.
    """
    read_manifest(folder)
    body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    write_text(folder / MANIFEST, sealed(body | {"sequence": sequence, "links": list(links)}))
    sync(folder)


def sealed(body: Mapping[str, Any]) -> str:
    """Return a manifest's text: `body` and, last, the sha256 of its text without it. So the manifest guards itself."""
    unsealed = {name: value for name, value in body.items() if name != "checksum"}
    checksum = hashlib.sha256(render_json(unsealed).encode()).hexdigest()
    return render_json(unsealed | {"checksum": checksum})


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def _describe(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"{path} is not a plain file, and a checkpoint holds nothing else")
    record: dict[str, Any] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    if path.suffix == ".safetensors":
        record["tensors"] = _tensors_in(path)
    return record


def _tensors_in(path: Path) -> dict[str, dict[str, Any]]:
    return {name: stored.as_record() for name, stored in slices_in(path).items()}


def _sharded_tensors(files: Records) -> dict[str, list[TensorSlice]]:
    """Return the slices of each tensor that is not stored in full."""
    found: dict[str, list[TensorSlice]] = {}
    for file in files.values():
        for name, record in file.get("tensors", {}).items():
            if not (stored := TensorSlice.from_record(record)).is_full:
                found.setdefault(name, []).append(stored)
    return found


def _files_on_disk(folder: Path) -> set[str]:
    """Return the paths under the folder of all that is not a folder, without hidden names and the manifest."""
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = [path.relative_to(folder) for path in paths]
    return {name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)} - {MANIFEST}


# -- reading -----------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read the manifest. Raises CheckpointError if it is missing, damaged, or of a format that is not known here."""
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
        raise CheckpointError(f"{path} is damaged: it is not a JSON object with a format_version")
    if body["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {body['format_version']}, and this llmtrain ({__version__}) reads up to "
            f"{FORMAT_VERSION}: use the newer llmtrain that wrote it ({body.get('llmtrain_version')})"
        )
    if sealed(body) != text:
        raise CheckpointError(f"{path} is damaged: its text does not have the checksum that it names")
    return CheckpointManifest(
        step=body["step"], sequence=body["sequence"], files=body["files"], links=tuple(body["links"])
    )


def verify(folder: Path, *, content: bool = True) -> None:
    """Raise CheckpointError that names the first missing, extra or damaged file or tensor; else return.

    Without `content`, only the manifest and the names and sizes of the files are checked, which reads none of them.
    Hidden files (.DS_Store, .nfs…) are passed over.
    """
    try:
        _verify(folder, content=content)
    except OSError as error:  # the disk cannot be read, or another process deletes the checkpoint at this moment
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def _verify(folder: Path, *, content: bool) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no checkpoint folder")
    files = read_manifest(folder).files
    on_disk = _files_on_disk(folder)
    for name in sorted(files.keys() | on_disk | {CONFIG, STATE}):
        if name not in on_disk:
            raise CheckpointError(f"{folder / name} is missing")
        if name not in files:
            raise CheckpointError(f"{folder / name} is extra: {MANIFEST} does not list it")
        if (size := (folder / name).stat().st_size) != files[name]["size"]:
            raise CheckpointError(f"{folder / name} has {size} bytes instead of {files[name]['size']}")
    if fault := why_incomplete(_sharded_tensors(files)):
        raise CheckpointError(f"{folder}: {fault}")
    if content:
        for name, record in files.items():
            _verify_content(folder / name, record)


def _verify_content(path: Path, record: Mapping[str, Any]) -> None:
    if file_sha256(path) != record["sha256"]:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}")
    if "tensors" not in record:
        return
    found, expected = _tensors_in(path), record["tensors"]
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise CheckpointError(f"{path}: tensor {name} is {found.get(name)} instead of {expected.get(name)}")


def load_state(folder: Path) -> dict[str, Any]:
    """Read state.json of a verified checkpoint."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    assert isinstance(state, dict)
    return state


def load_optimizer(folder: Path) -> dict[str, StoredTensor]:
    """Return the optimizer state of a verified checkpoint: `<parameter>/<state>` → tensor, read when it is indexed."""
    return stored_tensors(sorted((folder / OPTIMIZER).glob("*.safetensors")))
