"""The mark of a key that has no default: the composition refuses a config that leaves it so."""

from typing import Any

MISSING: Any = "???"
