"""Routing statistics, and that every emitted key is documented."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.moe import RouterContext
from moetrain.moe.assign import from_mask
from moetrain.moe.assignment import Assignment
from moetrain.moe.balance import LossFollower, SparsityController
from moetrain.moe.routing import Routing
from moetrain.train.log.metrics import (
    EvalSums,
    RoutingStats,
    eval_row,
    key_pattern,
    load_every,
    step_row,
    worst_load,
)
from moetrain.train.log.monitor import LossMonitor

CONTROLLERS = (SparsityController({0: 4}, {0: 2}), LossFollower("chunk_sparsity", [0], 4.0))
DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


def make_routing(
    choice_TK: list[list[int]],
    experts: int,
    *,
    dropped: set[tuple[int, int]] = frozenset(),  # type: ignore[assignment]
    scores_TE: Tensor | None = None,
    logits_TE: Tensor | None = None,
    valid_T: Tensor | None = None,
) -> Routing:
    """The routing of one sequence in which token t wants the experts ``choice_TK[t]``."""
    wanted = [(e, t) for t, row in enumerate(choice_TK) for e in row]
    kept = sorted(pair for pair in wanted if (pair[1], pair[0]) not in dropped)
    tokens = len(choice_TK) if valid_T is None else int(valid_T.sum())
    routing = Routing(
        assignment=Assignment(
            token_ids_N=torch.tensor([t for _, t in kept], dtype=torch.int64),
            weights_N=torch.ones(len(kept)),
            counts_E=torch.bincount(torch.tensor([e for e, _ in kept], dtype=torch.int64), minlength=experts),
        ),
        num_tokens_B=torch.tensor([tokens]),
        demand_BE=torch.bincount(torch.tensor([e for e, _ in wanted], dtype=torch.int64), minlength=experts)[
            None
        ],
        scores_TE=scores_TE,
        logits_TE=logits_TE,
        valid_T=valid_T,
    )
    routing.check()
    return routing


def test_figures_of_a_worked_example() -> None:
    # 5 tokens, 3 experts; expert 0 is wanted by all and refuses token 4, expert 2 is dead.
    routing = make_routing([[0, 1], [0], [0], [0], [0]], 3, dropped={(4, 0)})
    stats = RoutingStats()
    stats.add({7: routing})
    summary = stats.reduce()
    row = summary.metrics()
    mean = 5 / 3
    deviation = math.sqrt(((4 - mean) ** 2 + (1 - mean) ** 2 + mean**2) / 3)
    assert row == pytest.approx(
        {
            "moe/7/max_load": 4 / mean,
            "moe/7/load_cv": deviation / mean,
            "moe/7/dead_experts": 1.0,
            "moe/7/drop_rate": 1 / 6,
            "moe/7/experts_per_token": 5 / 5,
            "moe/7/token_sparsity": 2 / 3,
        }
    )
    assert {n: c_E.tolist() for n, c_E in summary.counts.items()} == {7: [4, 1, 0]}
    assert {n: d_E.tolist() for n, d_E in summary.demand.items()} == {7: [5, 1, 0]}
    assert summary.load_row(11) == {"step": 11, "layers": [7], "load": [[0.8, 0.2, 0.0]]}


def test_entropy_is_of_normalised_scores_and_valid_tokens_only() -> None:
    # Sigmoid-like scores that do not sum to 1; a token without scores; a padding token full of NaN.
    scores_TE = torch.tensor([[0.2, 0.2, 0.4], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [math.nan] * 3])
    valid_T = torch.tensor([True, True, True, False])
    routing = make_routing([[2], [0], [1], []], 3, scores_TE=scores_TE, valid_T=valid_T)
    stats = RoutingStats()
    stats.add({0: routing})
    assert stats.reduce().metrics()["moe/0/entropy"] == pytest.approx(1.5 * math.log(2) / 3)


def test_the_size_of_logits_is_over_valid_tokens() -> None:
    """Three tokens of two batches, one masked expert, and a padding token full of NaN."""
    stats = RoutingStats()
    first_TE = torch.tensor([[3.0, -math.inf, 4.0], [math.nan] * 3])
    valid_T = torch.tensor([True, False])
    stats.add({0: make_routing([[0], []], 3, logits_TE=first_TE, valid_T=valid_T)})
    stats.add({0: make_routing([[0], [1]], 3, logits_TE=torch.tensor([[1.0, 1.0, 1.0], [-2.0, 0.0, 0.0]]))})
    mean = (25 / 3 + 1 + 4 / 3) / 3
    assert stats.reduce().metrics()["moe/0/logit_rms"] == pytest.approx(math.sqrt(mean))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_micro_batches_sum_to_the_whole_batch(data: st.DataObject) -> None:
    experts, tokens = data.draw(st.sampled_from([1, 3, 7])), 13
    choices = data.draw(
        st.lists(
            st.lists(st.integers(0, experts - 1), unique=True, min_size=1), min_size=tokens, max_size=tokens
        )
    )
    cut = data.draw(st.integers(1, tokens - 1))
    scores_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(cut))
    whole, parts = RoutingStats(), RoutingStats()
    whole.add({2: make_routing(choices, experts, scores_TE=scores_TE)})
    parts.add({2: make_routing(choices[:cut], experts, scores_TE=scores_TE[:cut])})
    parts.add({2: make_routing(choices[cut:], experts, scores_TE=scores_TE[cut:])})
    found, expected = parts.reduce().metrics(), whole.reduce().metrics()
    for row in (found, expected):  # of whole sequences, and this is a part of one
        row.pop("moe/2/chunk_sparsity", None)
    assert found == pytest.approx(expected, rel=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 3), st.integers(1, 29), st.integers(1, 5), st.integers(0, 99))
def test_sparsity_of_tokens_and_of_eight_neighbours(batch: int, seq: int, experts: int, seed: int) -> None:
    """Sets of experts, by token and by whole runs of eight; the ends of sequences are padding."""
    generator = torch.Generator().manual_seed(seed)
    chosen_BSE = torch.rand(batch, seq, experts, generator=generator) < 0.2
    valid_BS = torch.arange(seq) < torch.randint(1, seq + 1, (batch, 1), generator=generator)
    scores_TE = torch.ones(batch * seq, experts, dtype=torch.float64)
    ctx = replace(RouterContext.default(batch, seq), valid_T=valid_BS.flatten())
    routing = from_mask(chosen_BSE.flatten(0, 1), scores_TE, ctx, scores_TE)
    stats = RoutingStats()
    stats.add({0: routing})
    row = stats.reduce().metrics()
    idle, runs = [], []
    for b in range(batch):
        used = [set(chosen_BSE[b, s].nonzero().flatten().tolist()) for s in range(seq) if valid_BS[b, s]]
        idle += [1 - len(of) / experts for of in used]
        for first in range(0, len(used) - 7, 8):
            runs.append(1 - len(set.union(*used[first : first + 8])) / experts)
    assert row["moe/0/token_sparsity"] == pytest.approx(sum(idle) / len(idle) if idle else 1.0)
    assert row.get("moe/0/chunk_sparsity") == (pytest.approx(sum(runs) / len(runs)) if runs else None)


def test_recompute_counts_once() -> None:
    calls = []

    def forward(x_TE: Tensor) -> tuple[Tensor, Routing]:
        calls.append(1)
        scores_TE = x_TE.softmax(-1)
        return scores_TE.square().sum(), make_routing([[0], [1], [1]], 2, scores_TE=scores_TE)

    def metrics(recompute: bool) -> dict[str, float]:
        x_TE = torch.arange(6.0).reshape(3, 2).requires_grad_()
        run = checkpoint(forward, x_TE, use_reentrant=False) if recompute else forward(x_TE)
        stats = RoutingStats()
        stats.add({0: run[1]})
        run[0].backward()
        return stats.reduce().metrics()

    plain = metrics(recompute=False)
    calls.clear()
    assert metrics(recompute=True) == plain
    assert len(calls) == 2  # the forward pass did run twice


def test_nothing_is_kept_from_autograd_and_reduce_starts_again() -> None:
    scores_TE = torch.rand(2, 2, requires_grad=True)
    stats = RoutingStats()
    stats.add({0: make_routing([[0], [1]], 2, scores_TE=scores_TE)})
    assert not stats.reduce().sums_F.requires_grad
    assert stats.reduce().counts == {}
    stats.add({4: make_routing([[1], [1], [0]], 3)})
    assert stats.reduce().counts[4].tolist() == [1, 2, 0]


def test_a_step_without_any_assignment_has_finite_figures() -> None:
    stats = RoutingStats()
    stats.add({0: make_routing([[]], 5)})
    row = stats.reduce().metrics()
    assert all(math.isfinite(value) for value in row.values())
    assert row["moe/0/dead_experts"] == 5


def test_a_dense_model_has_no_routing_figures() -> None:
    stats = RoutingStats()
    stats.add({})
    assert stats.reduce().metrics() == {}


def test_records_that_do_not_fit_are_refused() -> None:
    stats = RoutingStats()
    stats.add({0: make_routing([[0]], 3), 2: make_routing([[1]], 3)})
    with pytest.raises(ValueError, match=r"with \{0: 3, 2: 3\} and with \{0: 3\} experts"):
        stats.add({0: make_routing([[0]], 3)})
    with pytest.raises(ValueError, match=r"and with \{0: 3, 2: 5\} experts"):
        stats.add({0: make_routing([[0]], 3), 2: make_routing([[0]], 5)})


def test_layers_have_experts_of_their_own_number() -> None:
    stats = RoutingStats()
    for _ in range(2):
        stats.add({1: make_routing([[0], [0], [1]], 2), 5: make_routing([[4], [2], [2]], 5)})
    summary = stats.reduce()
    assert summary.layers == (1, 5)
    assert summary.load_row(3)["load"] == [[0.6667, 0.3333], [0.0, 0.0, 0.6667, 0.0, 0.3333]]
    row = summary.metrics()
    assert (row["moe/1/dead_experts"], row["moe/5/dead_experts"]) == (0, 3)
    assert (row["moe/1/max_load"], row["moe/5/max_load"]) == pytest.approx((4 / 3, 4 / (6 / 5)))


def documented_keys() -> set[str]:
    """The keys of the step and evaluation tables of docs/metrics.md."""
    text = DOCS.read_text(encoding="utf-8").split("## Other files")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE))


def emitted_rows(layers: int, domains: int) -> tuple[dict[str, float], dict[str, float]]:
    stats = RoutingStats()
    ones_TE = torch.ones(8, 2)
    routing = make_routing([[0], [1]] * 4, 2, scores_TE=ones_TE, logits_TE=ones_TE)
    stats.add(dict.fromkeys(range(layers), routing))
    step = step_row(
        step=1,
        tokens=2,
        loss=3.0,
        lr=0.1,
        grad_norm=1.0,
        tokens_per_second=5.0,
        routing=stats.reduce(),
        aux={"switch": [1.0] * layers},
        control={name: 1.0 for controller in CONTROLLERS for name in controller.metrics()},
        ahead=[1.0],
    )
    sums = {f"domain {i}/x": EvalSums(float(i), i + 1, 3 * i + 1) for i in range(domains)}
    modes = {"group": EvalSums(1.0, 2, 3)}
    names = ("router_similarity", "congestion")
    of_routing = {f"moe/{layer}/{name}": 1.0 for layer in range(layers) for name in names}
    return step, eval_row(1, 2, EvalSums(1.0, 2, 3), sums, modes, of_routing)


def test_documented_keys_are_the_emitted_ones() -> None:
    step, evaluation = emitted_rows(layers=3, domains=2)
    assert {key_pattern(key) for key in (*step, *evaluation)} == documented_keys()


def test_the_number_of_keys_is_bounded() -> None:
    step, evaluation = emitted_rows(layers=64, domains=1000)
    assert len(step) == 7 + 1 + 4 + 64 * (9 + 1)
    assert len(evaluation) == 6 + 1 + 2 * 32 + 2 * 64


def test_small_domains_are_pooled_without_loss() -> None:
    sums = {f"d{i:03}": EvalSums(float(i + 1), i + 1, 2 * i + 2) for i in range(40)}
    row = eval_row(1, 1, EvalSums(1.0, 1, 1), sums)
    pooled = range(9)  # 31 keep their names
    assert row["val/other/loss"] == pytest.approx(1.0)
    assert "val/d008/loss" not in row
    assert "val/d009/loss" in row
    nats = sum(i + 1 for i in pooled)
    assert row["val/other/bits_per_byte"] == pytest.approx(nats / math.log(2) / (2 * nats))


def test_evaluation_figures() -> None:
    sums = EvalSums(12.0, 4, 9)
    assert sums.loss == 3.0
    assert sums.perplexity == pytest.approx(math.exp(3))
    assert sums.bits_per_byte == pytest.approx(12 / math.log(2) / 9)
    assert math.isnan(EvalSums(0.0, 0, 0).loss)
    assert EvalSums(1e6, 1, 1).perplexity == math.inf


def test_mean_of_a_constant_is_that_constant() -> None:
    monitor = LossMonitor()
    for _ in range(3):
        monitor.check(3.0)
    assert monitor.mean == pytest.approx(3.0)


def test_the_worst_layer() -> None:
    row = {"moe/2/max_load": 1.5, "moe/10/max_load": 2.5, "moe/3/load_cv": 9.0, "step": 1}
    assert worst_load(row) == (10, 2.5)
    assert worst_load({"step": 1}) is None


@pytest.mark.parametrize("steps", [1, 199, 200, 201, 100_000])
def test_load_rows_are_bounded(steps: int) -> None:
    assert 1 <= steps // load_every(steps) <= 200
