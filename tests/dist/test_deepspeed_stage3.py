"""engine=deepspeed engine.zero_stage=3: what is whole when, weights that no token uses, and editing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.config.hydra.compose import compose_train
from moetrain.models.feed_forward import register_feed_forward
from moetrain.models.generate import generate
from moetrain.ops.init import Normal, parameter
from moetrain.ops.local_part import whole
from moetrain.parallel.ranks import run_ranks
from moetrain.train.optim.schedule import lr_factor
from moetrain.train.start import Built, build
from moetrain.train.task import batch_arguments

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

CPU = torch.device("cpu")
STAGE_3 = ["engine=deepspeed", "engine.zero_stage=3"]
OPTIONS = [
    "train.micro_batch_size=1", f"train.global_batch_tokens={8 * tiny.SEQ}", "model.num_layers=3",
    "optim.clip_norm=0.01",
]  # fmt: skip


@pytest.fixture
def arguments(corpus, tmp_path) -> list[str]:
    return [a for a in tiny.command(corpus, tmp_path, *OPTIONS)[1:] if "run.dir" not in a]


def built_by(arguments: list[str], *more: str) -> Built:
    return build(compose_train([*arguments, *more]), "cpu")


def advance(built: Built, arguments: list[str], steps: int) -> list[tuple[float, float]]:
    """Loss and norm of the next steps."""
    schedule, found, state = compose_train(arguments).schedule, [], built.state
    for _ in range(steps):
        batches = state.loader.next_step()
        state.engine.set_lr(lr_factor(schedule, state.step))
        result = built.step.run(state.step, batches)
        assert result.problem is None
        found.append((result.loss, result.grad_norm))
        state.step += 1
    return found


def gradients(built: Built) -> dict[str, Tensor]:
    """Of a step's backward passes, without its balance losses."""
    engine, batches = built.state.engine, built.state.loader.next_step()
    for number, batch in enumerate(batches):
        arguments = batch_arguments(batch.to_train(CPU), 0, 0)
        engine.backward(engine.forward(arguments, last=number == len(batches) - 1).loss_sum)
    found = {name: whole(grad) for name, grad in engine.placed_gradients()}
    built.state.loader.close()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name].double() - tensor.double()).abs().max()) < 1e-4, name


def whole_blocks(rank: int, world: int, arguments: list[str]) -> dict[str, Any]:
    """How many blocks are whole when a block begins, forward or backward, over some steps; and afterwards."""
    built = built_by(arguments)
    task, seen = built.state.task, {"forward": 0, "backward": 0}
    outside = [task.model.embed_VD, task.model.norm.weight_D]

    def count(way: str) -> None:
        whole = [any(p.numel() for p in block.parameters()) for block in task.blocks]
        seen[way] = max(seen[way], sum(whole))
        assert all(p.numel() for p in outside)

    for block in task.blocks:
        block.attention.register_forward_pre_hook(lambda *_: count("forward"))
        block.attention.register_full_backward_hook(lambda *_: count("backward"))
    left = []
    for _ in range(4):
        advance(built, arguments, 1)
        left.append(sum(p.numel() for p in task.parameters()))
    with built.state.engine.gathered():
        held = [p.numel() for p in outside]
    after = sum(p.numel() for p in task.parameters())
    shards = sum(w.numel() for w in built.state.engine.weights().values())
    built.state.loader.close()
    return {**seen, "left": left, "held": held, "after": after, "shards": shards}


