"""The errors of a collective that another rank causes: it is dead, unreachable, or late."""

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
    """Another rank is dead or unreachable. The caller must not save, nor call another collective."""


def peer_lost(error: BaseException) -> bool:
    """Whether a collective raised ``error`` because another rank died, hung or became unreachable."""
    if isinstance(error, PeerLostError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and _PEER_LOST.search(str(error)) is not None


@contextlib.contextmanager
def raising_peer_lost(what: str) -> Iterator[None]:
    """A context that raises PeerLostError for an error that another rank caused. ``what``: for its text."""
    try:
        yield
    except PeerLostError:
        raise
    except RuntimeError as error:
        if not peer_lost(error):
            raise
        raise PeerLostError(f"lost contact with another rank while {what} ({cause(error)})") from error


def cause(error: BaseException) -> str:
    """A backend's error in one line, without the source position and the advice that backends add."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return _NOISE.sub("", line)
