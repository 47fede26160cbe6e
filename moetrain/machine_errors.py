"""What the machine lacks, told in one line: memory, space, permissions, a home folder, an encoding."""

from __future__ import annotations

import errno

from moetrain.errors import UserError

_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def machine_error(error: BaseException | None) -> UserError | None:
    """What the machine lacks, as a line; also where it is the stated cause of another error."""
    while error is not None:
        if isinstance(error, UnicodeEncodeError):
            part = error.object[error.start : error.end]
            return UserError(
                f"{part!a} cannot be expressed in {error.encoding}: set LC_ALL=C.UTF-8 or PYTHONUTF8=1, or "
                "take names without it"
            )
        if _is_out_of_memory(error):
            first = (str(error).strip().splitlines() or ["no more can be had"])[0]
            return UserError(f"out of memory: {first}; lower model.*, train.micro_batch_size or data.seq_len")
        if isinstance(error, RuntimeError) and "Could not determine home directory" in str(error):
            return UserError("a path begins with ~, but no home folder is known: set HOME, or write it out")
        if isinstance(error, OSError) and error.errno in _MACHINE:
            where = f": {error.filename}" if error.filename else ""
            return UserError(
                f"{error.strerror}{where}; free space or choose another folder (run.dir, data.cache_dir)"
            )
        error = error.__cause__
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's of a GPU (by name: torch may not be loaded) and of a CPU, which has no class."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
