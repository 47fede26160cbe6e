"""The allocator's settings, in a process of their own: a freed block does not go back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from moetrain.parallel.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [torch.ones(1 << 20) for _ in range(12)]  # 4 MiB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is what is set")
def test_freed_memory_is_used_again_without_page_faults():
    found = {
        mode: int(
            subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, check=True).stdout
        )
        for mode in ("keep", "leave")
    }
    assert found["keep"] < 1000  # of 5 x 12 x 1024 pages
    assert found["leave"] > 10 * found["keep"]
