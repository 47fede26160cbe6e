"""How much of a parameter one token uses, for counts of parameters and of operations."""

from __future__ import annotations

from typing import NamedTuple


class Use(NamedTuple):
    """``share``: the part of the parameter's elements that a token passes through. ``products``: how many
    multiply-adds an element takes part in for a token, on average over elements.

    A module tells them in ``uses``, by its parameters' names; of one that it leaves out, every element takes
    part once.
    """

    share: float
    products: float
