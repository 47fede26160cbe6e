"""The errors that say: another rank is dead, unreachable, or was waited for too long."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch.distributed as dist

_PEER_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed out|socket (timeout|closed)|"
    r"no route to host|connectfullmesh|remote (side|process)",
    re.IGNORECASE,
)
_NOISE = re.compile(r"^\[[^\]]*\] *|\. This is typically caused.*$")


class PeerLostError(RuntimeError):
    """Another rank is dead or unreachable: nothing may be saved and no collective may follow."""


def peer_lost(error: BaseException) -> bool:
    """Whether ``error`` came out of a collective because a rank died, hung or became unreachable."""
    if isinstance(error, PeerLostError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _PEER_LOST.search(str(error)) is not None


@contextlib.contextmanager
def raising_peer_lost(what: str) -> Iterator[None]:
    """Turns the errors of a collective that a dead rank causes into PeerLostError; ``what`` was under way."""
    try:
        yield
    except PeerLostError:
        raise
    except RuntimeError as error:
        if not peer_lost(error):
            raise
        raise PeerLostError(f"lost contact with another rank while {what} ({cause(error)})") from error


def cause(error: BaseException) -> str:
    """A backend's error in one line: without the place in its source, and without its advice."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return _NOISE.sub("", line)
