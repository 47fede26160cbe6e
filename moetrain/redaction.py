"""Secrets that a text holds: values of environment variables that are named like one, and passwords in words.

What a program is told is printed, and kept in run folders and by trackers; these are not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

HIDDEN = "***"
_SHORTEST = 8  # characters of a value that is looked for in texts
_NAME = re.compile(
    r"(^|_)(API_?KEY|ACCESS_KEY|PRIVATE_KEY|SECRET_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)"
    r"(_(?!PATH|FILE|DIR)|$)",
    re.IGNORECASE,
)
_GIVEN = re.compile(
    r"((?:^|[\s._+~-])(?:api_?key|token|secret|password|passwd)=)[^\s,}\]]+|(://)[^/\s:@]*:[^/\s@]+(?=@)",
    re.IGNORECASE,
)


def secret_names(text: str) -> list[str]:
    """The environment variables whose secret values ``text`` holds."""
    return [name for name, value in _secrets() if value in text]


def redacted(text: str) -> str:
    """``text`` with ``***`` for each secret: of the environment, of ``token=...`` and of ``://user:...@``."""
    for _, value in sorted(_secrets(), key=lambda pair: -len(pair[1])):
        text = text.replace(value, HIDDEN)
    return _GIVEN.sub(lambda found: f"{found[1] or found[2]}{HIDDEN}", text)


def _secrets() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAME.search(name):
            yield name, value
