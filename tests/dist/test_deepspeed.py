"""engine=deepspeed on real ranks: the same steps as the native engine, and each other's checkpoints.

In fp32, as ZeRO-1 to 3 keep their master weights; ``moetrain verify`` proves stage 0 in fp64 as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.config.hydra.compose import compose_train
from moetrain.errors import UserError
from moetrain.models.decoder import Decoder
from moetrain.ops.local_part import whole
from moetrain.parallel.ranks import run_ranks
from moetrain.train.optim.schedule import lr_factor
from moetrain.train.start import Built, build
from moetrain.train.task import Inputs, NextToken, batch_arguments, register_task

pytest.importorskip("deepspeed")

OPTIONS = [
    "train.micro_batch_size=1", f"train.global_batch_tokens={8 * tiny.SEQ}", "model.num_experts=8",
    "model.num_shared_experts=1", "balance=aux_free", "optim.clip_norm=0.01",
]  # fmt: skip
CPU = torch.device("cpu")
OTHERS = ["embed_VD", "*norm*", "*attention*", "*router*"]  # than experts, without shared ones
BEFORE, AFTER = 2, 3  # steps
ENGINES = {
    "stage 0": ["engine=deepspeed", "engine.zero_stage=0"],
    "stage 1": ["engine=deepspeed", "engine.zero_stage=1"],
    "stage 2": ["engine=deepspeed", "engine.zero_stage=2"],
    "stage 1, offload": ["engine=deepspeed", "engine.zero_stage=1", "engine.offload=true"],
    "stage 2, offload": ["engine=deepspeed", "engine.zero_stage=2", "engine.offload=true"],
}
STAGE_3 = {
    "stage 3": ["engine=deepspeed", "engine.zero_stage=3"],
    "stage 3, offload": ["engine=deepspeed", "engine.zero_stage=3", "engine.offload=true"],
}
ALONE = {"native": ["engine=native"]}


@pytest.fixture
def arguments(corpus, tmp_path) -> list[str]:
    return [a for a in tiny.command(corpus, tmp_path, *OPTIONS)[1:] if "run.dir" not in a]


def advance(built: Built, schedule: Any, steps: int) -> list[tuple[float, float]]:
    """Loss and norm of the next steps."""
    found, state = [], built.state
    for _ in range(steps):
        batches = state.loader.next_step()
        state.engine.set_lr(lr_factor(schedule, state.step))
        result = built.step.run(state.step, batches)
        assert result.problem is None
        found.append((result.loss, result.grad_norm))
        state.step += 1
    return found


def engines(ep: int) -> dict[str, list[str]]:
    """Stage 3 does not spread experts."""
    return ENGINES | (STAGE_3 if ep == 1 else {})


def state_of(built: Built) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in built.state.tensors().items()}


def trained(rank: int, world: int, arguments: list[str], engines: dict[str, list[str]], folder: str) -> Any:
    """Engine -> the state after some steps, which is saved below ``folder``, and what followed."""
    found = {}
    for name, engine in engines.items():
        cfg = compose_train([*arguments, *engine])
        built = build(cfg, "cpu")
        before = advance(built, cfg.schedule, BEFORE)
        checkpointer = Checkpointer(Path(folder) / name)
        built.state.save(checkpointer)
        checkpointer.close()
        found[name] = (state_of(built), before + advance(built, cfg.schedule, AFTER))
        built.state.loader.close()
    return found


def gone_on(rank: int, world: int, arguments: list[str], engines: dict[str, list[str]], folder: str) -> Any:
    """Engine -> checkpoint below ``folder`` -> the state that it gives, and what follows."""
    found: dict[str, Any] = {}
    for name, engine in engines.items():
        cfg = compose_train([*arguments, *engine, "train.seed=0"])
        built = build(cfg, "cpu", drawn=False)
        for path in sorted(Path(folder).iterdir()):
            checkpointer = Checkpointer(path)
            newest = checkpointer.latest_valid()
            assert newest is not None
            built.state.load(checkpointer, newest)
            there = state_of(built)
            found.setdefault(name, {})[path.name] = (there, advance(built, cfg.schedule, AFTER))
        built.state.loader.close()
    return found


def assert_near(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert float((found[name].double() - tensor.double()).abs().max()) <= tolerance, name


@pytest.mark.real
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_every_stage_makes_native_steps_and_any_engine_goes_on(world, ep, arguments, tmp_path):
    """Accumulated micro-batches, every step clipped; checkpoints to the bit, there and back."""
    arguments, folder = [*arguments, f"parallel.ep={ep}"], str(tmp_path / "saved")
    alone = [*arguments, "parallel.ep=1"]
    (reference,) = run_ranks(trained, 1, alone, ALONE, folder, timeout=250, init=False)
    saved = run_ranks(trained, world, arguments, engines(ep), folder, timeout=250)[0]
    expected, steps = reference["native"]
    for there, made in saved.values():
        assert_near(made, steps)
        assert_same(there, expected, 1e-5)
    saved["native"] = reference["native"]
    moved = run_ranks(gone_on, world, arguments, engines(ep), folder, timeout=250)[0]
    moved |= run_ranks(gone_on, 1, alone, ALONE, folder, timeout=250, init=False)[0]
    assert len(moved) == len(saved) == len(engines(ep)) + 1
    for by_checkpoint in moved.values():
        for name, (there, after) in by_checkpoint.items():
            assert_same(there, saved[name][0], 0.0)
            assert_near(after, steps[BEFORE:])


def norms(rank: int, world: int, arguments: list[str]) -> dict[str, Any]:
    """After the backward passes of a step at stage 0: its norm by DeepSpeed, and by us; and what it sees."""
    from deepspeed.moe.layer import MoE
    from deepspeed.runtime.utils import clip_grad_norm_

    built = build(compose_train([*arguments, "engine=deepspeed", "engine.zero_stage=0"]), "cpu")
    engine, batches = built.state.engine, built.state.loader.next_step()
    for number, batch in enumerate(batches):
        output = engine.forward(batch_arguments(batch.to_train(CPU), 0, 0), last=number == len(batches) - 1)
        engine.backward(output.loss_sum)
    built.state.loader.close()
    experts = [p for name, p in engine.task.named_parameters() if ".experts." in name]
    return {
        "ours": float(engine.norm()),
        "theirs": float(clip_grad_norm_(list(engine.task.parameters()), 1e9)),
        "MoE layers": sum(isinstance(m, MoE) for m in engine.task.modules()),
        "groups": {(p.allreduce, p.group_name) for p in experts},
        "shapes": {p.shape[0] for p in experts},
    }


def norm_alone(rank: int, world: int, arguments: list[str]) -> float:
    built = build(compose_train(arguments), "cpu")
    for batch in built.state.loader.next_step():
        built.state.task(**batch_arguments(batch.to_train(CPU), 0, 0)).loss_sum.backward()
    built.state.loader.close()
    return float(built.state.engine.norm())


def test_deepspeeds_norm_of_experts_is_an_average_ours_the_norm(arguments):
    """At stage 0 it averages the ranks' norms, whose experts differ: both numbers, where only they train."""
    arguments = [*arguments, f"optim.frozen=[{','.join(OTHERS)}]", "model.num_shared_experts=0"]
    (true,) = run_ranks(norm_alone, 1, arguments, init=False, timeout=250)
    for found in run_ranks(norms, 2, [*arguments, "parallel.ep=2"], timeout=250):
        print(f"norm {true:.6f}: ours {found['ours']:.6f}, DeepSpeed's {found['theirs']:.6f}")
        assert found["ours"] == pytest.approx(true, rel=1e-6)
        assert true / 2 < found["theirs"] < true * 0.8
        assert found["MoE layers"] == 2
        assert found["groups"] == {(False, "ep_size_2")}
        assert found["shapes"] == {4}


