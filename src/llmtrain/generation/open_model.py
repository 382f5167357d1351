"""Opens a MODEL of the command line: finds it, fetches it from the Hub, loads it with its tokenizer.

    run id · run folder · latest · checkpoint ──┐
    model folder · adapter folder ──────────────┼─▶ folder ─┬─ ours ─▶ Decoder ────────────┬─▶ LanguageModel
    owner/name[@revision], fetched ─────────────┘           ├─ else ─▶ HuggingFaceModel ───┤
                                                            └─ of a run whose config names a class ─▶ OwnModel
                                                     an adapter: around its base, which is found the same way

The Hub is only asked for a name of the form owner/name whose first part is no local folder, and which does not look
like a checkpoint of an older system.
"""

from __future__ import annotations

import hashlib
import logging
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError

from llmtrain.config.loading.load import load_config
from llmtrain.config.loading.renamed import is_old_checkpoint
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.own import OwnModelConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.schema import Config
from llmtrain.config.sections.sources import used_paths
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.data.tokenizers import load_tokenizer, wrap_tokenizer
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.native_bf16 import with_computing_dtype
from llmtrain.distributed.resolve import resolve
from llmtrain.errors import ConfigError
from llmtrain.generation.language_model import AnyModel, LanguageModel
from llmtrain.generation.precision import autocast_dtype
from llmtrain.models.companions import end_tokens, has_chat_template, has_tokenizer, optional_json
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.fetch import HUB_ID, base_of_adapter, fetch_model_or_adapter, is_adapter_folder
from llmtrain.models.folder import OWN_MODEL_TYPE, read_model_folder
from llmtrain.models.huggingface.quantization import Quantized
from llmtrain.models.own_model import OWN_CLASS_TYPE, OwnModel, read_own_model
from llmtrain.runs.folders import find_model
from llmtrain.runs.stores import fetched_runs

log = logging.getLogger("llmtrain.model")


def open_model(
    ref: str, *, root_dir: str = "runs", device: str = "auto", trust_remote_code: bool = False
) -> LanguageModel:
    """Load the model that `ref` names: a run (`latest`: the newest), a checkpoint, a model or adapter folder, a Hub id.

    `trust_remote_code`: run the Python code that comes with it; one on the Hub then needs a commit, `owner/name@SHA`.
    Raises ConfigError if there is none, or if it cannot be used; RunError if the Hub does not answer.
    """
    folder = locate_model(ref, root_dir=root_dir, trust_remote_code=trust_remote_code)
    return load_language_model(folder, device=device_named(device), trust_remote_code=trust_remote_code)


def locate_model(ref: str, *, root_dir: str = "runs", trust_remote_code: bool = False) -> Path:
    """Return the folder of the model or adapter that `ref` names; fetch it from the Hub if it is a Hub id.

    Raises as `open_model`.
    """
    root = fetched_runs(root_dir, ref)
    named = HUB_ID.fullmatch(ref)
    if named is not None and not is_old_checkpoint(ref):
        first = ref.partition("/")[0]
        if first != root.name and not any(path.exists() for path in (Path(ref), Path(first), root / ref, root / first)):
            if trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", named["revision"] or ""):
                raise ConfigError(f"--trust-remote-code runs code of others: name its commit, {named['name']}@COMMIT")
            return _fetch(named["name"], named["revision"], code=trust_remote_code)
    return find_model(ref, root)


def base_of(folder: Path, *, trust_remote_code: bool = False) -> Path | None:
    """Return the folder of the base model of the adapter in `folder`, fetched if necessary; None for a full model."""
    if not is_adapter_folder(folder):
        return None
    path, revision = base_of_adapter(folder)
    try:
        base = _fetch(path, revision, code=trust_remote_code or trusts_code(config_beside(folder)))
    except ConfigError as error:
        raise ConfigError(
            f"{folder} is an adapter, and its base model cannot be opened: {error}. If the base was moved, correct "
            f"base_model_name_or_path in {folder / 'adapter_config.json'}"
        ) from error
    if is_adapter_folder(base):
        raise ConfigError(f"{folder} is an adapter of {base}, which is an adapter as well: merge that one first")
    return base


def load_language_model(
    folder: Path,
    *,
    device: torch.device,
    for_rows: bool = False,
    quantized: Quantized | None = None,
    trust_remote_code: bool = False,
    precision: str | None = None,
) -> LanguageModel:
    """Load the model or adapter in `folder` to `device`. Raises ConfigError if it cannot be used.

    Weights keep the dtype that they are stored in, unless `device` does not compute it natively: then float32.

    `for_rows`: make an encoder in any case, with a plain chat template if the model has none. `quantized`: round the
    weights of an adapter's base to the values that they have with so few bits. `trust_remote_code`: run the Python code
    that comes with the model; a run whose config says so runs it in any case. `precision`: see `autocast_dtype`.
    """
    base = base_of(folder, trust_remote_code=trust_remote_code)
    config = config_beside(folder)
    trained = config.model if config is not None else None
    if base and quantized is None and isinstance(trained, HuggingFaceConfig) and trained.quantization != "none":
        log.info(
            "%s was trained on its base in %s; here the base is used as it is stored", folder, trained.quantization
        )
    if isinstance(trained, OwnModelConfig):
        network: AnyModel = with_computing_dtype(read_own_model(folder, trained), device).to(device).eval()
    else:
        network = _load(folder, base, device, quantized, trust_remote_code=trust_remote_code or trusts_code(config))
    opened = partial(LanguageModel, model=network, folder=folder, autocast=autocast_dtype(device, precision))
    tokenizer_folder = folder if base is None or has_tokenizer(folder) else base
    if not has_tokenizer(tokenizer_folder):
        return opened(tokenizer=None, encoder=None, eos_ids=frozenset())
    tuned_on_rows = config is not None and isinstance(config.data, ChatConfig)
    is_plain_text = not (tuned_on_rows or for_rows or has_chat_template(tokenizer_folder))
    if isinstance(network, Decoder | OwnModel) and is_plain_text:
        tokenizer = load_tokenizer(tokenizer_folder)
        return opened(tokenizer=tokenizer, encoder=None, eos_ids=frozenset([tokenizer.eos_id]))

    from llmtrain.data.chat.encoding import ChatEncoder
    from llmtrain.data.chat.templates import ChatTemplate
    from llmtrain.data.chat.tokenizer import load_fast_tokenizer

    found = load_fast_tokenizer(tokenizer_folder)
    has_template = found.chat_template is not None
    chats = trained_on_turns(config, otherwise=has_template) if tuned_on_rows else has_template
    return opened(
        tokenizer=wrap_tokenizer(found, where=str(tokenizer_folder)),
        encoder=ChatEncoder(ChatTemplate(found)),
        eos_ids=frozenset([int(found.eos_token_id), *end_tokens(folder), *end_tokens(base or folder)]),
        chats=chats,
    )


