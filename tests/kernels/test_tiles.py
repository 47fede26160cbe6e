"""Tiles fit the device's memory and grow with the rows of an expert."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from moetrain.kernels import tiles

ARCHS = list(tiles.ARCHITECTURES.values())
KINDS = [(dtype, False) for dtype in tiles.DTYPES] + [(torch.float32, True)]
ROWS = [0, 1, 7, 16, 17, 33, 64, 65, 129, 2048]
WIDTHS = [(1, 1), (13, 7), (768, 2048), (14336, 4096), (97, 5003)]


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
@pytest.mark.parametrize(("dtype", "tf32"), KINDS)
@pytest.mark.parametrize("accumulators", [1, 2])
def test_a_tile_fits(arch: tiles.Arch, dtype: torch.dtype, tf32: bool, accumulators: int) -> None:
    for rows in ROWS:
        for columns, depth in WIDTHS:
            found = tiles.tile(arch, dtype, rows, columns, depth, accumulators, tf32)
            assert tiles.shared_bytes(found, dtype, accumulators) <= arch.shared
            assert found.num_stages == arch.stages, "no shipped tile is so large that fewer stages fit"
            held = found.block_m * found.block_n * accumulators
            assert held <= arch.wide
            assert held / (found.num_warps * arch.warp_size) <= 128, "accumulators a thread"
            for size in (found.block_m, found.block_n, found.block_k):
                assert size >= 16
                assert size & (size - 1) == 0
            assert found.block_k * dtype.itemsize <= 128


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
@pytest.mark.parametrize(("dtype", "tf32"), KINDS)
def test_a_tile_grows_with_the_rows_of_an_expert(arch: tiles.Arch, dtype: torch.dtype, tf32: bool) -> None:
    found = [tiles.tile(arch, dtype, rows, 768, 2048, 1, tf32) for rows in ROWS]
    for less, more in pairwise(found):
        assert less.block_m <= more.block_m
        assert less.block_m * less.block_n <= more.block_m * more.block_n
    assert [each.block_m for each in found][:4] == [16, 16, 16, 16]
    assert found[-1].block_m == (128 if dtype is not torch.float32 or tf32 else 64)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.name)
@pytest.mark.parametrize(("dtype", "tf32"), KINDS)
def test_a_gradients_step_divides_a_block_of_rows(arch: tiles.Arch, dtype: torch.dtype, tf32: bool) -> None:
    for rows in ROWS:
        for columns, depth in WIDTHS:
            found = tiles.gradient_tile(arch, dtype, rows, depth, columns, tf32)
            assert tiles.block_m(arch, dtype, rows, tf32) % found.block_k == 0
            assert tiles.shared_bytes(found, dtype) <= arch.shared


def test_products_of_one_expert_share_a_block_of_rows() -> None:
    for arch in (*ARCHS, tiles.INTERPRETER):
        for dtype in tiles.DTYPES:
            found = {tiles.tile(arch, dtype, 40, n, k, a).block_m for n, k in WIDTHS for a in (1, 2)}
            assert found == {tiles.block_m(arch, dtype, 40)}


def test_the_interpreter_has_small_tiles() -> None:
    found = tiles.tile(tiles.arch_of(torch.device("cpu")), torch.float32, 2048, 768, 2048)
    assert (found.block_m, found.block_n, found.block_k) == (16, 16, 16)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "sm_80"), ((8, 6), "sm_89"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 1), "sm_120")],
)
def test_a_capability_has_an_architecture(capability: tuple[int, int], name: str) -> None:
    assert tiles.of_capability(*capability).name == name


def test_an_unknown_capability_gets_the_least_memory() -> None:
    least = min(arch.shared for arch in ARCHS if arch.backend == "cuda")
    assert tiles.of_capability(13, 7).shared == least


def test_what_has_no_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8\.0 or later, the device has 7\.5"):
        tiles.of_capability(7, 5)
    with pytest.raises(ValueError, match="not float64"):
        tiles.tile(ARCHS[0], torch.float64, 1, 1, 1)
    with pytest.raises(ValueError, match="not on meta"):
        tiles.arch_of(torch.device("meta"))
