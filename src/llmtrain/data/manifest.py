"""The manifest of a folder of token shards: what is in it, what it was made from, and where each document's tokens lie.

    <out>/manifest.json            this file's models; written last, so a folder that has one is complete
    <out>/tokenizer/               Hugging Face format
    <out>/train/shard_00000.parquet
    <out>/val/shard_00000.parquet

Here live the models, and reading, writing and finding a manifest. Making one is `data.prepare`; reading shards is
`data.shards`. docs/data-format.md describes the same for other tools.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from llmtrain.atomic import write_text
from llmtrain.errors import ConfigError

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "val")
_REMEDY = "make the shards again with `llmtrain prepare CONFIG`"

TokenDtype = Literal["uint8", "uint16", "uint32"]
"""The narrowest unsigned integer that holds the vocabulary."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowGroups(_Record):
    """Counts of a shard's row groups, one entry for each, in file order; a row is a document.

    Columns, since 10 billion tokens have 150,000 row groups: as one object each they took 20 times as long to read.
    """

    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    """End tokens counted."""
    bytes: tuple[int, ...]
    """UTF-8 bytes of the documents' text, which bits per byte are counted over."""

    @model_validator(mode="after")
    def _same_length(self) -> RowGroups:
        if not len(self.documents) == len(self.tokens) == len(self.bytes):
            raise ValueError("documents, tokens and bytes are of different lengths")
        return self


class Shard(_Record):
    """A Parquet file. Its totals are the sums over its row groups, in file order."""

    path: str
    """Relative to the manifest's folder, with forward slashes: train/shard_00000.parquet."""
    size: int
    """Size of the file in bytes."""
    sha256: str
    rows: int
    tokens: int
    bytes: int
    row_groups: RowGroups

    @field_validator("row_groups", mode="before")
    @classmethod
    def _from_version_1(cls, value: object) -> object:
        """Turn the list of objects of format version 1 into columns."""
        if not isinstance(value, list) or not all(isinstance(group, dict) for group in value):
            return value
        return {name: [group.get(name) for group in value] for name in RowGroups.model_fields}


class Split(_Record):
    """`train` or `val`: its shards in reading order, and their sums."""

    documents: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]


class TokenizerRecord(_Record):
    """The tokenizer that made the tokens; a copy lies in the folder."""

    kind: Literal["hf", "bpe", "char"]
    path: str
    """Relative to the manifest's folder."""
    sha256: str
    vocab_size: int
    """One more than the largest token id."""
    eos_id: int
    """Ends every document."""
    source_sha256: str | None = None
    """Hash of the files of the folder that the tokenizer was copied from (kind hf, from a folder)."""
    trained_documents: int | None = None
    """Documents that it was trained on (kinds bpe and char): all for training; for bpe of a large corpus a sample."""
    trained_bytes: int | None = None


class InputRecord(_Record):
    """One of the inputs: a folder, a file or a glob."""

    name: str
    """Name of the input in the column `source`."""
    path: str
    """Path of the input as the config gives it."""
    files: int
    bytes: int
    sha256: str
    """Over each file's name and content, in reading order."""


class DroppedRecord(_Record):
    """Documents that a rule of a quality step left out."""

    documents: int
    bytes: int
    """Bytes of their text as the step was given it."""
    by_source: dict[str, int]
    """Documents by the name of their input."""


class StepRecord(_Record):
    """A quality step: what it is, besides its options, and what it did. documents = those that go on + dropped."""

    name: str
    version: int
    """Version of the step: raised when the same text gives another answer."""
    library: str | None = None
    """Package that it needs, with the version that was used."""
    function_sha256: str | None = None
    """Hash of the module of a function of the user's own."""
    documents: int = 0
    """Documents that it was given."""
    bytes: int = 0
    altered: int = 0
    """Documents that go on with another text."""
    bytes_after: int = 0
    """Bytes of the documents that go on."""
    dropped: dict[str, DroppedRecord] = {}
    """Documents that it left out, by rule."""

    def differs(self, now: StepRecord) -> bool:
        """Return whether the step gives other answers now; the version of a library alone says nothing of that."""
        mine, theirs = ((one.name, one.version, one.function_sha256) for one in (self, now))
        return mine != theirs


class Counts(_Record):
    """Number of documents of each fate. read = train + val + dropped + empty + errors."""

    read: int
    train: int
    val: int
    dropped: int
    """Left out by a quality step."""
    empty: int
    errors: int

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        """Read manifests from before there were quality steps, which counted two reasons by name."""
        if isinstance(values, dict) and "dropped" not in values and {"duplicates", "too_short"} <= values.keys():
            values = dict(values)
            values["dropped"] = values.pop("duplicates") + values.pop("too_short")
        return values

    def check(self) -> None:
        """Assert that no document was lost on the way."""
        rejected = self.dropped + self.empty + self.errors
        assert self.read == self.train + self.val + rejected, f"documents were lost: {self}"


class Manifest(_Record):
    """All that is known of a folder of token shards."""

    format_version: Literal[1, 2] = 2
    tool_version: str
    options: dict[str, Any]
    """The `prepare` section with its defaults, without input, output and num_workers."""
    inputs: tuple[InputRecord, ...]
    tokenizer: TokenizerRecord
    token_dtype: TokenDtype
    counts: Counts
    steps: tuple[StepRecord, ...] = ()
    """Quality steps in their order; none in manifests of earlier versions."""
    splits: dict[str, Split]
    """Splits by name: train, and val where documents are held out."""


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read `folder`/manifest.json.

    Raises ConfigError when it is missing, broken or of another format version.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, so there are no complete token shards here; {_REMEDY}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_manifest(content, name=str(path))


def parse_manifest(content: bytes, *, name: str) -> Manifest:
    """Return the manifest in a file's content; `name` is the file's, for messages.

    Raises ConfigError when it is broken or of another format version.
    """
    with suppress(ValidationError):  # twice as fast, where 10 billion tokens take half a second; says less of faults
        return Manifest.model_validate_json(content)
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{name}: is no JSON ({error}); {_REMEDY}") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ConfigError(
            f"{name}: format_version is {version}, but this version of llmtrain reads {FORMAT_VERSION}: "
            f"update llmtrain, or {_REMEDY}"
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise ConfigError(f"{name}: {where}: {first['msg']}; {_REMEDY}") from error


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Write `folder`/manifest.json durably; it appears whole or not at all. Returns its path."""
    path = Path(folder) / MANIFEST_NAME
    write_text(path, json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    return path


def find_manifest(path: str | os.PathLike[str]) -> Path | None:
    """Return the folder whose manifest covers `path`: a shard, a subset's or split's folder, or the output folder.

    Looks in `path` and, where it lies in <out>/train or <out>/val, above that folder; None when there is no manifest.
    """
    start = Path(os.path.abspath(path))
    for folder in (start, *start.parents[:3]):
        below = start.relative_to(folder).parts
        if (not below or below[0] in SPLITS) and (folder / MANIFEST_NAME).is_file():
            return folder
    return None
