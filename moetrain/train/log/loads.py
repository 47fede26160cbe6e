"""How experts' loads are shown by trackers: a heat map of all layers, and histograms of a bounded number.

A load is an expert's assignments over the mean of its layer: 1 is perfect balance.

Shapes: L MoE layers, E experts of the layer with most, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Loads = Mapping[int, Sequence[float]]  # a layer's place in the decoder -> each expert's share, 0 to 1

MAX_LAYERS = 16  # with a histogram of their own
BINS = 32
_TOP = 4.0  # the load at which the map's colour is full
_PIXELS = 1024  # of the map's longer side, where a cell is larger than a pixel
_CELL = 16  # pixels of a cell at most
_EMPTY, _BALANCED, _FULL, _ABSENT = (255, 255, 255), (86, 180, 233), (213, 94, 0), (224, 224, 224)


def shown_layers(layers: Sequence[int]) -> list[int]:
    """At most ``MAX_LAYERS``, evenly spaced, the first and the last among them."""
    if len(layers) <= MAX_LAYERS:
        return list(layers)
    places = np.linspace(0, len(layers) - 1, MAX_LAYERS).round().astype(int)
    return [layers[place] for place in places]


def loads_of(shares: Sequence[float]) -> NDArray[np.float64]:
    """Each expert's load [E]."""
    return np.asarray(shares, np.float64) * len(shares)


def histogram(shares: Sequence[float]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Experts per bin [BINS] and the bins' edges [BINS + 1]; the last bin ends at the largest load, 2 at
    least."""
    load_E = loads_of(shares)
    return np.histogram(load_E, BINS, (0.0, max(2.0, float(load_E.max(initial=0.0)))))


def heat_map(loads: Loads) -> NDArray[np.uint8]:
    """Pixels [H, W, 3]: a row a layer, a column an expert; white 0, blue 1, red 4 or more, grey none."""
    experts = max((len(shares) for shares in loads.values()), default=1)
    rows = [_row(loads_of(shares), experts) for shares in loads.values()] or [_row(np.zeros(0), experts)]
    image_LE3 = np.stack(rows)
    cell = max(1, min(_CELL, _PIXELS // max(image_LE3.shape[:2])))
    return image_LE3.repeat(cell, 0).repeat(cell, 1)


def _row(load_E: NDArray[np.float64], experts: int) -> NDArray[np.uint8]:
    stops = [0.0, 1.0, _TOP]
    colours = zip(_EMPTY, _BALANCED, _FULL, strict=True)
    row_E3 = np.full((experts, 3), _ABSENT, np.uint8)
    row_E3[: len(load_E)] = np.stack([np.interp(load_E, stops, channel) for channel in colours], -1)
    return row_E3
