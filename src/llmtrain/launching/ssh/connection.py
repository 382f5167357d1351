"""Runs one of `scripts/` on another machine by ssh, and explains failed connections.

ssh never prompts: a key or an agent logs in, and a host whose key is not known is rejected. ssh writes its messages to
a file (-E), so that they are not mistaken for messages of the script.
"""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TypeVar

from llmtrain.errors import ConfigError, RunError
from llmtrain.launching.ssh.quoting import command_line, quote_path
from llmtrain.launching.ssh.remote import RemoteMachine

log = logging.getLogger("llmtrain.ssh")
Result = TypeVar("Result")

SCRIPTS = Path(__file__).parent / "scripts"
OPTIONS = (
    *("BatchMode=yes", "StrictHostKeyChecking=yes", "ConnectTimeout=15"),
    *("ServerAliveInterval=10", "ServerAliveCountMax=3"),  # ssh gives up a connection that is silent for 40 seconds
    *("ClearAllForwardings=yes", "RemoteCommand=none"),
)
SSH_FAILED = 255
SCRIPT_FAILED, REASON_PREFIX = 97, "llmtrain: "
"""Exit code of `fail` in scripts/prelude.sh, which writes the reason to stderr, and the prefix of that reason."""
RECONNECT_SECONDS = 300.0
"""Seconds for which we try to reconnect."""
STEADY_SECONDS = 60.0
"""An attempt that lasted longer than this was connected, so RECONNECT_SECONDS begin again."""


class ConnectionLost(RunError):
    """A machine could not be reached, or the connection broke. Processes there continue."""

    kind = "unreachable"


@dataclass(frozen=True)
class ScriptResult:
    """Output and exit code of a script."""

    exit_code: int
    stdout: bytes


def ssh_words(machine: RemoteMachine, *, messages: str | None = None) -> list[str]:
    """Return the ssh command without the host. ssh writes its own messages to the file `messages`."""
    words = ["ssh"]
    if machine.ssh_config is not None:
        words += ["-F", str(Path(machine.ssh_config).expanduser().absolute())]
    words += [word for option in OPTIONS for word in ("-o", option)]
    if machine.port is not None:
        words += ["-p", str(machine.port)]
    return [*words, "-E", messages] if messages is not None else words


def script_line(machine: RemoteMachine, name: str, *arguments: str) -> str:
    """Return a command line that runs scripts/NAME.sh for the machine's folder, in any login shell."""
    text = "\n".join((SCRIPTS / f"{part}.sh").read_text(encoding="utf-8") for part in ("prelude", name))
    lines = (line.strip() for line in text.splitlines())
    body = "\n".join(line for line in lines if line and not line.startswith("#"))
    return command_line(f"folder={quote_path(machine.folder)}\n{body}", *arguments)


def run_script(
    machine: RemoteMachine, name: str, *arguments: str, stdin: bytes = b"", show: bool = False
) -> ScriptResult:
    """Run a script there to its end, with `stdin`. With `show`, its stderr is shown here.

    Raises RunError if the script failed with a reason, ConfigError or ConnectionLost if ssh could not log in.
    """
    with messages_file() as messages:
        command = [*_ssh(machine, messages=messages), script_line(machine, name, *arguments)]
        done = _run(command, input=stdin, stdout=subprocess.PIPE, stderr=None if show else subprocess.PIPE)
        if done.returncode == SSH_FAILED or done.returncode < 0:
            raise connection_error(machine, messages.read())
    reason = (done.stderr or b"").decode(errors="replace").strip().removeprefix(REASON_PREFIX)
    if done.returncode == SCRIPT_FAILED:
        raise RunError(f"{machine}: {reason or 'the reason is above'}")
    if done.returncode and reason:
        raise RunError(f"{machine}: {name} ended with exit code {done.returncode}: {reason}")
    return ScriptResult(done.returncode, done.stdout)


