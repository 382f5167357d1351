"""From what a user calls a MODEL to a `LanguageModel`: found, fetched if it is on the Hub, loaded, with its tokenizer.

    run id · run folder · latest · checkpoint ──┐
    model folder · adapter folder ──────────────┼─▶ folder ─┬─ ours ─▶ Decoder ────────────┬─▶ LanguageModel
    owner/name[@revision], fetched ─────────────┘           └─ else ─▶ HuggingFaceModel ───┘
                                                     an adapter: around its base, which is found the same way

What does not look like owner/name, or begins with a folder that is here, is never looked for on the Hub.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from llmtrain.config.chat import ChatConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.huggingface import HuggingFaceConfig
from llmtrain.config.load import load_config
from llmtrain.config.running import RunConfig
from llmtrain.config.schema import Config
from llmtrain.config.sources import WeightedSource
from llmtrain.config.training import DistributedConfig, TrainerConfig
from llmtrain.contracts import TOKENIZER_FILES
from llmtrain.data.tokenizers import load_tokenizer, wrap_tokenizer
from llmtrain.distributed.engine import Engine, resolve
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import OWN_MODEL_TYPE, read_model_folder
from llmtrain.models.hub import HUB_ID, base_of_adapter, fetch_to_use, is_adapter_folder
from llmtrain.models.quantized import Quantized
from llmtrain.recipes.loading.language_model import AnyModel, LanguageModel
from llmtrain.training.runs import find_model

log = logging.getLogger("llmtrain.model")


def open_model(ref: str, *, root_dir: str = "runs", device: str = "auto") -> LanguageModel:
    """The model that `ref` names: a run (`latest` is the newest), a checkpoint, a model or adapter folder, a Hub id.

    Raises ConfigError if there is none, or it cannot be used; RunError if the Hub does not answer.
    """
    return load_language_model(locate_model(ref, root_dir=root_dir), device=device_named(device))


def locate_model(ref: str, *, root_dir: str = "runs") -> Path:
    """The folder of the model or adapter that `ref` names, fetched from the Hub if need be. Raises as `open_model`."""
    root = Path(root_dir)
    named = HUB_ID.fullmatch(ref)
    if named is not None:
        first = ref.partition("/")[0]
        if first != root.name and not any(path.exists() for path in (Path(ref), Path(first), root / ref, root / first)):
            return _fetch(named["name"], named["revision"])
    return find_model(ref, root)


def base_of(folder: Path) -> Path | None:
    """The folder of the model that an adapter in `folder` belongs to, fetched if need be; None for a whole model."""
    if not is_adapter_folder(folder):
        return None
    path, revision = base_of_adapter(folder)
    try:
        base = _fetch(path, revision)
    except ConfigError as error:
        raise ConfigError(
            f"{folder} is an adapter, and its base is not to be had: {error}. Where it lies elsewhere now, correct "
            f"base_model_name_or_path in {folder / 'adapter_config.json'}"
        ) from error
    if is_adapter_folder(base):
        raise ConfigError(f"{folder} is an adapter of {base}, which is one as well: merge that one first")
    return base


def load_language_model(
    folder: Path, *, device: torch.device, for_rows: bool = False, quantized: Quantized | None = None
) -> LanguageModel:
    """The model or adapter in `folder`, on `device`. Raises ConfigError where it cannot be used.

    `for_rows`: with an encoder in any case, a plain chat template where the model has none. `quantized`: the base of an
    adapter is given the values that it has in so few bits.
    """
    base = base_of(folder)
    config = config_beside(folder)
    trained = config.model if config is not None else None
    if base and quantized is None and isinstance(trained, HuggingFaceConfig) and trained.quantization != "none":
        log.info("%s was trained on its base in %s, and meets it as it is stored", folder, trained.quantization)
    network = _load(folder, base, device, quantized)
    beside = folder if base is None or _has_tokenizer(folder) else base
    if not _has_tokenizer(beside):
        return LanguageModel(model=network, tokenizer=None, encoder=None, eos_ids=frozenset(), folder=folder)
    tuned_on_rows = config is not None and isinstance(config.data, ChatConfig)
    if isinstance(network, Decoder) and not (tuned_on_rows or for_rows or _has_chat_template(beside)):
        tokenizer = load_tokenizer(beside)
        eos_ids = frozenset([tokenizer.eos_id])
        return LanguageModel(model=network, tokenizer=tokenizer, encoder=None, eos_ids=eos_ids, folder=folder)

    from llmtrain.data.chat.encoding import ChatEncoder
    from llmtrain.data.chat.templates import ChatTemplate
    from llmtrain.recipes.rows.chat_samples import load_fast_tokenizer

    found = load_fast_tokenizer(beside)
    has_template = found.chat_template is not None
    chats = learned_turns(config, otherwise=has_template) if tuned_on_rows else has_template
    return LanguageModel(
        model=network,
        tokenizer=wrap_tokenizer(found, where=str(beside)),
        encoder=ChatEncoder(ChatTemplate(found)),
        eos_ids=frozenset([int(found.eos_token_id), *declared_eos_ids(folder), *declared_eos_ids(base or folder)]),
        folder=folder,
        chats=chats,
    )


def tuned_from(folder: Path) -> Path | None:
    """The folder of the model that the one in `folder` was tuned from, fetched if need be; None for one that was not.

    Raises ConfigError where it is not there any more.
    """
    if is_adapter_folder(folder):
        return base_of(folder)
    config = config_beside(folder)
    if config is None:
        return None
    if isinstance(config.model, HuggingFaceConfig):
        return _fetch(config.model.path, config.model.revision) if config.model.init == "pretrained" else None
    return find_model(config.model.init_from, folder) if config.model.init_from is not None else None


def model_fingerprint(folder: Path) -> str:
    """Changes when other weights stand in `folder`: by names, sizes and times of its files."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    about = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((str(folder), about)).encode()).hexdigest()


