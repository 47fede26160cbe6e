"""The network interface by which this machine reaches another one.

Where several are there, gloo takes that of the host's own name, which others may not reach.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

_ROUTES = Path("/proc/net/route")
_UP = 1


def choose_interface(host: str) -> None:
    """Let gloo and NCCL take the interface of the route to ``host``, unless the environment names one."""
    if interface := interface_to(host):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)


def interface_to(host: str, routes: Path = _ROUTES) -> str | None:
    """The name of the interface of the route to ``host``, by IPv4; None where there is none, or no table.

    The narrowest route counts, and of those the one of the least metric, as the kernel chooses.
    """
    try:
        target = int(ipaddress.IPv4Address(socket.gethostbyname(host)))
        lines = routes.read_text().splitlines()[1:]
    except (OSError, ValueError):
        return None
    if target >> 24 == 127:
        return next((name for _, name in socket.if_nameindex() if name == "lo"), None)
    best: tuple[int, int, str] | None = None
    for line in lines:
        name, destination, _, flags, _, _, metric, mask, *_ = line.split()
        network, bits = _number(destination), _number(mask)
        if int(flags, 16) & _UP and target & bits == network:
            route = (-bits.bit_count(), int(metric), name)
            best = route if best is None else min(best, route)
    return None if best is None else best[2]


def _number(text: str) -> int:
    """An address of the table, whose bytes stand in the machine's order: little-endian."""
    return int.from_bytes(bytes.fromhex(text), "little")
