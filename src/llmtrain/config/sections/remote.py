"""`remote`: the machines that `launch ssh` reaches."""

from __future__ import annotations

from llmtrain.config.sections.base import Section, opt
from llmtrain.local_paths import LOCAL


class RemoteConfig(Section):
    """Machines reached by SSH, for `launch ssh`. Its flags win over these keys."""

    host: str | list[str] = opt(
        [],
        "[USER@]HOST[:PORT], or a name of the SSH config; several train one job together. REMOTE_HOST when not given.",
    )
    user: str | None = opt(None, "User on a host that names none; REMOTE_USER when not given.", min_length=1)
    dir: str | None = opt(
        None, "Project folder on the hosts; ~ is the home there. REMOTE_DIR when not given.", min_length=1
    )
    python: str | None = opt(
        None,
        "A Python on the hosts that has all packages that llmtrain needs; when not given, `init` makes an environment "
        "by uv.",
        min_length=1,
    )
    extras: list[str] = opt([], "Extras of llmtrain that `init` installs as well: mlflow, wandb, bnb, eval, onnx.")
    exclude: list[str] = opt([], "More patterns of rsync for what `push` leaves out.")
    env_file: str | None = opt(
        None,
        "File with lines NAME=VALUE, such as HF_TOKEN, for the processes on the hosts.",
        min_length=1,
        json_schema_extra=LOCAL,
    )
    ssh_config: str | None = opt(None, "File to read in place of ~/.ssh/config.", min_length=1, json_schema_extra=LOCAL)
