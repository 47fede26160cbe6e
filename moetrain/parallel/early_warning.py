"""A batch system's warning that comes while a rank is still starting: kept, where it would end the process.

Imports no torch, so that it is kept from a rank's first line on.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

_came = False


def keep_early_warning() -> None:
    """Let SIGUSR1 be remembered from now on, in a step of Slurm; a stop flag's own handler comes after it."""
    if "SLURM_STEP_ID" in os.environ and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, _remember)


def early_warning() -> str | None:
    """The name of the signal that came, or None."""
    return "SIGUSR1" if _came else None


def _remember(number: int, frame: FrameType | None) -> None:
    global _came
    _came = True
