"""Grouped products of the experts' feed-forward: every expert's rows in one launch."""

from .layer import backward, forward

__all__ = ["backward", "forward"]