def config_beside(folder: Path) -> Config | None:
    """The config of the run whose checkpoint a model folder belongs to; None for one that stands alone."""
    beside = config_file_beside(folder)
    return load_config(str(beside)).config if beside else None


def config_file_beside(folder: Path) -> Path | None:
    """Where it is written."""
    beside = folder.parent / "config.yaml"
    return beside if beside.is_file() else None


def device_named(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps. Raises ConfigError for what this machine has not, or what is no device."""
    try:
        run = RunConfig(device=name)
    except ValidationError:
        raise ConfigError(f"{name!r} is no device; it should be auto, cpu, cuda, cuda:N or mps") from None
    trainer, distributed = TrainerConfig(precision="32", compile=False), DistributedConfig()
    device: torch.device = Engine(resolve(run, trainer, distributed), distributed=distributed).device
    return device


def _fetch(path: str, revision: str | None) -> Path:
    """As `hub.fetch_to_use`, whose messages are for the key of a config."""
    try:
        return fetch_to_use(path, revision=revision)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("model.path ")) from error


def _load(folder: Path, base: Path | None, device: torch.device, quantized: Quantized | None) -> AnyModel:
    whole = base or folder
    if base is None and "llmtrain" in _json(whole / "config.json"):
        return read_model_folder(whole)[0].to(device).eval()
    if _json(whole / "config.json").get("model_type") == OWN_MODEL_TYPE:
        raise ConfigError(f"{folder} is an adapter of a decoder that transformers does not have: it cannot be loaded")
    from llmtrain.models.huggingface_load import read_huggingface

    return read_huggingface(whole, adapter=folder if base else None, quantized=quantized, device=device)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES if name != "chat_template.jinja")


def _has_chat_template(folder: Path) -> bool:
    return (folder / "chat_template.jinja").is_file() or "chat_template" in _json(folder / "tokenizer_config.json")


def declared_eos_ids(folder: Path) -> list[int]:
    """End tokens by generation_config.json and config.json; the former may name several."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        declared = _json(folder / name).get("eos_token_id")
        ids += [declared] if isinstance(declared, int) else declared if isinstance(declared, list) else []
    return ids


def learned_turns(config: Config | None, *, otherwise: bool) -> bool:
    """Whether the first of the rows that a run trained on is a conversation; `otherwise` where they are gone."""
    from llmtrain.data.chat.rows import Row, read_rows
    from llmtrain.data.chat.shapes import Chat, example_of

    assert config is not None
    assert isinstance(config.data, ChatConfig)
    train = config.data.train if isinstance(config.data.train, list) else [config.data.train]
    paths = [source.path if isinstance(source, WeightedSource) else source for source in train]
    with suppress(ValueError):  # a ConfigError or a RowError: the files are not there any more
        row = next(read_rows(paths[:1], key="data.train"), None)
        if isinstance(row, Row):
            return isinstance(example_of(row.values, text_column=config.data.text_column), Chat)
    return otherwise


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}