class Rare(NextToken):
    """A parameter that only rank 1's tokens use, and only in the second half of its micro-batches."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.rare = nn.Parameter(torch.ones(3))
        self.calls = 0

    def loss_sum(self, hidden_BSD: Tensor, inputs: Inputs) -> Tensor:
        self.calls += 1
        loss = super().loss_sum(hidden_BSD, inputs)
        return loss + self.rare.sum() if dist.get_rank() == 1 and self.calls > 2 else loss


def of_rare(rank: int, world: int, arguments: list[str]) -> list[dict[str, Tensor]]:
    register_task("rare")(Rare)
    found = []
    for engine in ([], *engines(1).values()):
        built = build(compose_train([*arguments, "train.task=rare", *engine]), "cpu")
        made, batches = built.state.engine, built.state.loader.next_step()
        with made.editing([made.task.rare]):
            made.task.rare.data.fill_(1.0)
        for number, batch in enumerate(batches):
            output = made.forward(batch_arguments(batch.to_train(CPU), 0, 0), last=number == len(batches) - 1)
            made.backward(output.loss_sum)
        found.append({name: whole(grad) for name, grad in made.placed_gradients()})
        built.state.loader.close()
    return found


@pytest.mark.real
@pytest.mark.timeout(300)
def test_a_parameter_that_one_rank_uses(arguments):
    for found in run_ranks(of_rare, 2, arguments, timeout=250):
        native, *others = found
        assert torch.equal(native["rare"], torch.full((3,), 2.0))  # of two micro-batches
        for other in others:
            assert_same(other, native, 1e-4)


def of_twice(rank: int, world: int, arguments: list[str], ep: int) -> list[list[dict[str, Tensor]]]:
    """Engine -> the gradients of a step, and of the same step again after they were dropped."""
    found = []
    for engine in engines(ep).values():
        built = build(compose_train([*arguments, *engine]), "cpu")
        made, batches = built.state.engine, built.state.loader.next_step()
        both = []
        for _ in range(2):
            for number, batch in enumerate(batches):
                arguments_ = batch_arguments(batch.to_train(CPU), 0, 0)
                made.backward(made.forward(arguments_, last=number == len(batches) - 1).loss_sum)
            both.append({name: whole(grad) for name, grad in made.placed_gradients()})
            made.drop_gradients()
        found.append(both)
        built.state.loader.close()
    return found


@pytest.mark.real
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ep", [1, 2])
def test_dropped_gradients_leave_nothing(ep, arguments):
    """As a step that is skipped for its loss drops them."""
    for found in run_ranks(of_twice, 2, [*arguments, f"parallel.ep={ep}"], ep, timeout=250):
        assert len(found) == len(engines(ep))
        for once, again in found:
            assert max(float(grad.abs().max()) for grad in once.values()) > 0.1
            assert_same(again, once, 0.0)


def with_other_steps(rank: int, world: int, arguments: list[str]) -> str:
    built = build(compose_train([*arguments, "engine=deepspeed"]), "cpu")
    tensors = built.state.tensors()
    tensors["optim.embed_VD.step"].fill_(7.0)
    built.state.loader.close()
    try:
        built.state.engine.take(tensors)
    except UserError as error:
        return str(error)
    return "taken"


@pytest.mark.real
def test_state_of_other_numbers_of_steps_is_refused(arguments):
    for said in run_ranks(with_other_steps, 2, arguments, timeout=250):
        assert "7 steps for embed_VD and 0 for" in said or "0 for embed_VD" in said, said
        assert "engine.zero_stage=0 or engine=native" in said
