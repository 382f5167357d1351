"""Train language models from raw text to publication, with one config file. The Python API; see docs/python.md.

    import llmtrain

    run = llmtrain.train("quickstart", overrides=["trainer.max_steps=50"])
    model = llmtrain.load_model(run["run"])
    print(model.generate("import ", max_new_tokens=32)[0].completion)

Each name is imported when it is first asked for, so `import llmtrain` alone imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmtrain._version import __version__

if TYPE_CHECKING:
    from llmtrain.api import evaluate, load_decoder, load_model, prepare, train
    from llmtrain.config.loading.load import LoadedConfig, load_config
    from llmtrain.config.sections.model import DecoderConfig
    from llmtrain.config.sections.schema import Config
    from llmtrain.data.tokenizers import Tokenizer, load_tokenizer
    from llmtrain.errors import ConfigError, Hang, Preempted, RunError, WillFailAgain, WorkersFailed
    from llmtrain.generation.completion import Completion
    from llmtrain.generation.language_model import LanguageModel
    from llmtrain.models.decoder.decoder import Decoder

_HOMES = {
    "llmtrain.api": ("evaluate", "load_decoder", "load_model", "prepare", "train"),
    "llmtrain.errors": ("ConfigError", "Hang", "Preempted", "RunError", "WillFailAgain", "WorkersFailed"),
    "llmtrain.config.loading.load": ("LoadedConfig", "load_config"),
    "llmtrain.config.sections.model": ("DecoderConfig",),
    "llmtrain.config.sections.schema": ("Config",),
    "llmtrain.data.tokenizers": ("Tokenizer", "load_tokenizer"),
    "llmtrain.generation.completion": ("Completion",),
    "llmtrain.models.decoder.decoder": ("Decoder",),
    "llmtrain.generation.language_model": ("LanguageModel",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Completion",
    "Config",
    "ConfigError",
    "Decoder",
    "DecoderConfig",
    "Hang",
    "LanguageModel",
    "LoadedConfig",
    "Preempted",
    "RunError",
    "Tokenizer",
    "WillFailAgain",
    "WorkersFailed",
    "__version__",
    "evaluate",
    "load_config",
    "load_decoder",
    "load_model",
    "load_tokenizer",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'llmtrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
