"""Block-sparse matrices for tests: masks, and values between their stored and their dense form.

Shapes: B row blocks, C column blocks, M rows, G groups of W columns, V x W values tensor, N stored blocks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moetrain.kernels.block_sparse.topology import Topology, expert_topology, mask_topology
from moetrain.kernels.twins import block_sparse as twin

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of the largest element


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Tensors lie on ``device``; whoever reads memory that no kernel wrote gets NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with device:
        yield
    torch.use_deterministic_algorithms(False)


def random_mask(rows: int, columns: int, share: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, columns, generator=generator, device="cpu") < share).to(
        torch.get_default_device()
    )


def masked(
    rows: int, columns: int, block_m: int, block_n: int, share: float, seed: int
) -> tuple[Topology, Tensor]:
    """A random topology and the mask of its elements."""
    mask_BC = random_mask(-(-rows // block_m), -(-columns // block_n), share, seed)
    topology = mask_topology(mask_BC, rows, columns, block_m, block_n)
    return topology, twin.elements(mask_BC, rows, columns, block_m, block_n)


def of_experts(
    experts: list[int], num_experts: int, width: int, block_m: int, block_n: int
) -> tuple[Topology, Tensor]:
    """The dropless layer's topology and the mask of its elements [rows, experts * width]."""
    topology = expert_topology(torch.tensor(experts, dtype=torch.int32), num_experts, width, block_m, block_n)
    mask_MP = torch.zeros(len(experts) * block_m, num_experts * width, dtype=torch.bool)
    for block, expert in enumerate(experts):
        if expert >= 0:
            mask_MP[block * block_m : (block + 1) * block_m, expert * width : (expert + 1) * width] = True
    return topology, mask_MP


def windows(topology: Topology) -> list[tuple[slice, slice, slice, slice]]:
    """(rows and columns in the values tensor, rows and columns in the dense matrix) of each stored block."""
    rows, columns, found = topology.rows, topology.columns, []
    stored = zip(topology.rows_N.tolist(), topology.columns_N.tolist(), strict=True)
    for n, (row, column) in enumerate(stored):
        if row < 0:
            continue
        group, within = divmod(column, columns.per_group)
        height = min(rows.block, rows.width - row * rows.block)
        width = min(columns.block, columns.width - within * columns.block)
        down, along = n // topology.per_line * rows.block, n % topology.per_line * columns.block
        first = group * columns.width + within * columns.block
        found.append((
            slice(down, down + height), slice(along, along + width),
            slice(row * rows.block, row * rows.block + height), slice(first, first + width),
        ))  # fmt: skip
    return found


def to_dense(values_VW: Tensor, topology: Topology) -> Tensor:
    """The matrix [rows, groups * width]; differentiable."""
    shape = topology.rows.width, topology.columns.groups * topology.columns.width
    dense = values_VW.new_zeros(shape) + values_VW[:0].sum()  # of the values, even where no block is present
    for down, along, rows, columns in windows(topology):
        dense[rows, columns] = values_VW[down, along]
    return dense


def rest(values_VW: Tensor, topology: Topology) -> Tensor:
    """What present blocks hold beside the matrix where they are partial."""
    lines_N = topology.rows_N.view(-1, topology.per_line)[:, 0]
    beside = (lines_N >= 0).repeat_interleave(topology.rows.block)[:, None].expand(values_VW.shape).clone()
    for down, along, _, _ in windows(topology):
        beside[down, along] = False
    return values_VW[beside]


def rows_of(counts: list[int], source: int, block: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids_R, weights_R and the expert of each block, with as many blocks without an expert as experts."""
    generator = random.Random(seed)
    ids, weights, blocks = [], [], []
    for expert, count in enumerate(counts):
        padding = -count % block
        ids += [generator.randrange(source) for _ in range(count)] + [-1] * padding
        weights += [generator.uniform(-1, 2) for _ in range(count)] + [0.0] * padding
        blocks += [expert] * ((count + padding) // block)
    behind = min(len(counts), 3)
    ids, weights = ids + [-1] * behind * block, weights + [0.0] * behind * block
    return torch.tensor(ids), torch.tensor(weights), torch.tensor(blocks + [-1] * behind, dtype=torch.int32)


def flat(wide_GKW: Tensor) -> Tensor:
    """[G, K, W] as [K, G * W]."""
    return wide_GKW.transpose(0, 1).flatten(1)


def close(got: Tensor, want: Tensor, bound: float) -> None:
    """Within ``bound`` of the largest element wanted, element by element."""
    assert got.shape == want.shape
    atol = bound * max(1.0, want.abs().max().item() if want.numel() else 0.0)
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=atol)


PRIMES = [n for n in range(2, 256) if all(n % d for d in range(2, int(n**0.5) + 1))]


def sizes(generator: random.Random, count: int, most: int = 256) -> list[int]:
    """Primes, one of them to ``most`` and the others to an eighth of it, lest interpreting takes minutes."""
    found = [generator.choice([p for p in PRIMES if p <= most // 8]) for _ in range(count - 1)]
    found.insert(generator.randrange(count), generator.choice([p for p in PRIMES if p <= most]))
    return found


def counts_of(generator: random.Random) -> list[int]:
    """Rows of each of 1 to 160 experts, most of them without any, now and then all on one."""
    experts = generator.choice([1, 2, 3, 5, 17, 61, 160])
    counts, rows = [0] * experts, generator.choice([0, 1, 7, 31, 97, 251])
    if generator.random() < 0.2:
        counts[generator.randrange(experts)] = rows
        return counts
    for _ in range(rows):
        counts[generator.randrange(min(experts, 7)) * 23 % experts] += 1
    return counts
