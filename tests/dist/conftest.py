"""Ranks begin with what they all import: pytest, of the test's own module, and the trainer."""

from moetrain.parallel.ranks import PRELOAD

PRELOAD.extend(
    ["pytest", "moetrain.config.stored", "moetrain.train.run", "moetrain.verify.measure", "moetrain.report"]
)
