"""What the environment says of how OpenMP's threads wait for work. Imports no torch.

Libgomp reads GOMP_SPINCOUNT, LLVM's and Intel's libraries KMP_BLOCKTIME, and all of them OMP_WAIT_POLICY, as
they are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SHORT_SPINS = 30_000  # about a millisecond; libgomp's own 300,000 is longer than a scheduler's time slice


def are_short(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a thread without work leaves its core to others within about a millisecond."""
    policy, spins, milliseconds = (environ.get(name, "").strip().lower() for name in VARIABLES)
    if policy == "passive":
        return True
    return _at_most(SHORT_SPINS, spins) or _at_most(1, milliseconds)


def _at_most(most: int, text: str) -> bool:
    return text.isdecimal() and int(text) <= most
