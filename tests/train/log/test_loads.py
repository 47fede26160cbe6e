"""How loads are shown: a bounded number of histograms, and one map of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from moetrain.train.log.loads import MAX_LAYERS, heat_map, histogram, shown_layers
from moetrain.train.log.options import TensorboardTracker
from moetrain.train.log.trackers import build_tracker


def test_tensorboard_has_loads_and_alarms(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = build_tracker(TensorboardTracker())
    tracker.start(tmp_path, {}, 0)
    tracker.log({"step": 1, "train/loss": 8.0}, 1, {layer: [1 / 128] * 128 for layer in range(64)})
    tracker.alert("collapse", "in layer 3", 2)
    tracker.log({"step": 2, "train/loss": 4.0}, 2)
    tracker.finish(True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["load/map"]
    assert len(tags["histograms"]) == MAX_LAYERS
    assert "alarms/text_summary" in tags["tensors"]


def test_a_map_has_a_row_a_layer_and_a_column_an_expert() -> None:
    pixels = heat_map({0: [0.5, 0.5, 0.0], 3: [1.0]})
    cell = pixels.shape[0] // 2
    assert pixels.shape == (2 * cell, 3 * cell, 3)
    cells = pixels[::cell, ::cell].tolist()
    assert cells[0][2] == [255, 255, 255]  # no token
    assert cells[1][0] == [86, 180, 233]  # balanced
    assert cells[1][1] == [224, 224, 224]  # no expert
    assert max(heat_map({n: [1 / 128] * 128 for n in range(64)}).shape) == 1024


def test_every_expert_is_in_a_bin() -> None:
    counts, edges = histogram([0.9] + [0.1 / 6] * 6)
    assert counts.sum() == 7
    assert edges[-1] == pytest.approx(6.3)
    assert histogram([0.0] * 5)[0].sum() == 5


@pytest.mark.parametrize(("layers", "shown"), [([4], [4]), (range(16), [*range(16)]), (range(3, 67), None)])
def test_layers_with_a_histogram(layers: Sequence[int], shown: list[int] | None) -> None:
    found = shown_layers(layers)
    assert found == shown if shown else len(set(found)) == MAX_LAYERS
    assert (found[0], found[-1]) == (layers[0], layers[-1])
