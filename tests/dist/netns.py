"""Network namespaces on one machine, as machines on one switch: for links that are cut or slow.

::

    with Network(2) as network:
        network.run(1, "ip", "route", "get", network.address(0))
        network.slow("100mbit")
        network.cut(1)

Needs root and ``ip`` (Debian: iproute2); :func:`refused` says why it does not go.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
from pathlib import Path

DEVICE = "eth0"  # of every namespace but the switch
_PREFIX = "moe"
_CLONE_NEWNET = 0x40000000


class Network:
    """``count`` namespaces, each joined by a veth pair to a bridge in one more; gone after the ``with``."""

    def __init__(self, count: int) -> None:
        self.names = [f"{_PREFIX}{os.getpid()}-{number}" for number in range(count)]
        self._switch = f"{_PREFIX}{os.getpid()}-switch"

    def __enter__(self) -> Network:
        try:
            _remove_left_over()
            for name in [self._switch, *self.names]:
                _ip("netns", "add", name)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for number, name in enumerate(self.names):
                self._connect(number, name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in [*self.names, self._switch]:
            _remove(name)

    def address(self, number: int) -> str:
        return f"10.213.7.{number + 1}"

    def run(self, number: int, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in namespace ``number`` to its end, at most a minute; its output is text."""
        inside = ["ip", "netns", "exec", self.names[number], *command]
        return subprocess.run(inside, capture_output=True, text=True, timeout=60)

    def slow(self, rate: str) -> None:
        """Bound what each namespace sends to ``rate`` (as ``100mbit``), by a token bucket."""
        for name in self.names:
            bucket = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "200ms"]
            _call("tc", "-n", name, "qdisc", "replace", "dev", DEVICE, *bucket)

    def cut(self, number: int) -> None:
        """``ip link set down`` in namespace ``number``: its packets and those to it are lost."""
        _ip("-n", self.names[number], "link", "set", DEVICE, "down")

    def join(self, number: int) -> None:
        """Undo :meth:`cut`."""
        _ip("-n", self.names[number], "link", "set", DEVICE, "up")

    def _connect(self, number: int, name: str) -> None:
        port = f"port{number}"
        _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", DEVICE, "netns", name)
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", DEVICE)
        for device in ("lo", DEVICE):
            _ip("-n", name, "link", "set", device, "up")


def enter(name: str) -> None:
    """Move this thread, and those it starts from now on, into the namespace ``name``."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")


def refused() -> str | None:
    """Why this process cannot make namespaces; None where it can."""
    if shutil.which("ip") is None:
        return "network namespaces need ip, and there is none"
    try:
        with Network(1):
            return None
    except RuntimeError as error:
        return f"network namespaces are not permitted here: {error}"


def _ip(*arguments: str) -> None:
    _call("ip", *arguments)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def _remove(name: str) -> None:
    if not Path("/run/netns", name).exists():
        return
    inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=60)
    for pid in inside.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=60)


def _remove_left_over() -> None:
    """Namespaces of processes that were killed before they could clean up."""
    for path in Path("/run/netns").glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            _remove(path.name)
