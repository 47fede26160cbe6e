"""The user's cache folder: prepared data, and what was found out about this machine."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

from moetrain.errors import UserError

log = logging.getLogger("moetrain.cache")
_SET = "set data.cache_dir or XDG_CACHE_HOME"


def cache_root(cache_dir: str | None = None) -> Path:
    """``cache_dir``, else ``$XDG_CACHE_HOME/moetrain``, else ``~/.cache/moetrain``. Not created here.

    A user without a home folder, as in containers under a bare number, has a folder of their own among the
    temporary files. Raises UserError where somebody else has that.
    """
    if cache_dir is not None:
        return Path(os.path.expanduser(cache_dir))
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "moetrain"
    home = os.path.expanduser("~")
    return _without_home() if home.startswith("~") else Path(home) / ".cache/moetrain"


def _without_home() -> Path:
    folder = Path(tempfile.gettempdir(), f"moetrain-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise UserError(f"no home folder, and cannot write {folder}: {error.strerror}; {_SET}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"no home folder, and {folder} is not this user's alone; {_SET}")
    log.info("no home folder: the cache is %s; %s to keep it elsewhere", folder, _SET)
    return folder
