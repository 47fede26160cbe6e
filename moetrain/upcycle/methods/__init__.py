"""Upcycling methods, one a file; importing this package registers them."""

from moetrain.upcycle.methods.adapters import AdaptersOptions
from moetrain.upcycle.methods.copy import CopyOptions
from moetrain.upcycle.methods.diversify import DiversifyOptions
from moetrain.upcycle.methods.drop import DropOptions
from moetrain.upcycle.methods.extend import ExtendOptions
from moetrain.upcycle.methods.granular import GranularOptions, ScaleOn
from moetrain.upcycle.methods.grow import GrowOptions
from moetrain.upcycle.methods.join import JoinOptions, Rest
from moetrain.upcycle.methods.low_rank import LowRankOptions
from moetrain.upcycle.methods.split import SplitBy, SplitOptions

__all__ = [
    "AdaptersOptions",
    "CopyOptions",
    "DiversifyOptions",
    "DropOptions",
    "ExtendOptions",
    "GranularOptions",
    "GrowOptions",
    "JoinOptions",
    "LowRankOptions",
    "Rest",
    "ScaleOn",
    "SplitBy",
    "SplitOptions",
]
