"""`data` and `prepare`: which tokens a run reads, and how token shards are made."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from llmtrain.config.sections.base import IMPORT_PATH, Alternatives, Section, key, opt, variant_of_section
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.own import OwnDataConfig
from llmtrain.config.sections.quality import MAX_STEPS, ExactDuplicatesStep, QualityStep
from llmtrain.config.sections.sources import MixtureConfig, Source, check_sources
from llmtrain.local_paths import ADDRESS, LOCAL, LOCAL_OR_HUB


class TokenizerConfig(Section):
    kind: Literal["hf", "bpe", "char"] = opt(
        "bpe", "hf: one that exists (path); bpe: byte-level BPE trained on the text; char: the text's characters."
    )
    path: str | None = opt(
        None, "Folder, its address, or Hub id of an existing tokenizer (kind hf).", json_schema_extra=ADDRESS
    )
    vocab_size: int | None = opt(
        None,
        "Size of the vocabulary. bpe: 8192 when not given; char: the most frequent characters, all when not given.",
        ge=3,
    )
    min_frequency: int | None = opt(
        None, "A pair (bpe; 2 when not given) or character (char; 1) that is seen less often is left out.", ge=1
    )

    @model_validator(mode="after")
    def _one_kind(self) -> TokenizerConfig:
        if self.kind == "hf" and self.path is None:
            raise ValueError("kind hf needs path: the folder or Hub id of a tokenizer")
        for name in ("vocab_size", "min_frequency"):
            if self.kind == "hf" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for a tokenizer that is trained (kind bpe or char); remove it")
        if self.kind == "bpe" and self.vocab_size is not None and self.vocab_size < 257:
            raise ValueError(f"vocab_size is {self.vocab_size}, but 256 bytes and the end token are 257: raise it")
        if self.kind != "hf" and self.path is not None:
            raise ValueError(f"path is for an existing tokenizer (kind hf), but kind is {self.kind}")
        return self


class TokensConfig(Section):
    """Token shards, as `llmtrain prepare` writes them."""

    name: Literal["tokens"] = opt("tokens", "Token shards (Parquet).")
    train: str | list[Source] = key(
        "Training shards: a folder, file or glob, here or at an address; or a list of them, with weights or without.",
        json_schema_extra=ADDRESS,
    )
    mixture: MixtureConfig | None = opt(None, "Unit, limits and stages of the weights in train.")
    val: str | list[str] | None = opt(None, "Validation shards.", json_schema_extra=ADDRESS)
    tokenizer: str | None = opt(
        None, "Folder or Hub id of the tokenizer, for shards that have no manifest.", json_schema_extra=LOCAL
    )
    cache_dir: str = opt(
        "~/.cache/llmtrain",
        "Folder for the counts of shards without a manifest, and for what is read of shards in a store.",
        json_schema_extra=LOCAL,
    )
    cache_gb: float = opt(
        20.0, "GB of shards in stores that are kept in cache_dir, the ones read last; 0 keeps none.", ge=0
    )
    seq_len: int = opt(1024, "Length of a sequence, in tokens that the model predicts.", ge=1)
    mask_documents: bool = opt(True, "Documents in one sequence cannot attend to each other.")
    shuffle_chunks: int = opt(8, "Chunks of about a million tokens that are shuffled together.", ge=1)
    num_workers: int = opt(0, "Processes that read ahead; with 0 the training process reads.", ge=0)

    @model_validator(mode="after")
    def _sources_fit_each_other(self) -> TokensConfig:
        check_sources(self.train, self.mixture)
        return self


class SyntheticConfig(Section):
    """Random tokens, for checks and benchmarks."""

    name: Literal["synthetic"] = opt("synthetic", "Random tokens.")
    seq_len: int = opt(1024, "Length of a sequence, in tokens that the model predicts.", ge=1)
    vocab_size: int = opt(8192, "Tokens are drawn from [0, vocab_size).", ge=2)
    num_items: int = opt(4096, "Sequences in one epoch.", ge=1)
    num_val_items: int = opt(64, "Sequences in the validation set.", ge=0)
    num_workers: int = opt(0, "Processes that read ahead; with 0 the training process reads.", ge=0)


class _TextConfig(Section):
    """The keys that `corpus` and `huggingface` share."""

    alternatives: ClassVar[tuple[Alternatives, ...]] = (
        Alternatives(("val", "val_fraction")),
        Alternatives(("text_column", "adapter")),
    )

    val_fraction: float | None = opt(
        None,
        "Share of the documents that is held out, chosen by their hash; 0.01 when val is not given either.",
        ge=0,
        lt=1,
    )
    adapter: str = opt("default", "How a row becomes a document, as in prepare.adapter.")
    text_column: str | None = opt(None, "Field of a row that holds the text; found by its name when not given.")
    on_error: Literal["fail", "skip"] = opt("fail", "What to do with a bad row or an unreadable file.")
    tokenizer: TokenizerConfig = TokenizerConfig()
    cache_dir: str = opt(
        "~/.cache/llmtrain",
        "Folder for the shards, which are made once for the same text, tokenizer and options.",
        json_schema_extra=LOCAL,
    )
    seq_len: int = opt(1024, "Length of a sequence, in tokens that the model predicts.", ge=1)
    mask_documents: bool = opt(True, "Documents in one sequence cannot attend to each other.")
    shuffle_chunks: int = opt(8, "Chunks of about a million tokens that are shuffled together.", ge=1)
    num_workers: int = opt(0, "Processes that read ahead; with 0 the training process reads.", ge=0)


class CorpusConfig(_TextConfig):
    """Text, tokenised as needed: `train` makes the shards by itself."""

    name: Literal["corpus"] = opt("corpus", "Text, tokenised as needed.")
    train: str | list[str] = key(
        "Training text: files, folders, globs, as in prepare.input.", json_schema_extra=ADDRESS
    )
    val: str | list[str] | None = opt(
        None,
        "Validation text; a share of the training text is held out when not given.",
        json_schema_extra=ADDRESS,
    )


class HuggingFaceDataConfig(_TextConfig):
    """A Hugging Face dataset, tokenised as needed: `train` makes the shards by itself."""

    name: Literal["huggingface"] = opt("huggingface", "A Hugging Face dataset, tokenised as needed.")
    path: str = key(
        "hf://NAME on the Hub, or a folder: one that save_to_disk wrote, or one of data files.",
        json_schema_extra=LOCAL_OR_HUB,
    )
    configs: list[str] = opt([], "Configurations of the dataset; its default one when not given.")
    revision: str | None = opt(None, "Branch, tag or commit on the Hub.")
    train: str = opt("train", "Split to train on, or slices of splits: train[:90%].")
    val: str | None = opt(None, "Split to validate on; a share of the training split is held out when not given.")


DataConfig = Annotated[
    Annotated[TokensConfig, Tag("tokens")]
    | Annotated[CorpusConfig, Tag("corpus")]
    | Annotated[HuggingFaceDataConfig, Tag("huggingface")]
    | Annotated[ChatConfig, Tag("chat")]
    | Annotated[SyntheticConfig, Tag("synthetic")]
    | Annotated[OwnDataConfig, Tag(IMPORT_PATH)],
    Field(discriminator=Discriminator(variant_of_section)),
]

ReadyData = TokensConfig | SyntheticConfig | OwnDataConfig
"""Data that can be read as it is; `ensure_shards` makes it from the other kinds."""


class DatasetInput(Section):
    """A Hugging Face dataset."""

    path: str = key(
        "hf://NAME on the Hub, or a folder: one that save_to_disk wrote, or one of data files.",
        json_schema_extra=LOCAL_OR_HUB,
    )
    configs: list[str] = opt(
        [], "Configurations of the dataset, each a subset with a folder of its own; its default one when not given."
    )
    split: str = opt("train", "A split, slices of splits, or their sum: train, train[:1%], train+test[10:20].")
    revision: str | None = opt(None, "Branch, tag or commit on the Hub.")


class PrepareConfig(Section):
    """Options by which `prepare` (and `train`, when they are missing) makes the shards that `data` names."""

    alternatives: ClassVar[tuple[Alternatives, ...]] = (Alternatives(("text_column", "adapter")),)

    input: str | DatasetInput | list[str | DatasetInput] = key(
        "Files, folders (recursive) or globs of text, JSONL, JSON and Parquet, also .gz and .zst, here or at an "
        "address; datasets.",
        json_schema_extra=ADDRESS,
    )
    adapter: str = opt(
        "default",
        "How a row becomes a document: default (its text column), plain, wikipedia, fineweb, c4, redpajama, pile, "
        "refinedweb, or your own by import path, my_package.module:function.",
    )
    include: list[str] = opt([], "Keep only files whose path in a folder matches one of these patterns, such as *.py.")
    exclude: list[str] = opt([], "Leave out files and folders that match one of these patterns, such as site-packages.")
    text_column: str | None = opt(
        None, "Field of a row that holds the text (adapter default); found by its name when not given."
    )
    tokenizer: TokenizerConfig = TokenizerConfig()
    output: str = key("Folder for the shards.", json_schema_extra=LOCAL)
    val_fraction: float = opt(0.01, "Share of the documents that is held out, chosen by their hash.", ge=0, lt=1)
    shard_size: int = opt(3_000_000, "Tokens in one shard.", ge=1)
    steps: list[QualityStep] = opt(
        [ExactDuplicatesStep()],
        "Steps that documents pass, in this order, before they become tokens: they leave some out or change them.",
        max_length=MAX_STEPS,
    )
    keep_text: bool = opt(False, "Store the text beside the tokens.")
    on_error: Literal["fail", "skip"] = opt("fail", "What to do with a bad line or an unreadable file.")
    num_workers: int | None = opt(None, "Threads that tokenise; one for each core when not given.", ge=1)
