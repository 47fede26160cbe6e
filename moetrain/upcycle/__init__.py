"""Sparse upcycling: MoE models from dense ones."""

from moetrain.upcycle.calibration import LayerCalibration
from moetrain.upcycle.method import METHODS, Promise
from moetrain.upcycle.methods import (
    AdaptersOptions,
    CopyOptions,
    DiversifyOptions,
    DropOptions,
    ExtendOptions,
    GranularOptions,
    GrowOptions,
    JoinOptions,
    LowRankOptions,
    Rest,
    ScaleOn,
    SplitBy,
    SplitOptions,
)
from moetrain.upcycle.options import MethodOptions, RouterStart
from moetrain.upcycle.target import Target
from moetrain.upcycle.upcycle import Upcycled, Upcycling, prepare, upcycle

__all__ = [
    "METHODS",
    "AdaptersOptions",
    "CopyOptions",
    "DiversifyOptions",
    "DropOptions",
    "ExtendOptions",
    "GranularOptions",
    "GrowOptions",
    "JoinOptions",
    "LayerCalibration",
    "LowRankOptions",
    "MethodOptions",
    "Promise",
    "Rest",
    "RouterStart",
    "ScaleOn",
    "SplitBy",
    "SplitOptions",
    "Target",
    "Upcycled",
    "Upcycling",
    "prepare",
    "upcycle",
]
