"""`python -m llmtrain`, which is the same program as `llmtrain`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line in sys.argv and exits with its code."""
    from llmtrain.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
