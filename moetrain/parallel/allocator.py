"""The C library's allocator, set to keep the memory that a step frees, which the next step uses again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # mallopt's names for them, of glibc's malloc.h
_KEEP = 2**31 - 1  # bytes at the heap's end that are kept before any is given back
_ONE = 1  # heap for all threads, so that one uses again what another freed
_NONE = 0  # blocks outside the heap, which go back to the system as they are freed, whatever their size


def keep_freed_memory() -> bool:
    """Set the allocator; returns whether that was possible (glibc only).

    On a CPU the fresh pages of a step cost about a seventh of its time, those of the gradients of large
    expert matrices alone as much. The process then keeps its largest use of memory until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    options = ((_TRIM_THRESHOLD, _KEEP), (_MMAP_MAX, _NONE), (_ARENA_MAX, _ONE))
    return all(bool(mallopt(name, value)) for name, value in options)
