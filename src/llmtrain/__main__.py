"""`python -m llmtrain`, which is the same program as `llmtrain`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line in sys.argv and exits with its code."""
    from llmtrain.cli.app import run
    from llmtrain.cli.output import keep_streams
    from llmtrain.distributed.exit_codes import hopeless_exit_code, leave_exit_code
    from llmtrain.distributed.orphans import end_with_launcher

    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # else it reads what every installed package offers
    if "WORLD_SIZE" in os.environ:  # before torch is imported: its warnings of peers that are gone run over pages
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    keep_streams()
    if not sys.stderr.isatty():  # bars of Hugging Face's libraries would write escape codes into a pipe
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")
    end_with_launcher()
    code = hopeless_exit_code()
    if code is None:
        code = run(sys.argv[1:])
        leave_exit_code(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
