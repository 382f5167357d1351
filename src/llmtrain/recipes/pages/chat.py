"""The chat box: one model in memory, one text at a time, told piece by piece as it is written.

request ─▶ queue for the desk ─▶ thread: generate ─ piece, piece, … ─▶ asyncio queue ─▶ lines of JSON
                                    └─ ends at the next token when the reader is gone
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config.errors import ConfigError, RunError
from llmtrain.training.runs import find_model

if TYPE_CHECKING:
    from llmtrain.data.chat.shapes import Message
    from llmtrain.recipes.loading.language_model import LanguageModel, Settings

POLL_SEC = 0.5


class _Stopped(Exception):
    """Nobody reads any more."""


class ChatDesk:
    """Answers one request after the other, with the model that was asked last kept in memory."""

    def __init__(self, *, is_ending: Callable[[], bool] = lambda: False) -> None:
        """`is_ending`: whether the server is about to end; a text that is being written then ends too."""
        self._is_ending = is_ending
        self._turn = threading.Lock()
        self._model: LanguageModel | None = None

    async def answer(self, run: Path, messages: list[Message], settings: Settings) -> AsyncIterator[str]:
        """Lines of JSON: `{"chats": …}` when the model is there, `{"text": piece}` as it is written, at last
        `{"done": …}` or `{"error": message}`.

        A model that chats writes the next turn; any other goes on from the last message's text alone.
        """
        loop, pieces, gone = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]](), threading.Event()

        def tell(message: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, message)

        threading.Thread(
            target=self._work, args=(run, messages, settings, tell, gone), daemon=True, name="chat"
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

    def _work(self, run: Path, messages: list[Message], settings: Settings, tell: Any, gone: threading.Event) -> None:
        def on_text(_: int, piece: str) -> None:
            if gone.is_set():
                raise _Stopped
            tell({"text": piece})

        try:
            with self._turn:
                if gone.is_set():
                    return
                model = self._open(run)
                tell({"chats": model.chats})
                asked: list[Any] = [messages if model.chats else messages[-1]["content"]]
                how: Settings = {**settings, "chat": model.chats}
                (done,) = model.generate(asked, on_text=on_text, **how)
            tell({"done": {"tokens": done.tokens, "ended_by": done.ended_by}})
        except _Stopped:
            pass
        except (ConfigError, RunError) as error:
            tell({"error": str(error)})
        except Exception as error:
            tell({"error": f"{type(error).__name__}: {error}"})

    def _open(self, run: Path) -> LanguageModel:
        from llmtrain.recipes.loading.open_model import (
            open_model,  # here, since who only looks at curves needs no torch
        )

        folder = find_model(str(run), run.parent)
        if self._model is None or self._model.folder != folder:
            self._model = None  # before the next one is in memory
            self._model = open_model(str(folder))
        return self._model
