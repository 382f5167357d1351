"""A real sshd on this machine, as an ordinary process on a free port, with keys of its own.

>>> with SshServer(folder) as server:
...     run(["launch", "ssh", "status", *server.options("one"), "--dir", str(folder / "project")])

It is reached as `one` and as `two`, two names of the same machine; `stranger` is a name without a known host key. On
`apart`, which needs root, ~/apart is another folder than on `one`. HOME and the tmux server of a session are the test's
own.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import psutil

from tests.support.ranks import free_port

APART = """#!/bin/sh
export TMUX_TMPDIR="$HOME/tmux-apart"
exec unshare --mount sh -c 'mount --bind "$HOME/other" "$HOME/apart" && exec sh -c "$SSH_ORIGINAL_COMMAND"'
"""
"""What runs a command on `apart`: it sees the files of ~/other in ~/apart."""
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class SshServer:
    """The server and its clients' configuration, in `folder`."""

    def __init__(self, folder: Path) -> None:
        assert SSHD, "apt-get install openssh-server rsync tmux"
        self.folder, self.port = folder, free_port()
        self.home = folder / "home"
        self.config = folder / "ssh config"
        for name in ("tmux", "tmux-apart", "other", "apart"):
            (self.home / name).mkdir(parents=True)
        for name in ("host_key", "user_key", "apart_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        (folder / "apart.sh").write_text(APART)
        user, apart = ((folder / f"{name}_key.pub").read_text() for name in ("user", "apart"))
        (folder / "authorized_keys").write_text(f'{user}command="sh {folder}/apart.sh" {apart}')
        host_key = (folder / "host_key.pub").read_text()
        (folder / "known hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}")
        self._write_configs()
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        log = folder / "sshd.log"
        self.process = subprocess.Popen([SSHD, "-D", "-E", str(log), "-f", str(folder / "sshd_config")])
        for _ in range(200):
            if log.exists() and "listening" in log.read_text():
                return
            time.sleep(0.05)
        raise AssertionError(log.read_text())

    def _write_configs(self) -> None:
        environment = {
            "HOME": str(self.home),
            "TMUX_TMPDIR": str(self.home / "tmux"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "LLMTRAIN_FAULTS": "sleep@step:0.1",
        }
        server = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": self.folder / "host_key",
            "AuthorizedKeysFile": self.folder / "authorized_keys",
            "PidFile": "none",
            "UsePAM": "no",
            "StrictModes": "no",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "yes",
            "SetEnv": " ".join(f'"{name}={value}"' for name, value in environment.items()),
        }
        (self.folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in server.items()))
        client = {
            "HostName": "127.0.0.1",
            "Port": self.port,
            "User": getpass.getuser(),
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "no",  # in vain: host keys are checked whatever stands here
            "GlobalKnownHostsFile": "none",
            "UserKnownHostsFile": f'"{self.folder / "known hosts"}"',
        }
        lines = "".join(f"  {key} {value}\n" for key, value in client.items())
        stranger = "Host stranger\n  HostKeyAlias stranger\n"
        keys = {"one two stranger": "user_key", "apart": "apart_key", "keyless": "host_key"}
        which = "".join(f'Host {hosts}\n  IdentityFile "{self.folder / key}"\n' for hosts, key in keys.items())
        self.config.write_text(f"{stranger}{which}Host {' '.join(keys)}\n{lines}")

    def __enter__(self) -> SshServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in ("tmux", "tmux-apart"):
            environment = {**os.environ, "TMUX_TMPDIR": str(self.home / name)}
            subprocess.run(["tmux", "kill-server"], env=environment, stderr=subprocess.DEVNULL, check=False)
        self.cut()
        self.process.kill()
        self.process.wait()

    def options(self, *hosts: str) -> list[str]:
        """Return the flags that name these hosts, and this Python on them."""
        named = [word for host in hosts for word in ("--host", host)]
        return [*named, "--ssh-config", str(self.config)]

    def cut(self) -> int:
        """Break all connections, as a network that goes away, and return how many there were."""
        sessions = [each for each in psutil.Process(self.process.pid).children(recursive=True) if "sshd" in each.name()]
        for session in sessions:
            session.kill()
        return len(sessions)


PYTHON = ["--python", sys.executable]
