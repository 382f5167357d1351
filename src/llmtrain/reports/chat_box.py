"""Serves the chat box: one model in memory writes one text at a time, which is sent as it is written.

request ─▶ queue for the desk ─▶ thread: generate ─ piece, piece, … ─▶ asyncio queue ─▶ lines of JSON
                                    └─ ends at the next token when nobody reads any more
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.errors import ConfigError, RunError
from llmtrain.runs.folders import find_model

if TYPE_CHECKING:
    from llmtrain.data.chat.shapes import Message
    from llmtrain.generation.language_model import LanguageModel, Settings

POLL_SEC = 0.5


class _ReaderGone(Exception):
    """Raised while the model writes, when nobody reads its text any more."""


class ChatDesk:
    """Answers one request after the other, and keeps the model of the last request in memory."""

    def __init__(self, *, is_ending: Callable[[], bool] = lambda: False) -> None:
        """`is_ending` returns whether the server is about to end; a text that is being written then ends too."""
        self._is_ending = is_ending
        self._writing = threading.Lock()
        self._model: LanguageModel | None = None

    async def answer(self, run: Path, messages: list[Message], settings: Settings) -> AsyncIterator[str]:
        """Yield lines of JSON: `{"chats": …}` when the model is loaded, `{"text": piece}` as it is written, at last
        `{"done": …}` or `{"error": message}`.

        A model that chats writes the next turn. Any other continues the last message's text.
        """
        loop, pieces, gone = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]](), threading.Event()

        def send(message: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, message)

        threading.Thread(
            target=self._work, args=(run, messages, settings, send, gone), daemon=True, name="chat"
        ).start()
        try:
            while not self._is_ending():
                try:
                    message = await asyncio.wait_for(pieces.get(), POLL_SEC)
                except TimeoutError:
                    continue
                yield json.dumps(message) + "\n"
                if message.keys() & {"done", "error"}:
                    return
        finally:
            gone.set()

    def _work(self, run: Path, messages: list[Message], settings: Settings, send: Any, gone: threading.Event) -> None:
        def on_text(_: int, piece: str) -> None:
            if gone.is_set():
                raise _ReaderGone
            send({"text": piece})

        try:
            with self._writing:
                if gone.is_set():
                    return
                model = self._open(run)
                send({"chats": model.chats})
                prompts: list[Any] = [messages if model.chats else messages[-1]["content"]]
                settings = {**settings, "chat": model.chats}
                (done,) = model.generate(prompts, on_text=on_text, **settings)
            send({"done": {"tokens": done.tokens, "ended_by": done.ended_by}})
        except _ReaderGone:
            pass
        except (ConfigError, RunError) as error:
            send({"error": str(error)})
        except Exception as error:
            send({"error": f"{type(error).__name__}: {error}"})

    def _open(self, run: Path) -> LanguageModel:
        from llmtrain.generation.open_model import open_model  # here, since curves need no torch

        folder = find_model(str(run), run.parent)
        if self._model is None or self._model.folder != folder:
            self._model = None  # before the next one is in memory
            self._model = open_model(str(folder))
        return self._model
