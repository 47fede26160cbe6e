"""Which optional packages are there."""

from __future__ import annotations

import importlib.util


def is_installed(package: str) -> bool:
    """A folder of that name beside the user's files is no package: it has no origin."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
