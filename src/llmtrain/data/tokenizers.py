"""Tokenizers: byte-level BPE and characters trained here, existing Hugging Face ones, one thin wrapper around them.

    train_bpe(texts)        ─┐
    train_characters(texts) ─┤
    load_hf_tokenizer(name) ─┼─→ Tokenizer ── save ──→ folder in Hugging Face format
    load_tokenizer(folder)  ─┘                          (transformers.AutoTokenizer loads it too)

Text goes in and ids come out without special tokens: what looks like one in a document (`<|endoftext|>` in a tutorial,
say) is ordinary text. End tokens are added by whoever writes documents (`data.prepare`). Chat templates are not here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from llmtrain.data.fast_encoding import Encode, fast_encoder
from llmtrain.data.hub_connection import hub_answers
from llmtrain.errors import ConfigError
from llmtrain.models.companions import copy_tokenizer, tokenizer_files
from llmtrain.models.fetch import fetch_tokenizer
from llmtrain.storage.address import is_remote

logger = logging.getLogger("llmtrain.data")

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
"""Stands for a character that a vocabulary of characters does not have."""

SPLIT_PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",  # a word with the space, dot, quote or underscore before it
        r" ?\p{N}{1,3}",  # digits in groups of at most three
        r" ?[^\s\p{L}\p{M}\p{N}]+(?:[\r\n]+[ \t]*)?",  # punctuation with the line end and indentation after it
        r"[\r\n]+[ \t]*",  # line ends with the indentation after them
        r"\s+(?!\S)",  # other blanks, but the last of them goes to the word that follows
        r"\s+",
    )
)
"""Pattern that splits text before pairs are merged; merges never cross a split.

The shape is GPT-2's and Llama 3's. What differs was chosen by measuring a vocabulary of 8192 on Python source:
Llama 3's pattern gives 3.74 bytes a token on held-out files, indentation kept with its line end 3.79, also with the
punctuation before it 4.01, and a space before digits 4.07. docs/data-format.md says what it means for prompts.
"""

MAX_NAMED = 5
"""Tokens that a message names."""

_LONG_TEXT = 1 << 18
"""Characters that are encoded in one call, and from which a text is cut: the library needs about 500 bytes a token
until a call's ids are taken, so a text of 100 MB at once would take 12 GB."""

_CUT = re.compile(r"[0-9A-Za-z\u4e00-\u9fa5\uac00-\ud7a3](?=[ \n\u3002\uff0c])")
"""Ends a piece of SPLIT_PATTERN for sure: no alternative goes on from a letter or digit to one of these characters."""


