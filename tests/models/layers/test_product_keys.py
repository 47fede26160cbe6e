"""peer and pkm against all N keys, one token, head and row at a time; and the running batch norm.

Shapes: T tokens, D model, N rows, n sub-keys of a half, H heads, K keys of a head.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from layer_cases import inputs, layer
from torch import Tensor, nn

from moetrain.models.layer_options import ProductKeysConfig
from moetrain.moe import RouterContext
from moetrain.moe.product_keys import best_pairs, best_ranks
from moetrain.moe.running_norm import RunningNorm
from moetrain.ops import rows
from moetrain.ops.rows import row_products, row_sums


def by_hand(
    x_BSD: Tensor, made: nn.Module, heads: int, top_k: int, own: bool
) -> tuple[Tensor, list[list[int]]]:
    """(y, each token's rows): every key is made and scored, and Python's sort takes the best."""
    router, tables = made.router, made.experts
    n, width = math.isqrt(len(tables.w_down_ND)), router.sub_keys.shape[1]
    out, chosen = [], []
    for x_D in x_BSD.reshape(-1, x_BSD.shape[-1]):
        query = router.w_query @ x_D
        if router.norm is not None:
            spread = (router.norm.variance_X + 1e-5).sqrt()
            query = (query - router.norm.mean_X) / spread * router.gain + router.shift
        y_D, mine = torch.zeros_like(x_D), []
        for head in range(heads):
            half = query[head * 2 * width :][: 2 * width]
            at = head * n if own else 0
            second = (heads if own else 1) * n
            keys = [
                torch.cat([router.sub_keys[at + i], router.sub_keys[second + at + j]])
                for i, j in product(range(n), range(n))
            ]
            scores = [half @ key for key in keys]
            best = sorted(range(n * n), key=lambda i: -scores[i].item())[:top_k]
            total = sum(scores[i].exp() for i in best)
            for i in best:
                weight = scores[i].exp() / total
                if tables.w_up_ND is not None:
                    z = tables.w_up_ND[i] @ x_D
                    weight = weight * 0.5 * z * (1 + torch.erf(z / 2**0.5))
                y_D = y_D + weight * tables.w_down_ND[i]
            mine += best
        out.append(y_D)
        chosen.append(mine)
    return torch.stack(out).view_as(x_BSD), chosen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", ["peer", "pkm"])
@pytest.mark.parametrize(("heads", "top_k", "num_rows"), [(3, 5, 49), (2, 7, 9), (1, 1, 25), (2, 9, 9)])
def test_output_and_gradients_are_those_of_all_keys(
    name: str, heads: int, top_k: int, num_rows: int, momentum: float | None, training: bool
) -> None:
    options = ProductKeysConfig(heads, top_k, 6, momentum)
    made = layer(name, product_keys=options, num_experts=num_rows).train(training)
    x = inputs()
    y, record = made(x)
    expected, chosen = by_hand(x, made, heads, top_k, own=name == "pkm")
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(y)
    wanted = [x, *made.parameters()]
    ours = torch.autograd.grad((y * direction).sum(), wanted)
    theirs = torch.autograd.grad((expected * direction).sum(), wanted, materialize_grads=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    n = math.isqrt(num_rows)
    counts = torch.zeros(2, 2 * n, dtype=torch.int64)
    for token, ids in enumerate(chosen):
        for i in ids:
            counts[token // x.shape[1], i // n] += 1
            counts[token // x.shape[1], n + i % n] += 1
    assert torch.equal(record.demand_BE, counts)
    unread = torch.ones(num_rows, dtype=torch.bool)
    unread[[i for ids in chosen for i in ids]] = False
    for parameter, gradient in zip(wanted[1:], ours[1:], strict=True):
        if rows.is_row_table(parameter):
            assert not gradient[unread].any()
            assert gradient[~unread].any(1).all()


@pytest.mark.parametrize(("n", "k"), [(2, 1), (2, 4), (3, 5), (5, 25), (7, 16), (11, 3)])
def test_the_best_pairs_are_those_of_all_pairs(n: int, k: int) -> None:
    first, second = torch.randn(2, 13, n, dtype=torch.float64)
    ids, scores = best_pairs(first, second, k, best_ranks(k, n))
    sums = (first[:, :, None] + second[:, None]).flatten(1)
    assert torch.equal(ids, sums.sort(descending=True).indices[:, :k])
    assert torch.equal(scores, sums.gather(1, ids))


def test_tied_sub_keys_still_give_the_best_sums() -> None:
    first, second = torch.randint(3, (2, 40, 5)).double()
    ids, scores = best_pairs(first, second, 6, best_ranks(6, 5))
    sums = (first[:, :, None] + second[:, None]).flatten(1)
    assert torch.equal(scores, sums.sort(descending=True).values[:, :6])
    assert all(len(set(row.tolist())) == 6 for row in ids)


def test_one_key_a_head_is_a_network_of_as_many_neurons() -> None:
    """He 2024, equation 8: with K = 1 the softmax is 1, and neurons are picked by the heads."""
    made, x = layer("peer", product_keys=ProductKeysConfig(4, 1, 6)), inputs()
    ids = made.router(x.flatten(0, 1), RouterContext.default(2, 7)).ids_THK.flatten(1)
    for token, x_D in enumerate(x.flatten(0, 1)):
        up_HD, down_HD = made.experts.w_up_ND[ids[token]], made.experts.w_down_ND[ids[token]]
        y_D = nn.functional.gelu(up_HD @ x_D) @ down_HD
        torch.testing.assert_close(made(x)[0].flatten(0, 1)[token], y_D, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 40, 10_000])
def test_products_with_rows_by_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHUNK", chunk)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    table = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(11, (7, 5))
    assert torch.autograd.gradcheck(lambda x, t: row_products(x, t, ids), (x, table))
    assert torch.autograd.gradcheck(lambda w, t: row_sums(w, t, ids), (weights, table))
    torch.testing.assert_close(row_products(x, table, ids), (table[ids] * x[:, None]).sum(-1))
    torch.testing.assert_close(row_sums(weights, table, ids), (table[ids] * weights[..., None]).sum(1))
    assert row_sums(weights[:0], table, ids[:0]).shape == (0, 3)


def test_a_bf16_tables_gradient_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHUNK", 1)
    table = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.full((1000, 1), 1.0, dtype=torch.bfloat16)
    row_sums(weights, table, torch.zeros(1000, 1, dtype=torch.int64)).sum().backward()
    assert float(table.grad[0]) == 1000  # bf16 sums would stop at 256


def test_statistics_move_by_the_whole_step_once() -> None:
    """However it is split, and as torch's batch norm would: evenly at first, then by the momentum."""
    norm = RunningNorm(5, momentum=0.3)
    seen: list[Tensor] = []
    mean, variance = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for step in range(5):
        z = torch.randn(17, 5, dtype=torch.float64) * (step + 1) + step
        valid = torch.rand(17) < 0.7
        before = (norm.mean_X.clone(), norm.variance_X.clone())
        parts = [norm.sums(z[at : at + 4], valid[at : at + 4]) for at in range(0, 17, 4)]
        norm(z)
        assert torch.equal(norm.mean_X, before[0])
        norm.move(sum(parts))
        share = max(0.3, 1 / (step + 1))
        mean = mean + share * (z[valid].mean(0) - mean)
        variance = variance + share * (z[valid].var(0, correction=0) - variance)
        torch.testing.assert_close(norm.mean_X, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.variance_X, variance, rtol=1e-12, atol=1e-12)
        seen.append(norm.mean_X.clone())
    z = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(norm(z), nn.functional.batch_norm(z, mean, variance, eps=1e-5))
    norm.move(norm.sums(z[:0], None))  # no token at all
    assert torch.equal(norm.mean_X, seen[-1])
    assert norm.to(torch.bfloat16).mean_X.dtype is torch.float64


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_experts": 50}, r"model\.num_experts=50 must be a square.*take 49 or 64"),
        ({"product_keys": ProductKeysConfig(1, 50, 4)}, r"top_k=50 exceeds model\.num_experts=49"),
        ({"product_keys": ProductKeysConfig(1, 5, 7)}, r"d_query=7 must be even"),
        ({"num_shared_experts": 2}, r"model\.num_shared_experts=2 is of dispatched experts"),
    ],
)
def test_what_product_keys_refuse(changes: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        layer("peer", **changes)
