"""Sums of rows by source row: the same bits as adding them one by one, in the same order.

Shapes: R computed rows, D width, X source rows.
"""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from kernel_cases import Case

from moetrain.kernels import metadata
from moetrain.kernels.combine import combine, combine_kernel
from moetrain.kernels.twins import combine as twins

WIDTHS = (1, 31, 7, 37, 2, 17)
RANDOM = [
    kernel_cases.random_case(seed, 150, experts) for seed, experts in enumerate((1, 2, 11, 29, 97, 160))
]
CASES = list(zip([*kernel_cases.EDGES, *RANDOM], 2 * WIDTHS, strict=True))
MANY = [(kernel_cases.random_case(seed, 400), kernel_cases.PRIMES[seed % 50]) for seed in range(200, 300)]


def check(case: Case, width: int, dtype: torch.dtype, device: torch.device) -> None:
    token_ids_N, weights_N, counts_E = kernel_cases.assignment(case, device)
    meta, _ = metadata.lay_out(token_ids_N, weights_N, counts_E, 16, case.num_source)
    # what no assignment names must not be read: it is no number
    rows_RD = torch.full((meta.ids_R.shape[0], width), torch.nan, dtype=dtype, device=device)
    g = torch.Generator().manual_seed(19)
    rows_RD[meta.slots_N] = torch.randn(len(meta.slots_N), width, generator=g).to(device, dtype)
    got_XD = combine(rows_RD, meta.by_source_N, meta.ends_X)
    want_XD = twins.combine(rows_RD.float(), meta.by_source_N, meta.ends_X).to(dtype)
    assert got_XD.dtype is dtype
    assert torch.equal(got_XD, want_XD)


@pytest.mark.parametrize(("case", "width"), CASES, ids=str)
def test_sums_have_the_twin_s_bits(case: Case, width: int, device: torch.device) -> None:
    check(case, width, torch.float32, device)


def test_sums_are_rounded_once(device: torch.device) -> None:
    check(Case((29, 31, 5, 31), 31), 19, torch.float16, device)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "width"), MANY, ids=str)
def test_sums_of_many_shapes(case: Case, width: int, device: torch.device) -> None:
    check(case, width, torch.float32, device)


def test_nothing_beside_the_sums_is_written(device: torch.device) -> None:
    """17 columns are a block of 16 and one that is cut."""
    rows_RD = torch.ones(5, 17, device=device)
    by_source_N, ends_X = torch.arange(5, device=device), torch.tensor([2, 2, 5], device=device)
    room_XD = torch.full((4, 17), 7.0, device=device)
    combine_kernel[(3, 2)](rows_RD, by_source_N, ends_X, room_XD, 17, 17, 17, BLOCK=16, num_warps=4)
    assert room_XD[:, 0].tolist() == [2, 0, 3, 7]
    assert room_XD[3].eq(7).all()


def test_fp64_is_refused(device: torch.device) -> None:
    ends_X = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="not float64"):
        combine(torch.zeros(16, 5, dtype=torch.float64, device=device), ends_X[:0], ends_X)
