"""Writes the result of `export` or `merge`, loads it again, and compares it with its source before it counts.

source ─ its answers to held-out rows ───────────────────────────────────┐
written to a temporary folder ─ loaded again ─ answers to the same rows ─┴─ within tolerance ─▶ export.json ─▶ moved
                                                                         └─ else: one message, nothing is left
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtrain._version import __version__
from llmtrain.atomic import file_sha256, write_json
from llmtrain.config.sections.schema import Config
from llmtrain.config.sections.training import DistributedConfig
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.errors import ConfigError, RunError
from llmtrain.evaluation.held_out import evaluation_config, open_held_out
from llmtrain.generation.language_model import LanguageModel
from llmtrain.generation.open_model import config_beside, locate_model, trusts_code
from llmtrain.models.companions import has_code
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.fetch import HUB_ID, base_of_adapter, is_adapter_folder
from llmtrain.models.folder import declared_dtype
from llmtrain.models.own_model import OwnModel
from llmtrain.publishing.agreement import Answers, Logits, ModelAgreement, answer, compare, values
from llmtrain.publishing.place import EXPORT_FILE, check_free, new_folder
from llmtrain.publishing.public_text import public
from llmtrain.publishing.transformers_folder import check_companions, find_tokenizer, write_companions
from llmtrain.runs.folders import is_run
from llmtrain.runs.metadata import slug
from llmtrain.screen import counted

log = logging.getLogger("llmtrain.export")

NUM_ROWS = 8
ROW_TOKENS = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Tolerances by the dtype that a result is computed in, as shares of the largest logit: two orders of sums."""
PROBES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "def add(first: int, second: int) -> int:\n    return first + second\n",
    "In 1969, three people flew to the Moon; two of them walked there for 2 hours and 31 minutes.",
    "Zażółć gęślą jaźń – ¿qué tal? Ελληνικά, русский, 中文, 日本語 🙂",
)
"""Texts on which every tokenizer is compared, and a model without a run."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Request for a result: where, in which dtype, how exact."""

    to: str | None = None
    """New folder for the result; artifacts/<kind>/<name> if not given."""
    dtype: str | None = None
    """Dtype of the stored weights; the source's if not given."""
    data: Sequence[str] = ()
    """Rows or shards to compare on; the run's validation data if not given."""
    tolerance: float | None = None
    """Share of the largest logit by which the result may differ from its source. If not given, the difference that
    comes from rounding the weights is allowed, and the rest is judged without it."""
    device: str = "auto"
    root_dir: str = "runs"
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    force: bool = False
    """Replace an earlier result in that folder."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to export, merge or publish."""

    folder: Path
    """Folder of the model or the adapter."""
    name: str
    """Name for results: the run's id, else the name of the folder or the model."""
    run: Path | None
    config: Config | None
    trusts_code: bool = False
    """True if its run, or this command, was told to run the Python code that comes with the model."""

    @property
    def checkpoint(self) -> str | None:
        """Name of the checkpoint; None for a model of no run."""
        return self.folder.parent.name if self.run is not None else None


def find_source(ref: str, *, root_dir: str, trust_remote_code: bool = False) -> Source:
    """Find the model that `ref` names. Raises ConfigError if there is none."""
    folder = locate_model(ref, root_dir=root_dir, trust_remote_code=trust_remote_code)
    run = folder.parent.parent.parent
    config = config_beside(folder)
    trusted = trust_remote_code or trusts_code(config)
    if is_run(run):
        return Source(folder=folder, name=run.name, run=run, config=config, trusts_code=trusted)
    on_hub = None if Path(ref).exists() else HUB_ID.fullmatch(ref)
    name = on_hub["name"].rpartition("/")[2] if on_hub else folder.name
    return Source(folder=folder, name=slug(name), run=None, config=config, trusts_code=trusted)


def destination_of(source: Source, request: Request, *, kind: str) -> Path:
    """Return the folder for the result. Raises ConfigError if it exists, before any model is loaded."""
    folder = Path(request.to) if request.to is not None else Path("artifacts") / kind / source.name
    check_free(folder, force=request.force)
    return folder


