"""The error that ends a command with exit code 2 and one message, never a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """What the user asked for cannot be: the message says what, where and what to do instead."""
