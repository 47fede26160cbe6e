"""Layers that predict further tokens: loss and gradients against a loop over documents and depths, in fp64.

The oracle runs each document by itself and cuts its end off at every depth; nothing there rolls or masks.

Shapes: B sequences, S positions, n tokens of one document, E experts.
"""

from __future__ import annotations

from typing import Any

import plain_blocks as plain
import pytest
import torch
from invariance import Recorder
from model_cases import VOCAB, decoder
from torch import Tensor

from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.data import Batch
from moetrain.errors import UserError
from moetrain.models import Decoder
from moetrain.models.future import labels_ahead
from moetrain.models.future_options import FutureConfig
from moetrain.models.lora_options import LoraConfig
from moetrain.moe.balance import LossTerm
from moetrain.parallel.apply import parallelize
from moetrain.parallel.mesh import Meshes
from moetrain.train.engine import NativeEngine
from moetrain.train.future_options import FutureLossConfig
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.step import StepResult, TrainStep
from moetrain.train.task import NextToken
from moetrain.verify.batches import cut, mixed

B, S = 8, 11
LAYERS, WEIGHT = 2, 0.7
OPTIONS: dict[str, Any] = {
    "num_layers": 2,
    "first_dense": 1,
    "tie_embeddings": False,
    "future": FutureConfig(LAYERS),
}
SHARED = OPTIONS | {"future": FutureConfig(LAYERS, dense=True, shared_norm=True), "tie_embeddings": True}


def batch() -> Batch:
    """Uneven rows of two documents each, padding, rows and documents too short for any depth."""
    return mixed(B, S, VOCAB, seed=0)


def one_step(
    options: dict[str, Any], balance: float = 0.5, micro: int = B, recompute: bool = False
) -> tuple[StepResult, dict[str, Tensor]]:
    task = parallelize(NextToken(decoder(**options)), Meshes(), recompute=recompute)
    recorder = Recorder(list(task.parameters()))
    terms = [LossTerm("switch", balance, "global_batch")]
    future = FutureLossConfig(WEIGHT)
    step = TrainStep(NativeEngine(task, recorder), terms, [], LossMonitor(), None, seed=2, future=future)
    result = step.run(0, cut(batch(), micro))
    names = [name.removeprefix("model.") for name, _ in task.named_parameters()]
    grads = {n: g for n, g in zip(names, recorder.gradients, strict=True) if g is not None}
    return result, grads


def through(block: Any, model: Decoder, x: Tensor, read: list[Tensor]) -> Tensor:
    """One block over one document; ``read`` collects what its router reads."""
    x = plain.attended(model, block, x)
    y = plain.norm(block.feed_forward_norm, x)
    if hasattr(block.feed_forward, "router"):
        read.append(y[0])
    return x + plain.feed(block.feed_forward, y)


def switch(layer: Any, read: list[Tensor]) -> Tensor:
    """E sum_e f_e P_e over all tokens that the layer's router has read."""
    p_TE = (torch.cat(read) @ layer.router.weight_ED.T).softmax(-1)
    experts, top_k = p_TE.shape[1], layer.router.top_k
    chosen = p_TE.topk(top_k).indices.flatten().bincount(minlength=experts)
    return experts * (chosen / chosen.sum() * p_TE.mean(0)).sum()


