"""Losses that shape the scores, against loops: locality, chunk sparsity, and a Dirichlet prior.

Shapes: T tokens, B sequences of S positions, E experts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from invariance import B, Recorder, assert_same, batch, build, cut, gradients, router_difference
from scipy import stats
from shaping_cases import draw, routing_of, softmax, value
from torch import Tensor

from moetrain.moe import MoELayer, Routing
from moetrain.moe.balance import LossFollower, LossTerm, StepTotals, make_terms, total_loss
from moetrain.moe.balance.base import probabilities
from moetrain.moe.balance.dirichlet import DirichletOptions
from moetrain.moe.balance.score_losses import ChunkOptions, LocalityOptions
from moetrain.moe.balance.settings import LossConfig, LossScope
from moetrain.moe.routers.relu import ReLUOptions
from moetrain.parallel.mesh import Meshes
from moetrain.train.engine import NativeEngine
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.step import TrainStep

TERMS = {
    "locality": LossTerm("locality", 0.5, "global_batch", options=LocalityOptions(3.0)),
    "chunk_sparsity": LossTerm("chunk_sparsity", 0.5, "global_batch", options=ChunkOptions(3)),
    "dirichlet_sequence": LossTerm("dirichlet", 0.5, "sequence", options=DirichletOptions(0.7)),
    "dirichlet_micro": LossTerm("dirichlet", 0.5, "micro", options=DirichletOptions(0.7)),
}
EXACT = [key for key in TERMS if key != "dirichlet_micro"]  # whose value and gradient no split changes


def by_hand(term: LossTerm, routing: Routing) -> float:
    """The loss of one step that is one micro-batch, token by token and expert by expert."""
    tokens, num_experts = routing.logits_TE.shape
    batch = len(routing.num_tokens_B)
    seq = tokens // batch
    valid = [True] * tokens if routing.valid_T is None else routing.valid_T.tolist()
    logits, scores = routing.logits_TE.tolist(), routing.scores_TE.tolist()
    p = [[s / sum(row) if sum(row) else 0.0 for s in row] for row in scores]
    total = 0.0
    if term.name == "locality":
        for t in range(1, tokens):
            if t % seq and valid[t - 1] and valid[t]:
                for e in range(num_experts):
                    guess, target = (
                        1 / (1 + math.exp(-term.options.steepness * logits[u][e])) for u in (t - 1, t)
                    )
                    total -= target * math.log(guess) + (1 - target) * math.log(1 - guess)
    elif term.name == "chunk_sparsity":
        for b in range(batch):
            for start in range(0, seq, term.options.chunk_length):
                places = range(b * seq + start, b * seq + min(start + term.options.chunk_length, seq))
                places = [t for t in places if valid[t]]
                for e in range(num_experts):
                    total += len(places) * (1 - math.prod(1 - (1 - 1e-5) * p[t][e] for t in places))
    else:
        prior = stats.beta(term.options.alpha, (num_experts - 1) * term.options.alpha)
        width = tokens if term.scope == "micro" else seq
        for start in range(0, tokens, width):
            for e in range(num_experts):
                column = sorted(p[t][e] for t in range(start, start + width) if valid[t])
                for i, x in enumerate(column, start=1):
                    total += (i / (len(column) + 1) - prior.cdf(x)) ** 2
    return total / num_experts / sum(valid)


@pytest.mark.parametrize("key", TERMS)
@pytest.mark.parametrize("padded", [False, True])
def test_values_by_brute_force(key: str, padded: bool) -> None:
    valid_T = torch.arange(33) % 11 < torch.tensor([11, 4, 0]).repeat_interleave(11) if padded else None
    for score in (torch.relu, softmax):
        routing = routing_of(draw(33, 5), 3, valid_T, score)
        want = by_hand(TERMS[key], routing)
        assert float(value(TERMS[key], routing)) == pytest.approx(want, abs=1e-12)
        assert want > 1e-3


@pytest.mark.parametrize("key", TERMS)
def test_gradients_by_differences(key: str) -> None:
    """Of the target too, in locality: its gradient is not cut."""
    valid_T = torch.arange(16) < 13

    def loss(logits_TE: Tensor) -> Tensor:
        return value(TERMS[key], routing_of(logits_TE, 2, valid_T, softmax))

    logits_TE = draw(16, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, logits_TE)
    (grad_TE,) = torch.autograd.grad(loss(logits_TE), logits_TE)
    assert grad_TE[:13].abs().amin() > 1e-7
    assert not grad_TE[13:].any()


@pytest.mark.parametrize("key", EXACT)
@pytest.mark.parametrize("router", [None, ReLUOptions()], ids=["topk", "relu"])
def test_no_gradient_depends_on_the_split_or_on_recompute(key: str, router: ReLUOptions | None) -> None:
    chosen = {} if router is None else {"router": router}
    whole = gradients([TERMS[key]], B, **chosen)
    assert router_difference(whole, gradients([replace(TERMS[key], coef=0.0)], B, **chosen)) > 1e-5
    for micro, recompute in ((B, True), (2, False), (1, True)):
        assert_same(whole, gradients([TERMS[key]], micro, recompute, **chosen))


def test_micro_does_depend_on_the_micro_batch() -> None:
    whole, cut = (gradients([TERMS["dirichlet_micro"]], micro) for micro in (B, 2))
    assert router_difference(whole, cut) > 1e-5


@pytest.mark.parametrize("micro", [B, 2])
def test_a_follower_sees_the_loss_of_the_whole_step(micro: int) -> None:
    task = build(False, Meshes(), ReLUOptions())
    recorder = Recorder(list(task.parameters()))
    follower = LossFollower("chunk_sparsity", task.model.routers(), 9.0, every=1, hold=0)
    engine = NativeEngine(task, recorder)
    step = TrainStep(engine, [TERMS["chunk_sparsity"]], [follower], LossMonitor(), None, seed=2)
    whole = gradients([TERMS["chunk_sparsity"]], B, router=ReLUOptions()).figures
    want = sum(value for key, value in whole.items() if key.startswith("chunk_sparsity/"))
    step.run(3, cut(batch(), micro))
    assert float(follower.mean) == pytest.approx(want, abs=1e-12)
    follower.mean.mul_(0.5)  # so that the next step, of the same loss, doubles the coefficient
    before = recorder.gradients
    step.run(3, cut(batch(), micro))
    assert follower.factors() == {"chunk_sparsity": {1: pytest.approx(2.0), 2: pytest.approx(2.0)}}
    assert all(torch.equal(x, y) for x, y in zip(before, recorder.gradients, strict=True))
    step.run(3, cut(batch(), micro))
    apart = [float((x - y).abs().max()) for x, y in zip(before, recorder.gradients, strict=True)]
    assert max(apart) > 1e-5


@pytest.mark.parametrize("key", EXACT)
def test_nothing_is_counted_ahead(key: str) -> None:
    """No second forward pass, although the scope may say global_batch."""
    assert not TERMS[key].counts_ahead
    assert LossTerm("switch", 1.0, "global_batch").counts_ahead


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    num_experts=st.sampled_from([1, 2, 5, 11]),
    more=st.integers(0, 5),
    key=st.sampled_from(EXACT),
)
def test_padding_changes_nothing(lengths: list[int], num_experts: int, more: int, key: str) -> None:
    """The padded batch against its sequences one by one, cut to their lengths."""
    seq, batch, tokens = max(lengths) + more, len(lengths), sum(lengths)
    logits_TE = draw(batch * seq, num_experts).requires_grad_()
    valid_BS = torch.arange(seq) < torch.tensor(lengths)[:, None]
    padded = value(TERMS[key], routing_of(logits_TE, batch, valid_BS.view(-1), softmax), max(tokens, 1))
    alone = [logits_TE[b * seq : b * seq + n] for b, n in enumerate(lengths) if n]
    cut = [value(TERMS[key], routing_of(part, score=softmax), tokens) for part in alone]
    want = torch.stack([*cut, logits_TE.sum() * 0]).sum()
    torch.testing.assert_close(padded, want, rtol=0, atol=1e-12)
    (got_TE,), (want_TE,) = (torch.autograd.grad(loss, logits_TE) for loss in (padded, want))
    torch.testing.assert_close(got_TE, want_TE, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize("key", TERMS)
def test_a_micro_batch_without_tokens_adds_nothing(key: str, shape: tuple[int, int]) -> None:
    layer = MoELayer(3, 5, 7)
    loss = value(TERMS[key], layer(torch.randn(*shape, 3))[1], 5.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not layer.router.weight_ED.grad.any()


def test_neighbours_that_agree_have_the_least_locality_loss() -> None:
    """Equal and decided logits cost nothing, opposite ones their product; a row's end is no neighbour."""
    term = LossTerm("locality", 1.0, "global_batch")
    same = torch.tensor([[2.0, -2.0]]).repeat(5, 1)
    flipped = same * torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [1.0]])
    assert float(value(term, routing_of(same))) == pytest.approx(0, abs=1e-12)
    assert float(value(term, routing_of(flipped))) == pytest.approx(100 * 2 * 4 / 5)
    assert float(value(term, routing_of(torch.cat([same, -same]), 2))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("length", [1, 2, 5, 64])
def test_chunk_sparsity_lies_between_nobody_and_everybody(length: int) -> None:
    term = LossTerm("chunk_sparsity", 1.0, "global_batch", options=ChunkOptions(length))
    for dtype in (torch.float32, torch.float64):
        idle_TE = torch.full((33, 3), -1.0, dtype=dtype)
        assert float(value(term, routing_of(idle_TE, 3))) == 0
        assert float(value(term, routing_of(torch.zeros(33, 1, dtype=dtype) + 2, 3))) == pytest.approx(
            1, abs=2e-5
        )
        turns_TE = torch.eye(3, dtype=dtype).repeat(11, 1)  # each expert once in three tokens
        share = {1: 1 / 3, 2: (10 * 2 / 3 + 1 / 3) / 11, 5: (10 * 1 + 1 / 3) / 11, 64: 1}[length]
        assert float(value(term, routing_of(turns_TE, 3))) == pytest.approx(share, abs=2e-5)
        barely_TE = idle_TE.clone()
        barely_TE[7] = torch.tensor([1.0, 1e-6, 0.0])
        alone = float(value(term, routing_of(barely_TE[:, :1], 3)))
        both = float(value(term, routing_of(barely_TE[:, :2], 3)))
        assert both > 0
        assert both == pytest.approx(alone / 2, rel=1e-4)


def test_chunks_of_one_token_are_the_mean_score() -> None:
    routing = routing_of(draw(35, 5), 5)
    term = LossTerm("chunk_sparsity", 1.0, "global_batch", options=ChunkOptions(1))
    mean = float(probabilities(routing).mean())
    assert float(value(term, routing)) == pytest.approx((1 - 1e-5) * mean, abs=1e-12)


def test_a_chunk_ends_with_its_sequence() -> None:
    """Two sequences of one expert each: per chunk, half of the experts."""
    logits_TE = torch.eye(2).repeat_interleave(5, 0).double()
    term = LossTerm("chunk_sparsity", 1.0, "global_batch")
    assert float(value(term, routing_of(logits_TE, 2))) == pytest.approx(1 / 2, abs=1e-5)
    assert float(value(term, routing_of(logits_TE, 1))) == pytest.approx(1, abs=1e-5)


def test_options_come_from_the_configuration() -> None:
    config = [
        LossConfig("locality", 1.0, options={"steepness": 7}),
        LossConfig("chunk_sparsity", 1.0, options={"chunk_length": 5}),
        LossConfig("dirichlet", 1.0, LossScope.sequence, options={"alpha": 0.5}),
        LossConfig("dirichlet", 1.0, LossScope.micro),
    ]
    terms = make_terms(config)
    assert [t.options for t in terms] == [
        LocalityOptions(7.0),
        ChunkOptions(5),
        DirichletOptions(0.5),
        DirichletOptions(1.0),
    ]
    _, raw = total_loss({0: routing_of(draw(6, 3))}, terms, StepTotals(6.0))
    assert list(raw) == ["locality", "chunk_sparsity", "dirichlet_sequence", "dirichlet_micro"]


def test_what_is_missing_is_named() -> None:
    routing = routing_of(draw(6, 3))
    with pytest.raises(ValueError, match="returns no logits, so it has no locality loss"):
        value(TERMS["locality"], replace(routing, logits_TE=None))
    for key in ("chunk_sparsity", "dirichlet_micro"):
        with pytest.raises(ValueError, match="returns no scores"):
            value(TERMS[key], replace(routing, scores_TE=None))
    with pytest.raises(ValueError, match="scope=global_batch is not offered for dirichlet"):
        LossTerm("dirichlet", 1.0, "global_batch")
