"""Blocks of a tensor must tile it: the check agrees with counting elements, and is fast."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.checkpoint.blocks import BlockError, tiles


@st.composite
def _tensors_and_blocks(draw):
    """A small shape and boxes inside it: a tiling from random cuts, and in most cases some other boxes."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    boxes = [([0] * len(shape), list(shape))]
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(boxes) - 1))
        if not shape:
            break
        offsets, sizes = boxes.pop(at)
        d = draw(st.integers(0, len(shape) - 1))
        first = draw(st.integers(0, sizes[d]))
        boxes.append((list(offsets), [*sizes[:d], first, *sizes[d + 1 :]]))
        boxes.append(
            (
                [*offsets[:d], offsets[d] + first, *offsets[d + 1 :]],
                [*sizes[:d], sizes[d] - first, *sizes[d + 1 :]],
            )
        )
    for _ in range(draw(st.integers(0, 2))):
        offsets = [draw(st.integers(0, full)) for full in shape]
        boxes.append(
            (offsets, [draw(st.integers(0, full - o)) for o, full in zip(offsets, shape, strict=True)])
        )
    keep = draw(st.integers(0, 2))
    return shape, boxes[min(keep, 1) if keep < 2 else 0 :]


@settings(max_examples=400, deadline=None)
@given(_tensors_and_blocks())
def test_tiling_agrees_with_counting_every_element(case):
    shape, boxes = case
    covered = np.zeros(shape, dtype=int)
    for offsets, sizes in boxes:
        covered[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    assert tiles(shape, boxes) == bool((covered == 1).all())


def test_a_pinwheel_is_a_tiling_and_its_hole_is_none():
    wheel = [([0, 0], [1, 2]), ([0, 2], [2, 1]), ([2, 1], [1, 2]), ([1, 0], [2, 1]), ([1, 1], [1, 1])]
    assert tiles([3, 3], wheel)
    assert not tiles([3, 3], wheel[:-1])
    assert not tiles([3, 3], [*wheel[:-1], ([0, 0], [1, 1])])  # the same volume


def test_a_hundred_thousand_blocks_are_checked_in_seconds():
    grid = [([2 * i, 3 * j], [2, 3]) for i in range(500) for j in range(200)]
    began = time.process_time()
    assert tiles([1000, 600], grid)
    assert not tiles([1000, 600], [*grid[:-1], grid[0]])
    assert time.process_time() - began < 10
    with pytest.raises(BlockError, match="more than can be checked"):
        tiles([2] * 12, [([i % 2] * 12, [1] * 12) for i in range(2000)])
