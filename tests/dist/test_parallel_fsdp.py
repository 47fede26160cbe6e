"""FSDP2 and HSDP against one process, in fp64: losses, gradients, norms and weights.

Shapes: B batch, S sequence, T = B S, D model, F hidden, E experts, V vocabulary.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from stand_in import PARTS, STEPS, Block, StandIn, loss_of, model, step_data
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.ops.local_part import local_part
from moetrain.parallel.apply import parallelize, reshard, sync_gradients
from moetrain.parallel.clip import clip_
from moetrain.parallel.distributed import all_reduce_sum_
from moetrain.parallel.mesh import Meshes, build_meshes
from moetrain.parallel.options import ParallelConfig
from moetrain.parallel.ranks import run_ranks
from moetrain.train.optim.build import build_optimizer
from moetrain.train.optim.options import AdamWConfig, MuonConfig, OptimConfig


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(
    rank: int,
    world: int,
    parallel: ParallelConfig,
    optim: OptimConfig,
    recompute: bool,
    evaluate: bool = False,
) -> dict[str, Any]:
    """STEPS clipped steps on this rank's parts; everything worth comparing, as whole tensors."""
    net = parallelize(model(), build_meshes(parallel, world), recompute=recompute)
    optimizer = build_optimizer(net, optim)
    losses, norms, grads = [], [], {}
    for step in range(STEPS):
        ids, labels = step_data(step)
        valid = int((labels != -100).sum())
        own = list(range(rank, PARTS, world))
        total = torch.zeros((), dtype=torch.float64)
        for part in own:
            sync_gradients(net, last=part == own[-1])
            loss = loss_of(net, ids[part], labels[part], valid)
            loss.backward()
            total += loss.detach()
        all_reduce_sum_(total)
        losses.append(float(total))
        if step == 0:
            grads = {name: full(p.grad) for name, p in net.named_parameters() if p.grad is not None}
        norms.append(float(clip_(net.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        if evaluate:
            with torch.no_grad():
                net(ids[0])
            reshard(net)
    weights = {name: full(p) for name, p in net.named_parameters()}
    return {"losses": losses, "norms": norms, "grads": grads, "weights": weights}


class ViewBlock(Block):
    def forward(self, x_BSD: Tensor, prev: Any = None) -> Any:
        y_BSD, routing = super().forward(x_BSD, prev)
        return y_BSD.view(y_BSD.shape), routing


def warned(rank: int, world: int) -> list[str]:
    net = model()
    net.blocks[0].__class__ = ViewBlock
    ids, labels = step_data(0)
    with warnings.catch_warnings(record=True) as caught:
        net = parallelize(net, build_meshes(ParallelConfig(), world))
        loss_of(net, ids[0], labels[0], 1).backward()
    return [text for warning in caught if "view" in (text := str(warning.message))]


def test_blocks_that_return_views_do_so_without_a_word():
    assert run_ranks(warned, 2) == [[], []]


ADAMW = AdamWConfig(lr=0.01)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return train(0, 1, ParallelConfig(), ADAMW, recompute=False)


def assert_equal_runs(results: list[dict[str, Any]], alone: dict[str, Any], tolerance: float = 1e-10) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(alone["losses"], abs=tolerance)
        assert result["norms"] == pytest.approx(alone["norms"], abs=tolerance)
        for kind in ("grads", "weights"):
            for name, expected in alone[kind].items():
                difference = (result[kind][name] - expected).abs().max()
                assert difference < tolerance, f"{kind} of {name} differ by {difference}"
        for name, weight in results[0]["weights"].items():
            assert torch.equal(result["weights"][name], weight), f"{name} differs between ranks"


@pytest.mark.parametrize(
    ("world", "layout", "recompute"),
    [
        (2, ParallelConfig(), False),
        (2, ParallelConfig(), True),
        (2, ParallelConfig(dp_replicate=2), False),
        (4, ParallelConfig(dp_replicate=2), True),
        (4, ParallelConfig(dp_shard=4), False),
    ],
    ids=["shard2", "shard2-recompute", "replicate2", "replicate2-shard2-recompute", "shard4"],
)
def test_every_layout_trains_like_one_process(alone, world, layout, recompute):
    assert alone["norms"][0] > 0.5, "the test must clip"
    assert_equal_runs(run_ranks(train, world, layout, ADAMW, recompute), alone)


class Narrow(nn.Module):
    """A block whose first matrix has two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))])

    def forward(self, x_TD: Tensor) -> Tensor:
        for block in self.blocks:
            x_TD = x_TD + block(x_TD)
        return x_TD


def narrow_gradients(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    torch.manual_seed(0)
    net = parallelize(Narrow().double(), build_meshes(ParallelConfig(), world))
    x_TD = torch.randn(12, 8, dtype=torch.float64).chunk(world)[rank]
    net(x_TD).square().sum().backward()
    named = dict(net.named_parameters())
    shapes = {name: tuple(local_part(p).shape) for name, p in named.items()}
    return {name: full(p.grad) for name, p in named.items() if p.grad is not None}, shapes


def test_fewer_rows_than_ranks_are_cut_by_columns():
    want, _ = narrow_gradients(0, 1)
    for got, shapes in run_ranks(narrow_gradients, 4):
        assert shapes["blocks.0.0.weight"] == (2, 2)
        assert shapes["blocks.0.1.weight"] == (2, 2)  # eight rows of two
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_evaluating_between_steps_changes_nothing(alone):
    assert_equal_runs(run_ranks(train, 2, ParallelConfig(), ADAMW, False, True), alone)


def test_recompute_alone_changes_nothing(alone):
    result = train(0, 1, ParallelConfig(), ADAMW, recompute=True)
    assert_equal_runs([result], alone, tolerance=1e-14)


def test_muon_on_shards_is_muon_on_whole_matrices():
    # Sums over ranks differ in the last bit of fp64; where that bit decides a rounding to bf16 an entry of
    # the iteration moves by 2^-8 of itself, so weights may differ by that times a step's size, lr = 0.02.
    optim = MuonConfig(lr=0.02, adamw_lr=0.01)
    alone = train(0, 1, ParallelConfig(), optim, recompute=False)
    before = model().state_dict()
    moved = max(float((alone["weights"][name] - before[name]).abs().max()) for name in before)
    assert moved > 0.01
    for layout in (ParallelConfig(), ParallelConfig(dp_replicate=2)):
        results = run_ranks(train, 2, layout, optim, False)
        assert_equal_runs(results, alone, tolerance=STEPS * 0.02 * 2**-7)


def test_recompute_runs_a_block_twice_and_keeps_less():
    calls, kept = [], []

    def count(net: StandIn) -> None:
        net.blocks[0].mix.register_forward_hook(lambda *_: calls.append(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = loss_of(net, *[t[0] for t in step_data(0)], 7)
        loss.backward()

    count(model())
    plain, kept_plain = len(calls), sum(kept)
    calls.clear(), kept.clear()
    count(parallelize(model(), Meshes(), recompute=True))
    assert (plain, len(calls)) == (1, 2)
    assert sum(kept) < kept_plain / 2


def names_on(rank: int, world: int) -> list[list[str]]:
    net = parallelize(
        model(), build_meshes(ParallelConfig(), world), recompute=True, compile=True, backend="eager"
    )
    loss_of(net, *[t[0] for t in step_data(0)], 7).backward()
    return [[name for name, _ in net.named_parameters()], list(net.state_dict())]


def test_no_layout_renames_a_parameter():
    expected = [[name for name, _ in model().named_parameters()], list(model().state_dict())]
    assert run_ranks(names_on, 2) == [expected] * 2


def test_compile_gives_the_same_gradients():
    nets = [model(), parallelize(model(), Meshes(), recompute=True, compile=True, backend="eager")]
    for net in nets:
        loss_of(net, *[t[0] for t in step_data(0)], 7).backward()
    for (name, plain), compiled in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        if plain.grad is not None:
            torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-12, atol=1e-12, msg=name)


def use_extra_on_one_rank(rank: int, world: int) -> Tensor:
    net = parallelize(model(), build_meshes(ParallelConfig(), world))
    ids, labels = step_data(0)
    out = net(ids[rank], use_extra=rank == 1)
    F.cross_entropy(net.logits(out.hidden_BSD).flatten(0, 1), labels[0].flatten()).backward()
    return full(net.unused.grad)


def test_a_parameter_unused_on_one_rank_gets_the_others_gradient():
    net = model()
    ids, labels = step_data(0)
    out = net(ids[1], use_extra=True)
    F.cross_entropy(net.logits(out.hidden_BSD).flatten(0, 1), labels[0].flatten()).backward()
    for grad in run_ranks(use_extra_on_one_rank, 2):
        torch.testing.assert_close(grad, net.unused.grad, rtol=1e-12, atol=1e-12)


def structure_of(rank: int, world: int) -> dict[str, Any]:
    net = model()
    net.blocks[0].mix.weight.of_mine = (4, 6)
    parallelize(net, build_meshes(ParallelConfig(), world))
    groups = {name: type(module).__name__ for name, module in net.named_modules()}
    before = [p.to_local().shape for p in net.parameters()]
    with torch.no_grad():
        net(step_data(0)[0][0])
    reshard(net)
    after = [p.to_local().shape for p in net.parameters()]
    return {"groups": groups, "attribute": net.blocks[0].mix.weight.of_mine, "resharded": before == after}


def test_routers_blocks_and_root_are_groups_of_their_own():
    for result in run_ranks(structure_of, 2):
        sharded = [name for name, kind in result["groups"].items() if kind.startswith("FSDP")]
        assert sharded == ["", "blocks.0", "blocks.0.router", "blocks.1", "blocks.1.router"]
        assert result["attribute"] == (4, 6)
        assert result["resharded"]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="named 'blocks'"):
        parallelize(nn.Linear(3, 3), Meshes())


def replicas_agree(rank: int, world: int) -> list[Tensor]:
    net = parallelize(model(), build_meshes(ParallelConfig(dp_replicate=2), world))
    optimizer = build_optimizer(net, ADAMW)
    for step in range(STEPS):
        ids, labels = step_data(step)
        loss_of(net, ids[rank], labels[rank], 29).backward()
        clip_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    locals_ = [p.to_local() for p in net.parameters()]
    peers = [[torch.empty_like(t) for _ in range(world)] for t in locals_]
    for mine, received in zip(locals_, peers, strict=True):
        dist.all_gather(received, mine)
    return [torch.stack(received) for received in peers]


def test_replicated_weights_are_bit_equal_on_all_ranks():
    for stacked in run_ranks(replicas_agree, 2)[0]:
        assert torch.equal(stacked[0], stacked[1])
