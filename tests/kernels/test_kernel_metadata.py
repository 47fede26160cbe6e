"""Rows laid out on the device, against the twin's loops and against the plan that the host makes.

Shapes: T tokens, K choices a token, E experts, N assignments, X source rows.
"""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from kernel_cases import Case

from moetrain.kernels import metadata, sorting
from moetrain.kernels.twins import metadata as twins
from moetrain.moe.dispatch.plan import layout

RANDOM = tuple(kernel_cases.random_case(seed, experts=e) for seed, e in enumerate((1, 3, 7, 29, 97, 160)))
MANY = tuple(kernel_cases.random_case(seed, most_rows=1000) for seed in range(100, 200))


def check(case: Case, block: int, device: torch.device, spare: int = 0) -> None:
    token_ids_N, weights_N, counts_E = kernel_cases.assignment(case, device)
    want = twins.lay_out(token_ids_N, weights_N, counts_E, block, case.num_source)
    tail_N = token_ids_N.new_zeros(spare)
    got, weights_R = metadata.lay_out(
        torch.cat([token_ids_N, tail_N]), torch.cat([weights_N, tail_N]), counts_E, block, case.num_source
    )
    used = {"block_expert_B": -1, "ids_R": -1, "weights_R": 0, "slots_N": -1, "by_source_N": -1}
    for name, value in want.items():
        found = (weights_R if name == "weights_R" else getattr(got, name)).cpu()
        assert torch.equal(found[: len(value)], value), name
        assert len(found) == len(value) or found[len(value) :].eq(used[name]).all(), name
    assert got.ids_R.shape[0] == (-(-(sum(case.counts) + spare) // block) + len(case.counts)) * block


@pytest.mark.parametrize("case", kernel_cases.EDGES + RANDOM, ids=str)
def test_rows_are_the_twin_s(case: Case, device: torch.device) -> None:
    check(case, 16, device)


@pytest.mark.parametrize("block", [32, 64, 128])
def test_rows_in_larger_blocks(block: int, device: torch.device) -> None:
    check(Case((0, 67, 1, 0, 129), 131), block, device)


@pytest.mark.parametrize("spare", [1, 19])
def test_assignments_known_by_bound_only(spare: int, device: torch.device) -> None:
    check(Case((5, 0, 17, 2), 23), 16, device, spare)


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY, ids=str)
def test_rows_of_many_shapes(case: Case, device: torch.device) -> None:
    check(case, 16, device)


def test_the_used_part_is_the_plan_of_the_host(device: torch.device) -> None:
    case = Case((0, 41, 17, 0, 1), 43)
    token_ids_N, weights_N, counts_E = kernel_cases.assignment(case, device)
    got, _ = metadata.lay_out(token_ids_N, weights_N, counts_E, 16, case.num_source)
    rows, slots_N = layout(token_ids_N, counts_E, list(case.counts), case.num_source, 16)
    assert torch.equal(got.ids_R[: len(rows.ids_R)], rows.ids_R)
    assert torch.equal(got.slots_N, slots_N)
    assert torch.equal(got.by_source_N, rows.by_source_N)
    assert torch.equal(got.ends_X, rows.ends_X)


@pytest.mark.parametrize(
    ("tokens", "choices", "experts"),
    [(0, 2, 5), (1, 1, 1), (13, 3, 7), (37, 2, 1), (41, 5, 97), (29, 4, 523)],
)
def test_choices_are_sorted_by_expert_and_token(
    tokens: int, choices: int, experts: int, device: torch.device
) -> None:
    """An id equal to the number of experts is no expert's; more than 512 take a second pass."""
    ids_TK = torch.rand(tokens, experts + 1, generator=torch.Generator().manual_seed(7)).argsort(1)
    ids_TK = ids_TK[:, :choices].to(device)
    order_M, counts_E = metadata.sort_choices(ids_TK, experts)
    want_N, want_E = twins.sort_choices(ids_TK, experts)
    assert torch.equal(order_M.cpu()[: len(want_N)], want_N)
    assert torch.equal(counts_E.cpu(), want_E)
    assert torch.equal(order_M.sort().values.cpu(), torch.arange(tokens * choices))


@pytest.mark.parametrize(("num_keys", "bins"), [(1, 32), (31, 32), (255, 256), (70_001, 256)])
def test_the_order_of_keys_is_stable(num_keys: int, bins: int, device: torch.device) -> None:
    g = torch.Generator().manual_seed(11)
    keys_M = torch.randint(0, num_keys + 1, (67,), generator=g).repeat(2).to(device)
    assert torch.equal(sorting.stable_order(keys_M, num_keys, bins=bins), keys_M.sort(stable=True).indices)


def test_a_block_without_a_tile_is_refused() -> None:
    none = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="16, 32, 64, 128 rows, not 24"):
        metadata.lay_out(none, none.float(), none.new_zeros(3), 24, 5)
