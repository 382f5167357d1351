"""The folder of a base model that has every file that such a folder may have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.tiny_huggingface import tiny_network

TOOL_USE = CHATML.replace("# Tools", "# Tools of the named template")
CODE = """\
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
MADE_FOR_PROCESSORS = {
    "preprocessor_config.json": '{"do_rescale": true}',
    "processor_config.json": '{"image_seq_length": 4}',
    "video_preprocessor_config.json": '{"fps": 2}',
}


def write_full_base(
    folder: Path, *, generation: dict[str, Any], tied: bool = False, code: bool = False, template_files: bool = True
) -> Path:
    """Write a tiny Llama in several files of weights, with the generation config `generation` as it is given.

    The named templates are files, or a list in tokenizer_config.json. With `code` its classes are in the folder.
    """
    tokenizer = tiny_chat_tokenizer(CHATML)
    tokenizer.add_tokens(["<added>"])
    tokenizer.chat_template = {"default": CHATML, "tool_use": TOOL_USE, "rag": "{{ documents }}"}
    tokenizer.save_pretrained(folder, save_jinja_files=template_files)
    size: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "tie_word_embeddings": tied}
    tiny_network("llama", **size).save_pretrained(folder, max_shard_size="20KB")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=4))
    (folder / "added_tokens.json").write_text(json.dumps({"<added>": tokenizer.convert_tokens_to_ids("<added>")}))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokenizer.special_tokens_map))
    for name, text in {
        **MADE_FOR_PROCESSORS,
        "LICENSE": "Do good.",
        "README.md": "# base",
        "notes.txt": "mine",
    }.items():
        (folder / name).write_text(text)
    if code:
        described = json.loads((folder / "config.json").read_text())
        described |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"]}
        described["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
        (folder / "config.json").write_text(json.dumps(described))
        (folder / "own.py").write_text(CODE)
    return folder
