"""THOR: a task of two passes by other experts, against two plain forward passes by hand.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny
import torch
from model_cases import TINY, VOCAB

from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.models import Decoder
from moetrain.models.consistency_loss import symmetric_kl_sum
from moetrain.moe import RouterContext
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.moe.routers.thor import Level, ThorOptions
from moetrain.train.consistency import TwoPassTask
from moetrain.train.task import task_of

B, S = 3, 7
THOR = ["router=thor", "train.task=thor"]


def task_with(**options: object) -> TwoPassTask:
    torch.manual_seed(2)
    model = Decoder(TINY, ThorOptions(**options), ExpertsConfig(), VOCAB).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    task = task_of("thor")(model)
    assert isinstance(task, TwoPassTask)
    return task


def batch() -> tuple[torch.Tensor, torch.Tensor, RouterContext]:
    generator = torch.Generator().manual_seed(4)
    ids_BS = torch.randint(VOCAB, (B, S), generator=generator)
    labels_BS = torch.randint(VOCAB, (B, S), generator=generator)
    labels_BS[0, 2:4] = labels_BS[2, -1] = -100
    return ids_BS, labels_BS, replace(RouterContext.default(B, S), seed=5, step=6)


def test_the_loss_is_two_cross_entropies_and_their_distance():
    task = task_with(level=Level.token, consistency=1.7)
    ids_BS, labels_BS, ctx = batch()
    seen = []
    hook = task.model.register_forward_hook(lambda module, given, out: seen.append((given[1], out)))
    output = task(ids_BS, labels_BS, ctx)
    hook.remove()
    assert len(seen) == 2
    asked = [(b, s) for b in range(B) for s in range(S) if labels_BS[b, s] != -100]
    total = torch.zeros((), dtype=torch.float64)
    passes = [task.model.logits(task.model(ids_BS, given).hidden_BSD) for given, _ in seen]
    for b, s in asked:
        p_V, q_V = (logits_BSV[b, s].exp() / logits_BSV[b, s].exp().sum() for logits_BSV in passes)
        total = total - p_V[labels_BS[b, s]].log() - q_V[labels_BS[b, s]].log()
        either_way = (p_V * (p_V / q_V).log()).sum() + (q_V * (q_V / p_V).log()).sum()
        total = total + 1.7 * either_way / 2
    torch.testing.assert_close(output.loss_sum, total, rtol=1e-11, atol=0)
    parameters = list(task.model.parameters())
    ours = torch.autograd.grad(output.loss_sum, parameters, allow_unused=True)
    theirs = torch.autograd.grad(total, parameters, allow_unused=True)
    for mine, hand in zip(ours, theirs, strict=True):
        assert (mine is None) == (hand is None)
        if mine is not None:
            torch.testing.assert_close(mine, hand, rtol=1e-8, atol=1e-11)
    for layer, record in output.records.items():
        counted_E = sum(out.records[layer].assignment.counts_E for _, out in seen)
        assert torch.equal(record.demand_E, counted_E)
        assert torch.equal(record.computed_E, counted_E)
        assert int(counted_E.sum()) == 2 * B * S == 2 * int(record.num_tokens)


def test_a_step_trains_the_drawn_experts_and_no_others():
    task = task_with()
    ids_BS, labels_BS, ctx = batch()
    drawn, pairs = set(), 0
    for step in range(20):
        task.zero_grad()
        output = task(ids_BS, labels_BS, replace(ctx, step=step))
        output.loss_sum.backward()
        for layer, record in output.records.items():
            experts = task.model.blocks[layer].feed_forward.experts
            moved_E = experts.w_down_EFD.grad.flatten(1).norm(dim=1) > 0
            assert torch.equal(moved_E, record.demand_E > 0)
            assert 1 <= int(moved_E.sum()) <= 2
            pairs += int(moved_E.sum()) == 2
            drawn |= {(layer, e) for e in moved_E.nonzero().flatten().tolist()}
    assert len(drawn) > 2 * len(output.records)
    assert pairs > 10 * len(output.records)  # each pass draws for itself


def test_passes_by_the_same_experts_are_not_apart():
    """With one expert there is no other."""
    torch.manual_seed(2)
    model = Decoder(replace(TINY, num_experts=1), ThorOptions(), ExpertsConfig(), VOCAB).double()
    ids_BS, labels_BS, ctx = batch()
    once = TwoPassTask(model)(ids_BS, labels_BS, ctx).loss_sum
    nll_BS = TwoPassTask(model)(ids_BS, labels_BS, ctx, per_token=True).nll_BS
    torch.testing.assert_close(once, 2 * nll_BS.sum())


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_the_distance_by_chunks_is_that_of_all(chunk):
    torch.manual_seed(0)
    one, two = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    head_VD = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    labels_BS = torch.tensor([[1, -100, 2], [0, 5, -100]])
    ours = symmetric_kl_sum(one, two, head_VD, labels_BS, chunk)
    p_BSV, q_BSV = ((hidden @ head_VD.t()).log_softmax(-1) for hidden in (one, two))
    kl = torch.nn.functional.kl_div
    both_BSV = kl(q_BSV, p_BSV, reduction="none", log_target=True)
    both_BSV = both_BSV + kl(p_BSV, q_BSV, reduction="none", log_target=True)
    theirs = both_BSV[labels_BS != -100].sum() / 2
    torch.testing.assert_close(ours, theirs)
    inputs = (one, two, head_VD)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs))


def test_another_router_is_refused_and_the_plain_task_is_said():
    model = Decoder(TINY, RouterConfig("topk"), ExpertsConfig(), VOCAB)
    with pytest.raises(ValueError, match="here the router is topk: set router=thor"):
        task_of("thor")(model)
    dense = Decoder(replace(TINY, num_experts=0), RouterConfig(), ExpertsConfig(), VOCAB)
    with pytest.raises(ValueError, match=r"none: model\.num_experts=0"):
        task_of("thor")(dense)
    (said,) = [line for line in validate(compose_train(["router=thor"])) if "train.task" in line]
    assert said.startswith("router=thor is trained by train.task=thor in its paper")
    assert not [line for line in validate(compose_train(THOR)) if "train.task" in line]


@pytest.mark.real
@pytest.mark.usefixtures("training")
def test_it_trains_and_resumes_bit_for_bit(corpus, tmp_path):
    runs = [tmp_path / "whole", tmp_path / "halves", tmp_path / "recomputed"]
    options = [*THOR, "checkpoint.every=1", "checkpoint.keep_last=9"]
    assert tiny.train(corpus, runs[0], *options, "train.steps=3") == 0
    for steps in (2, 3):
        assert tiny.train(corpus, runs[1], *options, f"train.steps={steps}") == 0
    assert tiny.train(corpus, runs[2], *options, "train.steps=3", "train.recompute=true") == 0
    for other in runs[1:]:
        assert tiny.steps(other) == tiny.steps(runs[0])
        tiny.assert_same_state(tiny.checkpoint(other, 3), tiny.checkpoint(runs[0], 3))
    first = tiny.steps(runs[0])[0]
    assert first["train/loss"] > 1.9 * math.log(257)
    assert first["moe/0/experts_per_token"] == 2
