"""The topology of a block-sparse matrix, in both orders, against lists of blocks.

Shapes: L row blocks or column blocks, N stored blocks, B row blocks, C column blocks.
"""

from __future__ import annotations

import pytest
import torch
from block_sparse_cases import random_mask, windows
from torch._subclasses import DynamicOutputShapeException, FakeTensorMode

from moetrain.kernels.block_sparse.topology import Lines, Topology, expert_topology, mask_topology
from moetrain.kernels.twins import block_sparse as twin

MASKS = [
    (1, 1, 1.0), (1, 1, 0.0), (3, 7, 0.4), (7, 3, 0.6), (11, 13, 0.1), (5, 2, 0.0), (2, 5, 1.0), (0, 3, 1.0),
]  # fmt: skip
EXPERTS = [
    ([0], 1), ([], 2), ([-1, -1], 3), ([0, 0, 1, 2, 2, -1, -1], 3), ([1, 1, 4, -1], 5), ([2, 2, 2], 3),
    ([2, 0, 1, 0, 2], 3), ([0, -1, 2, 1, -1, 0], 3), ([*range(0, 160, 3), -1, -1], 160),
]  # fmt: skip


def entries(lines: Lines, topology: Topology) -> list[list[tuple[int, int, int]]]:
    """(row, column, stored) of the blocks of each line; what lies across is checked on the way."""
    found = []
    for start, end in zip(lines.starts_L.tolist(), lines.ends_L.tolist(), strict=True):
        stored = lines.stored_N[start:end].tolist()
        across = lines.across_N[start:end].tolist()
        rows, columns = topology.rows_N[stored].tolist(), topology.columns_N[stored].tolist()
        assert across == (columns if lines is topology.by_row else rows)
        found.append(list(zip(rows, columns, stored, strict=True)))
    return found


def check(topology: Topology, mask: torch.Tensor) -> None:
    by_row, by_column = twin.blocks(mask)
    rows = entries(topology.by_row, topology)
    columns = entries(topology.by_column, topology)
    assert len(rows) == mask.shape[0]
    assert len(columns) == mask.shape[1]
    assert [(r, c) for line in rows for r, c, _ in line] == by_row
    assert [(r, c) for line in columns for r, c, _ in line] == by_column
    for r, line in enumerate(rows):
        assert {row for row, _, _ in line} <= {r}
    for c, line in enumerate(columns):
        assert {column for _, column, _ in line} <= {c}
    kept = [stored for line in rows for _, _, stored in line]
    assert len(set(kept)) == len(kept)
    for lines in (topology.by_row, topology.by_column):
        assert all(each.dtype is torch.int32 for each in vars(lines).values())


@pytest.mark.parametrize(("rows", "columns", "share"), MASKS)
def test_blocks_of_a_mask_in_both_orders(rows: int, columns: int, share: float) -> None:
    mask = random_mask(rows, columns, share, seed=rows)
    topology = mask_topology(mask, max(rows * 16 - 5, 0), columns * 32 - 3, 16, 32)
    check(topology, mask)
    assert topology.values_shape == (int(mask.sum()) * 16, 32)


def test_a_mask_may_be_a_view() -> None:
    mask = random_mask(5, 3, 0.5, seed=2).t()
    check(mask_topology(mask, 3 * 16, 5 * 16, 16, 16), mask)


@pytest.mark.parametrize("width", [13, 32, 41])
@pytest.mark.parametrize(("experts", "num_experts"), EXPERTS, ids=[str(e[0])[:24] for e in EXPERTS])
def test_rows_have_the_columns_of_their_expert(experts: list[int], num_experts: int, width: int) -> None:
    topology = expert_topology(torch.tensor(experts, dtype=torch.int32), num_experts, width, 32, 16)
    per = -(-width // 16)
    mask = torch.zeros(len(experts), num_experts * per, dtype=torch.bool)
    for row, expert in enumerate(experts):
        if expert >= 0:
            mask[row, expert * per : (expert + 1) * per] = True
    check(topology, mask)
    assert topology.values_shape == (len(experts) * 32, width)
    for down, _, rows, _ in windows(topology):
        assert down == rows  # a row's values stand in its own row


def test_a_topology_that_does_not_fit_is_refused() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"33 x 96 in blocks of 32 x 32 needs a bool mask of 2 x 3, not torch.i"
    ):
        mask_topology(mask.long(), 33, 96, 32, 32)
    with pytest.raises(ValueError, match=r"needs a bool mask of 2 x 4, not torch.bool \(2, 3\)"):
        mask_topology(mask, 33, 97, 32, 32)
    with pytest.raises(ValueError, match="blocks have 16, 32, 64, 128 rows or columns, not 24"):
        expert_topology(torch.zeros(2, dtype=torch.int32), 1, 48, 16, 24)
    with pytest.raises(ValueError, match=f"{3 << 26} blocks, kernels count {1 << 27} at most"):
        mask_topology(mask[:1].expand(1 << 26, 3), 1 << 30, 48, 16, 16)


def test_the_topology_of_experts_reads_nothing_on_the_host() -> None:
    """A fake tensor has no values: whoever asks for one is told."""
    experts = torch.tensor([0, 2, -1], dtype=torch.int32)
    with FakeTensorMode() as mode:
        topology = expert_topology(mode.from_tensor(experts), 3, 37, 32, 16)
        assert topology.by_column.stored_N.shape == (9,)
        with pytest.raises(DynamicOutputShapeException):
            mask_topology(mode.from_tensor(torch.ones(1, 1, dtype=torch.bool)), 16, 16, 16, 16)
