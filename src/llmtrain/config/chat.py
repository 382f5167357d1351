"""`data` of name `chat`: rows of conversations, prompts with completions, or text, for fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmtrain.config.base import Section, key, opt
from llmtrain.config.sources import Source, check_sources


class ChatConfig(Section):
    """Rows of text: JSONL, JSON, CSV, Parquet, or a Hugging Face dataset."""

    name: Literal["chat"] = opt("chat", "Rows of conversations, prompts with completions, or text.")
    train: str | list[Source] = key(
        "Training rows: a .jsonl, .json, .csv or .parquet file, a folder of them, a glob, a Hugging Face dataset (a "
        "folder, or hf://owner/name:split), or a list of these, with weights or without."
    )
    val: str | list[str] | None = opt(None, "Validation rows.")
    val_fraction: float = opt(
        0.0, "Share of the training rows that is held out instead, by the hash of their prompts.", ge=0, lt=1
    )
    seq_len: int = opt(1024, "The longest row, in tokens; and the length of a pack.", ge=2)
    tokenizer: str | None = opt(None, "Folder or Hub id of the tokenizer; the model's when not given.")
    packing: bool = opt(True, "Put several rows into one sequence of seq_len tokens.")
    mask_documents: bool = opt(True, "Rows in one pack cannot attend to each other.")
    truncation: Literal["right", "left", "drop", "error"] = opt(
        "right", "A row longer than seq_len: cut off its end, or its beginning, leave it out, or stop."
    )
    chat_template: str | None = opt(None, "File with a Jinja chat template; the tokenizer's when not given.")
    supervise: Literal["assistant", "last", "all"] = opt(
        "assistant",
        "Tokens that the model learns to write: those of the assistant's turns or completions, of a conversation's "
        "last assistant turn alone, or all. Of a row of text, all.",
    )
    text_column: str | None = opt(None, "Field with the text of rows that are nothing but text; `text` when not given.")
    on_error: Literal["fail", "skip"] = opt("fail", "Rows with faults: stop and list them, or leave them out and say.")
    cache_dir: str = opt("~/.cache/llmtrain", "Tokenised rows are kept here.")
    num_workers: int = opt(0, "Processes that read ahead; 0 reads in the training process.", ge=0)

    @model_validator(mode="after")
    def _one_validation_set(self) -> ChatConfig:
        check_sources(self.train)
        if self.val is not None and self.val_fraction:
            raise ValueError(
                "val names the validation rows, and val_fraction would hold out others: remove one of them"
            )
        return self