def stream_script(machine: RemoteMachine, name: str, *arguments: str, write: Callable[[bytes], None]) -> int:
    """Run a script there, pass its stdout to `write` as it comes, and return its exit code.

    Raises as `run_script`, also if the connection breaks while the script runs.
    """
    with messages_file() as messages, NamedTemporaryFile(prefix="llmtrain-ssh-") as reason:
        # stdin stays open while this process lives, so the script knows when it is gone. Ctrl-C must not reach ssh.
        process = subprocess.Popen(
            [*_ssh(machine, messages=messages), script_line(machine, name, *arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=reason,
            bufsize=0,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            while chunk := process.stdout.read(1 << 16):
                write(chunk)
            code = process.wait()
        finally:
            process.kill()
            process.communicate()
        if code == SSH_FAILED or code < 0:
            raise connection_error(machine, messages.read())
        if code == SCRIPT_FAILED:
            reason.seek(0)
            raise RunError(f"{machine}: {reason.read().decode(errors='replace').strip().removeprefix(REASON_PREFIX)}")
    return code


def address_of(machine: RemoteMachine) -> str:
    """Return the host name or address to which the SSH config resolves the machine's name."""
    words = ssh_words(machine)
    done = _run([*words, "-G", "--", machine.destination], input=b"", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    lines = [line.partition(" ") for line in done.stdout.decode(errors="replace").splitlines()]
    return next((value for name, _, value in lines if name == "hostname"), machine.host)


def attach_terminal(machine: RemoteMachine, name: str, *arguments: str) -> int:
    """Run a script there on this terminal, and return its exit code. Raises as `run_script`."""
    with messages_file() as messages:
        command, *options = _ssh(machine, messages=messages)
        words = [command, "-tt", *options, script_line(machine, name, *arguments)]
        code = subprocess.run(words, check=False).returncode
        if code == SSH_FAILED or code < 0:
            raise connection_error(machine, messages.read())
    return code


def with_reconnects(attempt: Callable[[], Result]) -> Result:
    """Call `attempt` and return its result. While it raises ConnectionLost, call it again for RECONNECT_SECONDS."""
    first_failure, delay = None, 1.0
    while True:
        began = time.monotonic()
        try:
            return attempt()
        except ConnectionLost as error:
            now = time.monotonic()
            if first_failure is None or now - began > STEADY_SECONDS:
                first_failure, delay = now, 1.0
                log.warning("%s; connecting again", error)
            if now - first_failure > RECONNECT_SECONDS:
                raise
        time.sleep(delay)
        delay = min(2 * delay, 30.0)


@contextmanager
def messages_file() -> Iterator[MessagesFile]:
    """Open a file for ssh's own messages."""
    with NamedTemporaryFile(prefix="llmtrain-ssh-", suffix=".log") as file:
        yield MessagesFile(file.name)


@dataclass(frozen=True)
class MessagesFile:
    """A file with ssh's own messages."""

    name: str

    def read(self) -> str:
        """Return the messages, one a line."""
        return Path(self.name).read_text(encoding="utf-8", errors="replace").replace("\r", "")


def connection_error(machine: RemoteMachine, messages: str) -> RunError | ConfigError:
    """Return an error that explains ssh's messages and says what to do."""
    login = f"ssh{f' -p {machine.port}' if machine.port else ''} {machine.destination}"
    if "IDENTIFICATION HAS CHANGED" in messages or "host key has changed" in messages:
        return ConfigError(
            f"the host key of {machine} has changed: another machine answers there, or it was reinstalled. Ask its "
            f"administrator; then remove the old key, `ssh-keygen -R {machine.host}`, and log in once by hand"
        )
    if "host key" in messages.lower():
        return ConfigError(
            f"the host key of {machine} is not known here: log in once by hand, `{login}`, and compare the fingerprint "
            "that it shows"
        )
    if "Permission denied" in messages or "Too many authentication failures" in messages:
        return ConfigError(
            f"{machine} does not let you in: log in by a key (`ssh-copy-id {machine.destination}`), and load a key "
            "with a passphrase into an agent (`ssh-add`); passwords are not supported"
        )
    last = messages.strip().splitlines()[-1:] or ["the connection was closed"]
    if "Could not resolve" in last[0] or "onfig" in last[0]:
        return ConfigError(f"{machine}: {last[0]}; `{login}` should log in")
    return ConnectionLost(f"no connection to {machine} ({last[0]})")


def _ssh(machine: RemoteMachine, *, messages: MessagesFile) -> list[str]:
    return [*ssh_words(machine, messages=messages.name), "--", machine.destination]


def _run(
    command: Sequence[str], *, input: bytes, stdout: int, stderr: int | None
) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, input=input, stdout=stdout, stderr=stderr, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} is not installed here: apt-get install openssh-client rsync") from None
    except OSError as error:
        raise ConfigError(
            f"{command[0]} cannot be started: {error.strerror}; its command line may be too long"
        ) from None
