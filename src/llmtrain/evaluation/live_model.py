"""Makes a LanguageModel of a model in training: its module itself, with the tokenizer of the training data.

It generates the same text as a checkpoint saved now would, on a GPU in the precision of the training, and does not
change the training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.schema import Config
from llmtrain.data.tokenizers import load_tokenizer, wrap_tokenizer
from llmtrain.distributed.engine import Engine
from llmtrain.generation.language_model import AnyModel, LanguageModel
from llmtrain.generation.open_model import trained_on_turns
from llmtrain.generation.precision import autocast_dtype
from llmtrain.models.companions import end_tokens


def live_model(
    config: Config,
    module: AnyModel,
    *,
    engine: Engine,
    tokenizer_folder: Path,
    model_folder: Path | None,
    for_rows: bool = False,
) -> LanguageModel:
    """Return `module` as a LanguageModel with the tokenizer in `tokenizer_folder`.

    `model_folder` is the folder from which the model was loaded, if it is one of transformers. `for_rows`: make an
    encoder in any case, as `load_language_model` does. Raises ConfigError for a tokenizer that cannot be read.
    """
    autocast = autocast_dtype(module.device, engine.resolved.precision)
    opened = partial(LanguageModel, model=module, folder=tokenizer_folder, autocast=autocast)
    if not for_rows and not isinstance(config.data, ChatConfig):
        tokenizer = load_tokenizer(tokenizer_folder)
        return opened(tokenizer=tokenizer, encoder=None, eos_ids=frozenset([tokenizer.eos_id]))

    from llmtrain.data.chat.encoding import ChatEncoder
    from llmtrain.data.chat.templates import ChatTemplate
    from llmtrain.data.chat.tokenizer import load_fast_tokenizer

    found = load_fast_tokenizer(tokenizer_folder)
    file = config.data.chat_template if isinstance(config.data, ChatConfig) else None
    has_template = file is not None or found.chat_template is not None
    return opened(
        tokenizer=wrap_tokenizer(found, where=str(tokenizer_folder)),
        encoder=ChatEncoder(ChatTemplate(found, file=file)),
        eos_ids=frozenset([int(found.eos_token_id), *(end_tokens(model_folder) if model_folder else ())]),
        chats=trained_on_turns(config, otherwise=has_template) if isinstance(config.data, ChatConfig) else has_template,
    )


@contextmanager
def writing(module: AnyModel, *, engine: Engine) -> Iterator[None]:
    """Put the model into evaluation mode within the block, not compiled: compiling each new length takes minutes.

    If the module is sharded, all ranks must enter the block and call the model with the same tokens.
    """
    was_training = module.training
    module.eval()
    try:
        with engine.generating(module), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        module.train(was_training)