@dataclass(frozen=True, kw_only=True)
class Work:
    """A loaded source with its answers to held-out rows, with which a result is compared."""

    source: Source
    request: Request
    kind: str
    """hf, onnx, merged …"""
    destination: Path
    model: LanguageModel
    """Model in float32, in which two models with the same weights agree to a hundred-thousandth."""
    sources: Sequence[Path]
    """Folders from which companions are copied: the source's, then its base's."""
    rows: Sequence[Sequence[int]]
    rows_from: str
    answers: Answers

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text, and a turn if the model has learned turns."""
        return self.model.stop_ids(chat=self.model.chats)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer."""
        return find_tokenizer(self.sources)

    @property
    def device(self) -> torch.device:
        """Device on which the source and the result are computed."""
        return self.model.model.device

    def tolerance(self, dtype: torch.dtype) -> float:
        """Share of the largest logit by which a result that computes in this dtype may differ."""
        return TOLERANCES[dtype] if self.request.tolerance is None else self.request.tolerance


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """Result before it is written, in float32: what its file has to say, once its weights are rounded in memory too."""

    network: nn.Module
    logits: Logits
    source_dtype: torch.dtype | None = None
    """Dtype of weights that are the source's own, rounded once already; None: they are to say what the source says."""


@torch.no_grad()
def rounded_answers(work: Work, result: InMemory, *, dtype: torch.dtype) -> Answers:
    """Round a result's weights, and return what it says then, as its file has to.

    Raises RunError if it does not say what its source says while its weights are exact.
    """
    limit = work.model.model.max_seq_len
    tolerance = TOLERANCES[result.source_dtype or torch.float32]
    if result.network is not work.model.model:
        exact = compare(work.answers, answer(result.logits, work.rows, limit=limit))
        if (why := exact.why_not_within(tolerance)) is not None:
            raise RunError(
                f"the result does not agree with {work.source.folder}: {why}, before its weights are rounded"
            )
    for tensor in result.network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return answer(result.logits, work.rows, limit=limit)


def begin(source: Source, request: Request, model: LanguageModel, *, kind: str, base: Path | None = None) -> Work:
    """Compute the source's answers to held-out rows. `base` is the folder of its base, which may have the tokenizer.

    Raises ConfigError for `request.data` that cannot be read, and for a destination that exists.
    """
    destination = destination_of(source, request, kind=kind)
    model.model.float()
    rows, rows_from = _held_out_rows(source, model, data=request.data)
    return Work(
        source=source,
        request=request,
        kind=kind,
        destination=destination,
        model=model,
        sources=[source.folder, *([base] if base else [])],
        rows=rows,
        rows_from=rows_from,
        answers=answer(lambda ids: model.model.logits(ids.to(model.model.device)), rows, limit=model.model.max_seq_len),
    )


def stored_dtype(model: LanguageModel, asked: str | None) -> torch.dtype:
    """Return the dtype of the result's weights: `asked`, else the source's. Raises ConfigError for an unknown one."""
    if asked is not None:
        if asked not in DTYPES:
            raise ConfigError(f"--dtype {asked}: it should be one of {', '.join(DTYPES)}")
        return DTYPES[asked]
    network = model.model
    declared = (
        declared_dtype(model.folder) if isinstance(network, Decoder | OwnModel) else network.causal_lm.config.dtype
    )
    return declared if declared in TOLERANCES else torch.float32


