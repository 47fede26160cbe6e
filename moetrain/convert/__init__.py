"""``moetrain convert`` and ``moetrain export``: checkpoints of other projects in, and out again."""
