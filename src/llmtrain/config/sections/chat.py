"""`data` of name `chat`: rows of conversations, prompts with completions, or text, for fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from llmtrain.config.sections.base import Alternatives, Section, key, opt
from llmtrain.config.sections.sources import MixtureConfig, Source, check_sources
from llmtrain.local_paths import ADDRESS, LOCAL


class ChatConfig(Section):
    """Rows of text: JSONL, JSON, CSV, Parquet, or a Hugging Face dataset."""

    alternatives: ClassVar[tuple[Alternatives, ...]] = (Alternatives(("val", "val_fraction")),)

    name: Literal["chat"] = opt("chat", "Rows of conversations, prompts with completions, or text.")
    train: str | list[Source] = key(
        "Training rows: a .jsonl, .json, .csv or .parquet file, a folder of them, a glob, here or at an address, a "
        "Hugging Face dataset (a folder, or hf://owner/name:split), or a list of these, with weights or without.",
        json_schema_extra=ADDRESS,
    )
    mixture: MixtureConfig | None = opt(None, "Unit, limits and stages of the weights in train.")
    val: str | list[str] | None = opt(None, "Validation rows.", json_schema_extra=ADDRESS)
    val_fraction: float = opt(
        0.0, "Share of the training rows that is held out instead, by the hash of their prompts.", ge=0, lt=1
    )
    seq_len: int = opt(1024, "The longest row, and the length of a packed sequence, in tokens.", ge=2)
    tokenizer: str | None = opt(
        None, "Folder, its address, or Hub id of the tokenizer; the model's when not given.", json_schema_extra=ADDRESS
    )
    packing: bool = opt(True, "Put several rows into one sequence of seq_len tokens.")
    mask_documents: bool = opt(True, "Rows in one packed sequence cannot attend to each other.")
    truncation: Literal["right", "left", "drop", "error"] = opt(
        "right",
        "A row longer than seq_len: right cuts its end off, left its beginning, drop leaves it out, error stops.",
    )
    chat_template: str | None = opt(
        None, "File with a Jinja chat template; the tokenizer's when not given.", json_schema_extra=LOCAL
    )
    supervise: Literal["assistant", "last", "all"] = opt(
        "assistant",
        "Tokens that the loss counts: those of the assistant's turns and of completions, of a conversation's last "
        "assistant turn alone, or all. In a row of text it counts all.",
    )
    text_column: str | None = opt(None, "Field with the text of rows of text alone; `text` when not given.")
    on_error: Literal["fail", "skip"] = opt("fail", "Rows with faults: stop and list them, or leave them out and warn.")
    cache_dir: str = opt(
        "~/.cache/llmtrain", "Folder for tokenised rows, which later runs use again.", json_schema_extra=LOCAL
    )
    num_workers: int = opt(0, "Processes that read ahead; with 0 the training process reads.", ge=0)

    @model_validator(mode="after")
    def _sources_fit_each_other(self) -> ChatConfig:
        check_sources(self.train, self.mixture)
        return self