def make_and_check(
    work: Work,
    *,
    dtype: torch.dtype,
    write: Callable[[Path], None],
    reopen: Callable[[Path], Logits],
    result: InMemory | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Write a result, load it again, and compare its answers with the source's. Return the content of export.json.

    `result`: what is written; only its weights are rounded to `dtype`, and the comparison computes in float32. It is
    first rounded in memory, and the file must agree with that as two orders of sums do. `facts` are added to
    export.json. Raises RunError if the difference is over the tolerance; then nothing is written to the destination.
    """
    judged_alone = result is not None and dtype != torch.float32
    tolerance = work.tolerance(torch.float32 if judged_alone else dtype)
    expected = rounded_answers(work, result, dtype=dtype) if result is not None and judged_alone else work.answers
    with new_folder(work.destination, force=work.request.force) as folder:
        write(folder)
        write_companions(folder, sources=work.sources, eos_ids=work.eos_ids)
        answers = answer(reopen(folder), work.rows, limit=work.model.model.max_seq_len)
        agreement, written = compare(work.answers, answers), compare(expected, answers)
        document = {
            "kind": work.kind,
            "source": described(work.source),
            "dtype": str(dtype).removeprefix("torch."),
            **facts,
            "compared_on": public(work.rows_from),
            **values(agreement),
            "max_difference_as_written": written.max_difference,
            "tolerance": tolerance,
            **_check_companions(work, folder),
            "has_code": has_code(folder),
            "files": files_in(folder),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
        }
        why = written.why_not_within(TOLERANCES[torch.float32] if judged_alone else tolerance)
        if work.request.tolerance is not None:
            why = why or agreement.why_not_within(tolerance)
        if why is not None:
            raise RunError(
                f"the result does not agree with {work.source.folder}: {why} ({counted(agreement.rows, 'row')}, "
                f"{work.rows_from}). Nothing was written to {work.destination}{_ways_out(agreement, dtype)}"
            )
        write_json(folder / EXPORT_FILE, document)
    return {"output": str(work.destination.absolute()), **document}


def _ways_out(agreement: ModelAgreement, dtype: torch.dtype) -> str:
    """Return what to do where weights are rounded, or a graph computes in few bits, and the user allowed less."""
    needed = max(agreement.max_difference, agreement.largest_gap / 2)
    if dtype == torch.float32 or not math.isfinite(needed):
        return ""
    return (
        f". Rounding to {str(dtype).removeprefix('torch.')} may do this by itself: store the weights exactly with "
        f"--dtype float32, or accept the difference with --tolerance {math.ceil(needed * 100) / 100:g}"
    )


def _check_companions(work: Work, folder: Path) -> dict[str, Any]:
    tokenizer = work.model.tokenizer
    if tokenizer is None or work.tokenizer_folder is None:
        return {}
    texts = {text: tokenizer.encode(text) for text in PROBES}
    return check_companions(folder, source=work.tokenizer_folder, texts=texts, eos_ids=work.eos_ids)


# -- held-out rows -----------------------------------------------------------------------------------------------------


def _held_out_rows(source: Source, model: LanguageModel, *, data: Sequence[str]) -> tuple[list[list[int]], str]:
    """Return rows of at least two tokens to compare on, and the name of their source.

    They are from `data`, else from the run's validation data, else built-in texts.
    """
    limit = min(ROW_TOKENS, model.model.max_seq_len or ROW_TOKENS)
    if source.config is not None or data:
        try:
            return _rows_of_data(source, model, data=data, limit=limit)
        except ConfigError as error:
            if data:
                raise
            log.warning("the run's validation data cannot be read (%s): built-in texts are compared instead", error)
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        size = (NUM_ROWS, limit)
        return torch.randint(model.model.vocab_size, size, generator=generator).tolist(), "random tokens"
    rows = [model.prompt_ids(text, is_complete=False)[:limit] for text in PROBES]
    return [row for row in rows if len(row) > 1], "built-in texts"


def _rows_of_data(
    source: Source, model: LanguageModel, *, data: Sequence[str], limit: int
) -> tuple[list[list[int]], str]:
    config = evaluation_config(source.folder, data=list(data)).model_copy(update={"prepare": None})
    run = config.run.model_copy(update={"device": "cpu"})
    trainer = config.trainer.model_copy(update={"compile": False, "precision": "32"})
    distributed = DistributedConfig()  # this is one process, whatever the run had
    engine = Engine(resolve(run, trainer, distributed), distributed=distributed)
    validation = open_held_out(config, model, engine=engine)
    with closing(validation.evaluation_batches(batch_size=1, max_batches=NUM_ROWS)) as batches:
        rows = [batch["input_ids"][0, :limit].tolist() for batch in batches]
    if not (rows := [row for row in rows if len(row) > 1]):
        raise ConfigError(f"{validation.name} has no row of two tokens")
    return rows, validation.name


# -- what export.json says ---------------------------------------------------------------------------------------------


def described(source: Source) -> dict[str, Any]:
    """Return a description of the source for export.json, without paths of this machine."""
    description: dict[str, Any] = {"name": source.name, "checkpoint": source.checkpoint}
    if is_adapter_folder(source.folder):
        base, revision = base_of_adapter(source.folder)
        description |= {"base": Path(base).name if Path(base).is_absolute() else base, "base_revision": revision}
    weights = sorted(source.folder.glob("*.safetensors"))
    return description | {"weights_sha256": {file.name: file_sha256(file) for file in weights}}


def files_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and sha256 of each file, by its path in `folder`."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in found
    }
