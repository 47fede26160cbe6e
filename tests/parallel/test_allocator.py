"""The allocator's settings, in a process of their own: a freed block does not go back to the system.

The C library's own count says it (mallinfo2), since not every kernel counts page faults.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys, threading
import torch
from moetrain.parallel.allocator import keep_freed_memory

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Mallinfo

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = mallinfo().hblkhd
blocks = [torch.ones(1 << 20) for _ in range(12)]  # 4 MiB each
blocks.append(torch.empty(1 << 24))  # and 64 MiB, which glibc takes from the system by its own choice
mapped = mallinfo().hblkhd - before
del blocks
free, total = mallinfo().fordblks, mallinfo().arena
thread = threading.Thread(target=lambda: [torch.ones(1 << 20) for _ in range(12)])
thread.start()
thread.join()
print(mapped, free, mallinfo().arena - total)
"""


def bytes_used(mode: str) -> tuple[int, int, int]:
    """Of 112 MiB: bytes straight from the system, free bytes of the heap later; what a thread adds then."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True)
    if "mallinfo2" in done.stderr:
        pytest.skip("this C library has no mallinfo2 (glibc 2.33 or later)")
    assert done.returncode == 0, done.stderr
    mapped, kept, added = done.stdout.split()
    return int(mapped), int(kept), int(added)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is what is set")
def test_freed_memory_stays_with_the_process():
    blocks = 112 << 20
    mapped, kept, added = bytes_used("keep")
    assert mapped < blocks // 10
    assert kept >= blocks
    assert added < 4 << 20
    mapped, kept, _ = bytes_used("leave")
    assert mapped >= 4 << 20  # the first ones at least
    assert kept < blocks
