"""Ranks of these tests import the test's own module, and pytest with it."""

from moetrain.parallel.ranks import PRELOAD

PRELOAD.append("pytest")