def tuned_from(folder: Path, *, trust_remote_code: bool = False) -> Path | None:
    """Return the folder of the model from which the one in `folder` was fine-tuned, fetched if necessary.

    Return None if it was trained from scratch. Raises ConfigError if the initial model does not exist any more.
    """
    if is_adapter_folder(folder):
        return base_of(folder, trust_remote_code=trust_remote_code)
    config = config_beside(folder)
    if config is None:
        return None
    if isinstance(config.model, HuggingFaceConfig):
        path, code = config.model.path, config.model.trust_remote_code
        return _fetch(path, config.model.revision, code=code) if config.model.init == "pretrained" else None
    initial = getattr(config.model, "init_from", None)
    return find_model(initial, folder) if initial is not None else None


def model_fingerprint(folder: Path) -> str:
    """Return a hash of the names, sizes and times of the files in `folder`, which changes with the weights."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((str(folder), stats)).encode()).hexdigest()


def config_beside(folder: Path) -> Config | None:
    """Return the config of the run whose checkpoint contains a model folder; None if the folder is of no checkpoint."""
    file = config_file_beside(folder)
    return load_config(str(file)).config if file else None


def config_file_beside(folder: Path) -> Path | None:
    """Return the path of the run's config beside a model folder; None if there is none."""
    file = folder.parent / "config.yaml"
    return file if file.is_file() else None


def device_named(name: str) -> torch.device:
    """Return the device that auto, cpu, cuda, cuda:N or mps names. Raises ConfigError if this machine lacks it."""
    try:
        run = RunConfig(device=name)
    except ValidationError:
        raise ConfigError(f"{name!r} is not a device: use auto, cpu, cuda, cuda:N or mps") from None
    trainer, distributed = TrainerConfig(precision="32", compile=False), DistributedConfig()
    device: torch.device = Engine(resolve(run, trainer, distributed), distributed=distributed).device
    return device


def trusts_code(config: Config | None) -> bool:
    """Return whether a run's config allows Python code besides llmtrain's: its model's, or a class that it names."""
    if config is None:
        return False
    return isinstance(config.model, OwnModelConfig) or getattr(config.model, "trust_remote_code", False)


def _fetch(path: str, revision: str | None, *, code: bool = False) -> Path:
    """Fetch a model by `fetch_model_or_adapter`, and remove the config key from its messages."""
    try:
        return fetch_model_or_adapter(path, revision=revision, code=code)
    except ConfigError as error:
        raise ConfigError(str(error).removeprefix("model.path ")) from error


def _load(
    folder: Path, base: Path | None, device: torch.device, quantized: Quantized | None, *, trust_remote_code: bool
) -> AnyModel:
    full = base or folder
    described = optional_json(full / "config.json")
    if described.get("model_type") == OWN_CLASS_TYPE:
        if not trust_remote_code:
            raise ConfigError(
                f"{folder} has the weights of {described.get('class')}, a class that is not part of llmtrain. It is "
                "only imported if the config.yaml of its run names it: give the run, one of its checkpoints, or "
                "--trust-remote-code, which imports it from the current folder or the installed packages"
            )
        own = OwnModelConfig(name=described["class"], options=described["options"])
        return with_computing_dtype(read_own_model(full, own), device).to(device).eval()
    if base is None and "llmtrain" in described:
        return with_computing_dtype(read_model_folder(full)[0], device).to(device).eval()
    if described.get("model_type") == OWN_MODEL_TYPE:
        raise ConfigError(
            f"{folder} is an adapter of a decoder for which transformers has no class, so it cannot be loaded: give "
            "the run whose checkpoint it is"
        )
    from llmtrain.models.huggingface.load import read_huggingface

    return read_huggingface(
        full,
        adapter=folder if base else None,
        quantized=quantized,
        device=device,
        trust_remote_code=trust_remote_code,
    )


def trained_on_turns(config: Config | None, *, otherwise: bool) -> bool:
    """Return whether the first row that a run trained on is a conversation; `otherwise` if the rows are gone."""
    from llmtrain.data.chat.shapes import Chat, example_of
    from llmtrain.data.files.read import Row, read_rows

    assert config is not None
    assert isinstance(config.data, ChatConfig)
    paths = used_paths(config.data.train, config.data.mixture)
    with suppress(ValueError):  # a ConfigError or a RowError: the files do not exist any more
        row = next(read_rows(paths[:1], key="data.train"), None)
        if isinstance(row, Row):
            return isinstance(example_of(row.values, text_column=config.data.text_column), Chat)
    return otherwise