class Tokenizer:
    """Text to ids and back. Made by `train_bpe`, `load_tokenizer` and `load_hf_tokenizer`."""

    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """The token that ends a document."""
    sha256: str
    """Hash of the serialised tokenizer (tokenizer.json) and the end token."""

    def __init__(self, serialized: str, *, eos_token: str, write: Callable[[Path], None]) -> None:
        """`serialized` is the text of a tokenizer.json; `write` saves all files that belong to it into a folder.

        Raises ValueError when `serialized` is none, or does not know `eos_token`.
        """
        try:
            self._backend = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"is no tokenizer ({error})") from error
        eos_id = self._backend.token_to_id(eos_token)
        if eos_id is None:
            raise ValueError(f"has no token {eos_token!r}, which should end documents")
        if make_repeatable(self._backend):
            serialized = self._backend.to_str(pretty=True)
        self._backend.encode_special_tokens = True  # in this library's words: encode their text like any other
        self._serialized = serialized
        self._fast: Encode | None = None
        self._write = write
        self._can_cut = json.dumps(SPLIT_PATTERN) in serialized
        self.eos_token = eos_token
        self.eos_id = int(eos_id)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.sha256 = hashlib.sha256(f"{serialized}\0{eos_token}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def speed_up(self, sample: Sequence[str]) -> bool:
        """Encode by a faster encoder from here on, if there is one and it gives the same ids for all of `sample`.

        Returns whether it does. What it cannot take (some texts of millions of blanks) is encoded as before.
        """
        fast = fast_encoder(self._serialized)
        if fast is not None:
            expected = self._encode_slowly(sample)
            if all(np.array_equal(fast(text), ids) for text, ids in zip(sample, expected, strict=True)):
                self._fast = fast
        return self._fast is not None

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text. Runs without the GIL, so several threads may call it at once."""
        if self._fast is None:
            return self._encode_slowly(texts)
        return [self._encode_fast(text, self._fast) for text in texts]

    def _encode_fast(self, text: str, fast: Encode) -> NDArray[np.uint32]:
        try:
            return fast(text)
        except ValueError:  # its pattern library gives up on a million blanks
            return self._encode_slowly([text])[0]

    def _encode_slowly(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        pieces = [
            (index, piece)
            for index, text in enumerate(texts)
            for piece in (_cut(text) if self._can_cut else iter([text]))
        ]
        parts: list[list[NDArray[np.uint32]]] = [[] for _ in texts]
        for batch in _batches(pieces):
            encodings = self._backend.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (index, _), encoding in zip(batch, encodings, strict=True):
                parts[index].append(np.array(encoding.ids, np.uint32))
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens written out; bytes that are no UTF-8 (half a character) become U+FFFD."""
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text

    def num_bytes(self, batch: Iterable[Iterable[int]]) -> int:
        """UTF-8 bytes of the texts that each of these stands for, special tokens left out."""
        texts = self._backend.decode_batch([list(ids) for ids in batch], skip_special_tokens=True)
        return sum(len(text.encode()) for text in texts)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its name in the vocabulary, such as `<|im_end|>`."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def name_of(self, token: int) -> str | None:
        """Return the name of an id in the vocabulary, such as `Ġthe`; None for an id that has none."""
        found: str | None = self._backend.id_to_token(token)
        return found

    def tokens_from(self, first: int) -> str:
        """Name the tokens whose ids are `first` or more, for a message; empty if there are none."""
        names = {index: token for token, index in self._backend.get_vocab(with_added_tokens=True).items()}
        found = [f"{names[index]} ({index})" for index in sorted(names) if index >= first]
        more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        return ", ".join(found[:MAX_NAMED]) + more

    def token_texts(self) -> list[str]:
        """[vocab_size] what each token adds to a text that it does not begin; nothing for special tokens."""
        special = {index for index, token in self._backend.get_added_tokens_decoder().items() if token.special}
        anchor = self.encode("a")[-1:]  # decoders of sentencepiece models drop the first token's blank
        pairs = [[*anchor, index] for index in range(self.vocab_size)]
        begin = len(self.decode(anchor))
        texts = self._backend.decode_batch(pairs, skip_special_tokens=False)
        return ["" if index in special else text[begin:] for index, text in enumerate(texts)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it in Hugging Face format; the folder is made."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self._write(target)


def make_repeatable(backend: tokenizers.Tokenizer) -> bool:
    """Let the same text always give the same tokens, and all of them, whatever a tokenizer.json says.

    Files of some models carry a truncation and padding, which would cut documents in silence; others have BPE dropout,
    which draws the tokens of a text anew each time. Warns of dropout, and returns whether there was some.
    """
    backend.no_truncation()
    backend.no_padding()
    dropout: float | None = getattr(backend.model, "dropout", None)
    if dropout:
        backend.model.dropout = None
        _warn_of_dropout(dropout)
    return bool(dropout)


def repeatable_copy(tokenizer: Any) -> tokenizers.Tokenizer:
    """Return a copy of what a tokenizer of transformers is built on, made repeatable; the tokenizer stays as it is."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    make_repeatable(backend)
    return backend


@lru_cache
def _warn_of_dropout(dropout: float) -> None:
    logger.warning("the tokenizer.json has BPE dropout (%g): switched off, so that a run can be repeated", dropout)


def train_bpe(texts: Iterable[str], *, vocab_size: int, min_frequency: int = 2) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens: the end token (id 0), the 256 bytes, and merged pairs.

    The same texts, in whatever order, give the same tokenizer. Uses all cores unless `library_threads(False)`.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in _cut(text)), trainer)
    serialized: str = backend.to_str(pretty=True)
    return Tokenizer(serialized, eos_token=END_OF_TEXT, write=_writer_of_new(serialized))


def train_characters(texts: Iterable[str], *, vocab_size: int | None = None, min_frequency: int = 1) -> Tokenizer:
    """Make a token for each character (code point) that `texts` hold `min_frequency` times or more often.

    Id 0 is the end token, 1 stands for every other character, then come the characters by code point; of more than
    `vocab_size` tokens the most frequent stay (of equally frequent ones the lower code points).
    """
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        found = np.bincount(np.frombuffer(text.encode("utf-32-le"), np.uint32))
        counts[: len(found)] += found
    characters = np.flatnonzero(counts >= min_frequency)
    if vocab_size is not None:
        by_frequency = characters[np.argsort(-counts[characters], kind="stable")]
        characters = np.sort(by_frequency[: max(0, vocab_size - 2)])
    vocab = {END_OF_TEXT: 0, UNKNOWN: 1} | {chr(code): number for number, code in enumerate(characters.tolist(), 2)}
    # BPE without merges: every character is a token, however long the text. WordLevel would have to split it first.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN, fuse_unk=False))
    backend.add_special_tokens([END_OF_TEXT, UNKNOWN])
    backend.decoder = decoders.Fuse()
    serialized: str = backend.to_str(pretty=True)
    return Tokenizer(serialized, eos_token=END_OF_TEXT, write=_writer_of_new(serialized, unk_token=UNKNOWN))


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer in a folder that `Tokenizer.save` or transformers wrote. Quick: needs no transformers.

    Raises ConfigError when the folder has no tokenizer.json, a broken one, or no end token.
    """
    source = Path(folder)
    path = source / "tokenizer.json"
    try:
        serialized = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: no tokenizer here ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text ({error})") from error
    eos_token = _declared_eos_token(source)
    if eos_token is None:
        raise ConfigError(
            f"{source}: tokenizer_config.json names no eos_token, but every document has to end with one: add it there"
        )
    try:
        return Tokenizer(serialized, eos_token=eos_token, write=lambda target: copy_tokenizer(source, target))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def load_hf_tokenizer(name_or_path: str) -> Tokenizer:
    """Load an existing tokenizer, from a folder, the local Hugging Face cache or the Hub, as transformers loads it.

    Raises ConfigError when there is none, when it has no fast (tokenizers) form, or no end token.
    """

    def load(*, local_files_only: bool) -> Any:
        return AutoTokenizer.from_pretrained(
            name_or_path, local_files_only=local_files_only, trust_remote_code=False, use_fast=True
        )

    where = f"tokenizer {name_or_path!r}"
    if is_remote(name_or_path):
        name_or_path = str(fetch_tokenizer(name_or_path, local_files_only=False))
    is_folder = os.path.isdir(name_or_path)
    if is_folder and _is_ours(Path(name_or_path)):
        return load_tokenizer(name_or_path)
    from transformers import AutoTokenizer  # takes seconds, and most runs train their own

    if not is_folder and (os.path.isabs(name_or_path) or name_or_path.startswith(".") or name_or_path.count("/") > 1):
        raise ConfigError(f"{where}: no such folder")
    try:
        try:
            found = load(local_files_only=True)
        except (OSError, ValueError):
            if is_folder:
                raise
            if not hub_answers():
                raise ConfigError(
                    f"{where}: is neither a folder nor in the local cache, and there is no connection to the Hub: "
                    "name the folder of a tokenizer, or try again with a connection"
                ) from None
            found = load(local_files_only=False)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{where}: neither a folder with a tokenizer nor one that can be had from the Hub ({reason})"
        ) from error
    return wrap_tokenizer(found, where=where)


def wrap_tokenizer(found: Any, *, where: str) -> Tokenizer:
    """Wrap a tokenizer of transformers. Raises ConfigError, beginning with `where`, if it is not fast or has no end."""
    if not getattr(found, "is_fast", False):
        raise ConfigError(f"{where}: has no fast form (tokenizer.json); convert it with transformers first")
    if found.eos_token is None:
        raise ConfigError(
            f"{where}: has no end token (eos_token), but every document has to end with one: "
            "set eos_token in its tokenizer_config.json, or take another tokenizer"
        )
    try:
        return Tokenizer(
            found.backend_tokenizer.to_str(pretty=True),
            eos_token=str(found.eos_token),
            write=lambda target: found.save_pretrained(target),
        )
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def folder_fingerprint(name_or_path: str) -> str | None:
    """sha256 over the tokenizer files of a folder, here or at an address; None for a Hub id."""
    folder = fetch_tokenizer(name_or_path, local_files_only=False) if is_remote(name_or_path) else Path(name_or_path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for name in tokenizer_files(folder):
        digest.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


@contextmanager
def library_threads(enabled: bool) -> Iterator[None]:
    """Let the tokenizers library use threads of its own, or not, while the block runs.

    It reads the variable at each call. Off where our own threads call it, on to train with all cores.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true" if enabled else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _cut(text: str) -> Iterator[str]:
    """Pieces of a long text whose encodings put together are the encoding of the text under SPLIT_PATTERN."""
    start = 0
    while len(text) - start > _LONG_TEXT:
        boundary = _CUT.search(text, start + _LONG_TEXT)
        if boundary is None:
            break
        yield text[start : boundary.end()]
        start = boundary.end()
    yield text[start:] if start else text


def _batches(pieces: Sequence[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[1])
        if characters >= _LONG_TEXT:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _writer_of_new(serialized: str, **special_tokens: str) -> Callable[[Path], None]:
    special_tokens = {"eos_token": END_OF_TEXT, **special_tokens}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # it would change the text on decoding
    }

    def write(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(serialized, encoding="utf-8")
        for name, content in (
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", special_tokens),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    return write


def _is_ours(folder: Path) -> bool:
    """Return whether llmtrain trained it: transformers then loads just what its tokenizer.json says."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    ours = {"tokenizer_class", "eos_token", "unk_token", "add_prefix_space", "clean_up_tokenization_spaces"}
    return isinstance(config, dict) and config.keys() <= ours and (folder / "tokenizer.json").is_file()


def _declared_eos_token(folder: Path) -> str | None:
    """`eos_token` of tokenizer_config.json or special_tokens_map.json, where it is a string or {"content": string}."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            config = json.loads((folder / name).read_bytes())
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ConfigError(f"{folder / name}: is no JSON ({error})") from error
        token = config.get("eos_token") if isinstance(config, dict) else None
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None
