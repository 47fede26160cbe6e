"""Which layers have the sliding window: ``layer_types`` of transformers 5, as a pattern and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moetrain.errors import quoted
from moetrain.models.hf.fields import Fields
from moetrain.models.options import LayerWindow, ModelConfig, window_of

_KINDS = {"sliding_attention": LayerWindow.sliding, "full_attention": LayerWindow.full}
_NAMES = {window: name for name, window in _KINDS.items()}


def read_windows(fields: Fields, usual: Callable[[int], LayerWindow]) -> dict[str, Any]:
    """``sliding_window`` and ``window_pattern``; ``usual``: a layer's, by its place, where there is no list.

    Raises UserError for a list of other names, or of another length, and for layers without a width.
    """
    found = fields.get("layer_types") if fields.has("layer_types") else None
    layers = fields.layers()
    if found is None:
        windows = [usual(layer) for layer in range(layers)]
    else:
        if not isinstance(found, list) or not all(isinstance(kind, str) and kind in _KINDS for kind in found):
            raise fields.refuse(f"layer_types={quoted(found)} is no list of {' and '.join(_KINDS)}")
        if len(found) != layers:
            raise fields.refuse(f"layer_types names {len(found)} layers of {layers}")
        windows = [_KINDS[kind] for kind in found]
    fields.without_effect("sliding_window")  # where no layer has it
    if LayerWindow.sliding not in windows:
        return {"sliding_window": None}
    width = fields.integer_or_none("sliding_window")
    if width is None or width < 1:
        raise fields.refuse(f"sliding_window={width} of layers with sliding_attention must be 1 or more")
    pattern = _period(windows) if LayerWindow.full in windows else ()
    return {"sliding_window": width, "window_pattern": pattern}


def write_windows(cfg: ModelConfig, otherwise: int | None) -> dict[str, Any]:
    """The inverse. ``otherwise``: a width for the file of a model without windows."""
    windows = [window_of(cfg, layer) for layer in range(cfg.num_layers)]
    kinds = [LayerWindow.full if width is None else LayerWindow.sliding for width in windows]
    width = otherwise if cfg.sliding_window is None else cfg.sliding_window
    return {"layer_types": [_NAMES[kind] for kind in kinds], "sliding_window": width}


def _period(windows: list[LayerWindow]) -> tuple[LayerWindow, ...]:
    """The shortest beginning that the list repeats."""
    lengths = range(1, len(windows) + 1)
    length = next(n for n in lengths if all(w is windows[i % n] for i, w in enumerate(windows)))
    return tuple(windows[:length])
