"""The variables that torchrun sets for this process, read before torch is imported."""

from __future__ import annotations

import os
import re

from moetrain.errors import STOPPED, UserError


def world_size() -> int:
    """How many ranks were started; 1 without torchrun."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise UserError(
            f"the environment's WORLD_SIZE={text} must be a number from 1 up, as torchrun sets it"
        )
    return int(text)


def local_ranks() -> int:
    """How many ranks were started on this machine; 1 without torchrun, or where the variable is not set."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdecimal() else 1


def is_rank_0() -> bool:
    """Whether this process is rank 0, which prints for all ranks; true without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def stopped() -> int:
    """The exit code of a run that was asked to stop and has saved.

    0 where torchrun has restarts left: any other code is a failure to it, and it would begin the run again.
    """
    most, done = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    again = most.isdecimal() and done.isdecimal() and int(most) > int(done)
    return 0 if again else STOPPED