@pytest.mark.parametrize("more", [[], ["train.recompute=true"]])
def test_weights_are_whole_only_while_they_are_used(more, arguments, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage3_prefetch_bucket_size": 0}}))
    arguments = [*arguments, *STAGE_3, f"engine.config={tmp_path}/own.json", *more]
    found = run_ranks(whole_blocks, 2, arguments, timeout=250)
    for one in found:
        assert (one["forward"], one["backward"]) == (1, 1)  # of three
        assert one["left"] == [0] * 4
        assert all(one["held"])
        assert one["after"] == 0
    total = sum(one["shards"] for one in found)
    assert abs(found[0]["shards"] - found[1]["shards"]) < total / 10


def first_and_later(rank: int, world: int, arguments: list[str], engines: list[list[str]]) -> Any:
    """Engine -> the first weights, steps, and all state after them."""
    found = []
    for engine in engines:
        built = built_by(arguments, *engine)
        first = {name: whole_of(tensor) for name, tensor in built.state.engine.model_tensors().items()}
        steps = advance(built, arguments, 3)
        found.append((first, steps, {name: whole_of(t) for name, t in built.state.tensors().items()}))
        built.state.loader.close()
    return found


def test_three_ranks_whose_last_pieces_are_padded(arguments):
    """First weights have the native engine's bits; a step has the same sums."""
    arguments = [*arguments, f"train.global_batch_tokens={6 * tiny.SEQ}"]
    for native, other in run_ranks(first_and_later, 3, arguments, [[], STAGE_3], timeout=250):
        assert native[0].keys() == other[0].keys()
        assert all(torch.equal(other[0][name], tensor) for name, tensor in native[0].items())
        assert other[1] == [pytest.approx(step, rel=1e-5, abs=1e-5) for step in native[1]]
        assert_close(other[2], native[2])


class Choosy(nn.Module):
    """Three experts of a weight each: rank 0 uses the first, rank 1 the second, and nobody the third."""

    def __init__(self, width: int) -> None:
        super().__init__()
        shape, initializer = (width, width), Normal(0.1)
        self.w_first_DD, self.w_second_DD = parameter(shape, initializer), parameter(shape, initializer)
        self.w_third_DD = parameter(shape, initializer)

    def forward(self, x_BSD: Tensor, ctx: Any = None) -> tuple[Tensor, None]:
        weight_DD = self.w_second_DD if dist.get_rank() else self.w_first_DD
        return x_BSD @ weight_DD, None


def of_choosy(rank: int, world: int, arguments: list[str], engines: list[list[str]]) -> Any:
    register_feed_forward("choosy", on_meta=True)(lambda cfg, router, experts, layer: Choosy(cfg.d_model))
    return [gradients(built_by(arguments, "model.feed_forward=choosy", *engine)) for engine in engines]


def test_experts_that_no_token_of_a_rank_takes(arguments):
    """Every rank gathers and sums them all the same, in one order."""
    engines = [[], STAGE_3, [*STAGE_3, "train.recompute=true"]]
    for native, *others in run_ranks(of_choosy, 2, [*arguments, "balance=none"], engines, timeout=250):
        firsts, seconds, thirds = (
            [grad for name, grad in native.items() if f".w_{which}_DD" in name]
            for which in ("first", "second", "third")
        )
        assert len(firsts) == 3
        assert all(grad.abs().max() > 1e-3 for grad in [*firsts, *seconds])
        assert not any(grad.any() for grad in thirds)
        for other in others:
            assert_close(other, native)


def of_frozen(rank: int, world: int, arguments: list[str], engines: list[list[str]]) -> Any:
    return [gradients(built_by(arguments, *engine)) for engine in engines]


@pytest.mark.parametrize("frozen", ["embed_VD", "blocks.0.*", "head_VD,norm.*,embed_VD,blocks.1.*norm*"])
def test_gradients_beside_frozen_weights(frozen, arguments):
    """With a frozen embedding the first block's input has no gradient."""
    engines = [[], STAGE_3]
    arguments = [*arguments, f"optim.frozen=[{frozen}]", "model.tie_embeddings=false"]
    for native, other in run_ranks(of_frozen, 2, arguments, engines, timeout=250):
        assert sum(bool(grad.any()) for grad in native.values()) > 10
        assert_close(other, native)


def with_other_ways(rank: int, world: int, arguments: list[str], engines: list[list[str]]) -> Any:
    """Engine -> steps between which the model is used without a backward pass."""
    found = []
    for engine in engines:
        built = built_by(arguments, *engine)
        made = built.state.engine
        steps = advance(built, arguments, 2)
        batch = built.state.loader.next_step()[0].to_train(CPU)
        with made.forward_only(), torch.no_grad():
            nats = made.task(**batch_arguments(batch, 0, 0), per_token=True).nll_BS
        with made.gathered():
            text = generate(made.task.model, [5, 7, 11], 5, temperature=0.0, seed=0, eos_id=0)
        steps += advance(built, arguments, 3)
        found.append((steps, nats, text))
        built.state.loader.close()
    return found


def test_evaluation_and_generation_between_steps(arguments, tmp_path):
    """Also with a JSON by which DeepSpeed keeps small weights whole, and others until their next use."""
    zero = {"stage3_param_persistence_threshold": 1000, "stage3_max_reuse_distance": 10**9}
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": zero}))
    engines = [[], STAGE_3, [*STAGE_3, f"engine.config={tmp_path}/own.json"]]
    for native, *others in run_ranks(with_other_ways, 2, arguments, engines, timeout=250):
        for steps, nats, text in others:
            assert steps == [pytest.approx(step, rel=1e-5, abs=1e-5) for step in native[0]]
            torch.testing.assert_close(nats, native[1], rtol=1e-5, atol=1e-5)
            assert text == native[2]


def woken(rank: int, world: int, arguments: list[str], engines: list[list[str]]) -> Any:
    """Engine -> steps of a router that writes to its own weights, and those weights."""
    found = []
    for engine in engines:
        built = built_by(arguments, *engine)
        steps = advance(built, arguments, 6)
        tensors = built.state.engine.model_tensors().items()
        found.append((steps, {name: whole_of(tensor) for name, tensor in tensors if ".router." in name}))
        built.state.loader.close()
    return found


def whole_of(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).clone()


def test_the_optimizer_goes_on_from_what_a_router_writes(arguments):
    engines = [[], *([f"engine.zero_stage={n}", "engine=deepspeed"] for n in range(4))]
    arguments = [*arguments, "router=dynmoe", "router.interval=2", "router.initial_experts=2"]
    for native, *others in run_ranks(woken, 2, arguments, engines, timeout=250):
        assert len(others) == 4
        for steps, weights in others:
            assert steps == [pytest.approx(step, rel=1e-5, abs=1e-5) for step in native[0]]
            assert_close(weights, native[1])


def steps_of(rank: int, world: int, arguments: list[str], engines: list[list[str]]) -> Any:
    """Engine -> the first steps."""
    found = []
    for engine in engines:
        built = built_by(arguments, *engine)
        found.append(advance(built, arguments, 3))
        built.state.loader.close()
    return found


@pytest.mark.parametrize("router", ["dynmoe", "noisy_topk"])
def test_losses_that_lead_into_a_block_by_its_record(router, arguments):
    """A penalty of the router's own weights, and a load that decides no assignment."""
    engines = [[], STAGE_3, [*STAGE_3, "train.recompute=true"]]
    for native, *others in run_ranks(steps_of, 2, [*arguments, f"router={router}"], engines, timeout=250):
        for other in others:
            assert other == [pytest.approx(step, rel=1e-5, abs=1e-5) for step in native]


def test_one_process(arguments):
    ((native, other),) = run_ranks(steps_of, 1, arguments, [[], STAGE_3], init=False, timeout=250)
    assert other == [pytest.approx(step, rel=1e-5, abs=1e-5) for step in native]
