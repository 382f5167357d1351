"""`python -m llmtrain`, which is the same program as `llmtrain`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line in sys.argv and exits with its code."""
    from llmtrain.cli.app import run
    from llmtrain.distributed.launch import fails_again, leave_exit_code

    if "WORLD_SIZE" in os.environ:  # before torch is imported: its warnings of peers that are gone run over pages
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = fails_again()
    if code is None:
        code = run(sys.argv[1:])
        leave_exit_code(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