def nats(state: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The sum over what is asked of one document's states, and how much that is."""
    losses = [
        (state_D @ head.T).logsumexp(0) - state_D @ head[label]
        for state_D, label in zip(state[0], labels.tolist(), strict=True)
        if label != -100
    ]
    return sum(losses, torch.zeros((), dtype=head.dtype)), len(losses)


def expected(model: Decoder, whole: Batch, balance: float) -> tuple[Tensor, list[float]]:
    """The step's whole loss, and the nats of the next token and of each depth."""
    blocks: list[Any] = list(model.blocks)
    own, cfg, head = model.cfg.num_layers, model.cfg, model.head_weight
    sums = [torch.zeros((), dtype=torch.float64)] * (LAYERS + 1)
    targets, read = [0] * (LAYERS + 1), [list[Tensor]() for _ in blocks]
    assert whole.doc_ids_BS is not None
    assert whole.valid_BS is not None
    for row in range(B):
        for document in (0, 1):
            at = ((whole.doc_ids_BS[row] == document) & whole.valid_BS[row]).nonzero().flatten()
            ids, labels = whole.input_ids_BS[row, at], whole.labels_BS[row, at]
            if not len(ids):
                continue
            x = model.embed_VD[ids][None]
            for place in range(own):
                x = through(blocks[place], model, x, read[place])
            state = plain.norm(model.norm, x)
            for depth in range(LAYERS + 1):
                if depth:
                    block, n = blocks[own + depth - 1], len(ids) - depth
                    if n < 1:
                        break
                    token = plain.norm(block.join.token_norm, model.embed_VD[ids[depth:]][None])
                    hidden = plain.norm(block.join.hidden_norm, state[:, :n])
                    x = torch.cat([token, hidden], -1) @ block.join.w_join_DC.T
                    x = through(block, model, x, read[own + depth - 1])
                    state = plain.norm(model.norm if cfg.future.shared_norm else block.norm, x)
                total, number = nats(state, head, labels[depth:])
                sums[depth], targets[depth] = sums[depth] + total, targets[depth] + number
    means = [total / number for total, number in zip(sums, targets, strict=True)]
    loss = means[0] + WEIGHT * sum(means[1:]) / LAYERS
    for block, inputs in zip(blocks, read, strict=True):
        if inputs:
            loss = loss + balance * switch(block.feed_forward, inputs)
    return loss, [mean.item() for mean in means]


@pytest.mark.parametrize(
    ("options", "balance"),
    [(OPTIONS, 0.0), (OPTIONS, 0.5), (SHARED, 0.0)],
    ids=["own norm, experts", "balanced", "shared norm, dense"],
)
def test_loss_and_gradients_are_those_of_a_loop_over_documents(options, balance):
    result, grads = one_step(options, balance)
    model = decoder(**options)
    loss, means = expected(model, batch(), balance)
    atol = 1e-8 if balance else 1e-12  # load shares are fp32
    assert [result.loss, *result.ahead] == pytest.approx(means, rel=1e-12)
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    assert len(grads) == len(wanted)
    for (name, _), grad in zip(model.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(grads[name], grad, rtol=1e-8, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        assert grad.any(), name


@pytest.mark.parametrize(("micro", "recompute"), [(2, False), (B, True)], ids=["accumulated", "recompute"])
def test_neither_accumulation_nor_recompute_changes_the_step(micro, recompute):
    (one, grads), (other, again) = one_step(OPTIONS), one_step(OPTIONS, 0.5, micro, recompute)
    assert [other.loss, *other.ahead] == pytest.approx([one.loss, *one.ahead], rel=1e-12)
    assert other.aux == {key: pytest.approx(values, rel=1e-12) for key, values in one.aux.items()}
    assert len(one.aux["switch_global_batch"]) == 1 + LAYERS
    for name, grad in grads.items():
        torch.testing.assert_close(
            again[name], grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_next_token_is_predicted_as_without_such_layers():
    whole, model = batch(), decoder(**OPTIONS)
    plain_model = decoder(**OPTIONS | {"future": FutureConfig()})
    plain_model.load_state_dict({n: model.state_dict()[n] for n in plain_model.state_dict()})
    arguments = {"doc_ids_BS": whole.doc_ids_BS, "positions_BS": whole.positions_BS}
    without, looking = (
        plain_model(whole.input_ids_BS, **arguments),
        model(whole.input_ids_BS, **arguments, look_ahead=True),
    )
    assert torch.equal(looking.hidden_BSD, without.hidden_BSD)
    assert list(looking.records) == [1, 2, 3]
    for output in (
        NextToken(model)(whole.input_ids_BS),
        NextToken(model)(whole.input_ids_BS, whole.labels_BS, per_token=True),
    ):
        assert list(output.records) == [1]  # logits and evaluation
        assert output.ahead_sums == ()


def test_low_rank_products_reach_what_joins_and_the_block():
    lora = LoraConfig(rank=2, targets=("*.join.w_*", "*.attention.w_q*"))
    names = [name for name, _ in decoder(**OPTIONS, lora=lora).named_parameters()]
    assert {"blocks.2.join.lora_w_join_DC.a_RK", "blocks.3.attention.lora_w_q_QD.a_RK"} <= set(names)


def test_the_weight_changes_once():
    assert [FutureLossConfig().at(step) for step in (0, 10**9)] == [0.3, 0.3]
    assert [FutureLossConfig(0.3, 0.1, 5).at(step) for step in (0, 4, 5, 9)] == [0.3, 0.3, 0.1, 0.1]


ON = "model.future.layers=1"
REFUSED = {
    "wiring": ([ON, "model.wiring=momentum"], "model.wiring=momentum"),
    "router input": ([ON, "model.router_input=pre_attention"], "model.router_input=pre_attention"),
    "widths": ([ON, "model.expert_widths=[3,3,3,3,3,3,3,512]"], "model.expert_widths="),
    "layer": ([ON, "model=peer"], "model.feed_forward=moe, not of peer"),
    "task": ([ON, "router=thor", "train.task=thor"], "train.task=next_token, not of thor"),
    "engine": ([ON, "engine=deepspeed"], "engine=deepspeed"),
    "replay": ([ON, "replay.record=/tmp/routes"], "replay.record=/tmp/routes"),
    "controller": ([ON, "router=relu", "balance=remoe"], "the controller sparsity"),
    "weight alone": (["train.future.weight=0.1"], "model.future.layers, which is 0"),
    "step alone": ([ON, "train.future.later_step=3"], "train.future.later_weight"),
    "range": (["model.future.layers=-1"], "model.future.layers=-1"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_proved_is_refused(case, monkeypatch):
    monkeypatch.setattr("moetrain.train.deepspeed.rules.is_installed", lambda name: True)
    overrides, line = REFUSED[case]
    with pytest.raises(UserError, match=r".") as refused:
        validate(compose_train(overrides))
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ids", [None, [4] * 6, [1, 1, 2, 1, 1, 1]], ids=["undivided", "one", "apart"])
def test_what_is_to_be_predicted_at_each_place(ids):
    seq, labels = 6, [10, 11, -100, 13, 14, 15]
    valid = [True] * 5 + [False]
    for depth in (1, 2, 3):
        wanted = []
        for i in range(seq):
            way = range(i, i + depth + 1)
            there = i + depth < seq and all(valid[j] and (ids is None or ids[j] == ids[i]) for j in way)
            wanted.append(labels[i + depth] if there else -100)
        ids_BS = None if ids is None else torch.tensor([ids])
        assert labels_ahead(depth, torch.tensor([labels]), torch.tensor([valid]), ids_BS).tolist() == [wanted]
        whole = labels_ahead(depth, torch.tensor([labels]), None, None).tolist()
        assert whole == [labels[depth:] + [-100] * depth]
