"""Parts of a stored block: what they hold, and that no more of the file is read at once than a few rows."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.checkpoint import rows as checkpoint_rows
from moetrain.checkpoint.blocks import BlockError, Slice
from moetrain.checkpoint.rows import StoredBlock

BEFORE = 13  # bytes in the file that are another block's


def stored(tensor: Tensor) -> Slice:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    file = io.BytesIO(b"x" * BEFORE + buffer.getvalue() + b"y" * 7)
    return Slice(file, BEFORE, len(buffer.getvalue()))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_part_is_that_part_of_the_block(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 7), max_size=3))
    whole = torch.randn(shape)
    if data.draw(st.booleans()) and len(shape) > 1:
        whole = whole.mT.contiguous().mT  # strides of its own
    offsets = [data.draw(st.integers(0, size)) for size in shape]
    sizes = [data.draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True)]
    target = torch.full(sizes, torch.nan, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_rows, "_AT_ONCE", data.draw(st.integers(1, 200)))
        StoredBlock(stored(whole), torch.float32, shape).copy_part(offsets, target)
    here = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
    assert torch.equal(target, whole[here].double())


def test_a_large_block_is_read_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(1009, 257)
    reads: list[int] = []
    readinto = Slice.readinto

    def noting(self: Slice, buffer: memoryview) -> int:
        reads.append(len(memoryview(buffer)))
        return readinto(self, buffer)

    monkeypatch.setattr(checkpoint_rows, "_AT_ONCE", 2**17)
    monkeypatch.setattr(Slice, "readinto", noting)
    target = torch.empty(500, 257)
    StoredBlock(stored(whole), torch.float32, whole.shape).copy_part([211, 0], target)
    assert torch.equal(target, whole[211:711])
    assert max(reads) <= 2**17
    assert sum(reads) < target.nbytes + 2**17  # a directory and a pickle, besides


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3, 8), r"says torch.float32\[3, 8\]"),
        (torch.zeros(8, 3, dtype=torch.int32), "says torch.int32"),
        (torch.zeros(1, 3).expand(8, 3), "in 12 bytes"),
        ({"w": torch.zeros(8, 3)}, "makes a dict"),
    ],
    ids=["shape", "dtype", "strides of 0", "no tensor"],
)
def test_a_pickle_of_another_tensor_is_refused(content: Tensor, message: str) -> None:
    with pytest.raises(BlockError, match=message):
        StoredBlock(stored(content), torch.float32, [8, 3])


def test_a_block_that_ends_early_is_refused() -> None:
    stream = stored(torch.zeros(8, 3))
    block = StoredBlock(stream, torch.float32, [8, 3])
    stream._length = 90  # cut since it was opened
    with pytest.raises(BlockError, match="bytes early"):
        block.copy_part([0, 0], torch.zeros(8, 3))
