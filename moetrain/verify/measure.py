"""What one rank, or one process alone, does with the twin, and everything that came of it.

Findings: scenario -> quantity -> what this rank holds of it. A quantity's kind stands before its first colon:
``loss``, ``norm``, ``gradient``, ``weight``, ``state``, ``bits``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.data import Batch
from moetrain.models.decoder import Decoder
from moetrain.moe.assign import ALL
from moetrain.moe.routers import ROUTERS
from moetrain.ops.init import (
    Constant,
    EqualRows,
    Normal,
    Orthogonal,
    Uniform,
    initializer_of,
    set_initializer,
)
from moetrain.ops.local_part import whole
from moetrain.ops.low_rank import is_factor
from moetrain.plugins import import_plugins
from moetrain.train.assemble import Assembled, assemble
from moetrain.train.options import Precision, TrainConfig
from moetrain.train.state import state_tensors
from moetrain.train.step import StepResult
from moetrain.verify.batches import Scenario, cut, mixed, scenarios, without_targets
from moetrain.verify.part import Part, part_of
from moetrain.verify.twin import SEQ, VOCAB, Twin

Findings = dict[str, dict[str, Part]]
Wholes = dict[str, dict[str, Tensor]]  # the same of whole tensors
_T = TypeVar("_T")

DEMAND = "state: demand of each expert"
STEPS, MORE_STEPS = 3, 2  # before the checkpoint, and after it
_SEED = 2


def measure(rank: int, world: int, twin: Twin, folder: Path) -> Findings:
    """Gradients of every scenario, then optimizer steps; leaves a checkpoint of step 3 in ``folder``."""
    cfg = _prepare(twin, world)
    split = partial(_split, twin, rank, world)
    found = _gradients(build(cfg), twin, split)
    recompute = not twin.cfg.train.recompute  # of the layout: the process alone never does by itself
    other = replace(cfg, train=replace(cfg.train, recompute=recompute))
    again = _cases(twin)[0]
    name = f"{again.name}, recompute {'on' if recompute else 'off'}"
    found[name] = _one_step(build(other), split(again.whole, 2), part_of)
    made = build(cfg)
    found[f"{STEPS} steps"] = _steps(made, twin, split, range(STEPS))
    tensors = state_tensors(made.engine, made.controllers)
    found["checkpoint"] = _parts("bits", tensors)
    checkpointer = Checkpointer(folder)
    checkpointer.save(STEPS, tensors, {})
    checkpointer.close()
    found[f"{STEPS + MORE_STEPS} steps"] = _steps(made, twin, split, _later())
    return found


def measure_each(rank: int, world: int, twins: Sequence[Twin], folders: Sequence[Path]) -> list[Findings]:
    """:func:`measure` of one twin after the other."""
    return [measure(rank, world, twin, folder) for twin, folder in zip(twins, folders, strict=True)]


def resume_each(rank: int, world: int, twins: Sequence[Twin], folders: Sequence[Path]) -> list[Findings]:
    """:func:`resume` of one twin after the other."""
    return [resume(rank, world, twin, folder) for twin, folder in zip(twins, folders, strict=True)]


def measure_and_resume_each(
    rank: int, world: int, twins: Sequence[Twin], folders: Sequence[Path], others: Sequence[Path]
) -> list[tuple[Findings, Findings]]:
    """Both of one twin after the other; ``others``: the checkpoints to resume from, which are there."""
    return [
        (measure(rank, world, twin, folder), resume(rank, world, twin, other))
        for twin, folder, other in zip(twins, folders, others, strict=True)
    ]


def measure_rounded(rank: int, world: int, twin: Twin) -> Wholes:
    """Gradients of every scenario in bf16, and each expert's demand."""
    cfg = _prepare(twin, world)
    made = build(replace(cfg, train=replace(cfg.train, precision=Precision.bf16)))
    found: Wholes = {}
    for case in _cases(twin):
        found[case.name] = _one_step(made, _split(twin, rank, world, case.whole, case.micro_batches), whole)
    return found


def resume(rank: int, world: int, twin: Twin, folder: Path) -> Findings:
    """A model of other weights takes the checkpoint in ``folder`` over, and goes on."""
    cfg = _prepare(twin, world)
    made = build(replace(cfg, train=replace(cfg.train, seed=cfg.train.seed + 1)))
    tensors = state_tensors(made.engine, made.controllers)
    checkpointer = Checkpointer(folder)
    path = checkpointer.latest_valid()
    assert path is not None
    checkpointer.load(path, tensors)
    made.engine.take(tensors)
    found = {"checkpoint": _parts("bits", tensors)}
    found[f"{STEPS + MORE_STEPS} steps"] = _steps(made, twin, partial(_split, twin, rank, world), _later())
    return found


def _cases(twin: Twin) -> list[Scenario]:
    alone = ROUTERS[twin.cfg.router.name].cls.causal
    return scenarios(twin.sequences, SEQ, VOCAB, twin.world, alone)


def _prepare(twin: Twin, world: int) -> TrainConfig:
    torch.set_num_threads(1)
    # gathering a whole tensor in two collectives is slow, it says; here it is meant
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    torch.use_deterministic_algorithms(twin.cfg.train.deterministic)
    import_plugins(twin.cfg.plugins)
    return twin.cfg if world > 1 else twin.alone()


def build(cfg: TrainConfig) -> Assembled:
    world = math.prod((cfg.parallel.dp_replicate, cfg.parallel.dp_shard or 1))
    made = assemble(cfg, VOCAB, "cpu", world, enlarge_initializers)
    made.step.seed = _SEED
    return made


def enlarge_initializers(model: Decoder) -> None:
    """Larger weights than a model begins with, and none zero, so that every path matters.

    Factors of products stay as they are: two enlarged ones would outgrow the matrix.
    """
    for name, parameter in model.named_parameters():
        more = 5.0 if parameter.ndim > 1 and not is_factor(name) else 1.0
        initializer = initializer_of(parameter)
        if isinstance(initializer, Orthogonal):
            set_initializer(parameter, Orthogonal(more * initializer.gain))
        elif isinstance(initializer, (Normal, EqualRows)):
            set_initializer(parameter, type(initializer)(more * initializer.std))
        elif isinstance(initializer, Constant):
            set_initializer(
                parameter, Constant(more * initializer.value) if initializer.value else Normal(more * 0.1)
            )
        elif isinstance(initializer, Uniform):  # a range is meant as it is
            continue
        else:
            _enlarge_values(parameter, more)


@torch.no_grad()
def _enlarge_values(parameter: nn.Parameter, more: float) -> None:
    if not parameter.any():
        parameter.normal_(std=0.1)
    parameter.mul_(more)


def _split(twin: Twin, rank: int, world: int, whole: Batch, micro_batches: int) -> list[Batch]:
    """This rank's micro-batches. One process alone takes all at once, unless a loss is of micro-batches."""
    share = whole.sample_ids_B.shape[0] // twin.world
    by_micro = any(loss.scope.name == "micro" for loss in twin.cfg.balance.losses)
    if twin.cfg.router.group == ALL:  # couples the whole step
        micro_batches = 1
    if world > 1 or by_micro:
        return cut(whole, share // micro_batches, rank, world)
    return [whole]


_Split = Callable[[Batch, int], list[Batch]]


def _gradients(made: Assembled, twin: Twin, split: _Split) -> Findings:
    found: Findings = {}
    cases = _cases(twin)
    for case in cases:
        found[case.name] = _one_step(made, split(case.whole, case.micro_batches), part_of)
    terms = made.step.terms
    made.step.needs_targets = False
    for term in terms:
        made.step.terms = [term]
        found[f"loss {term.key} alone"] = _one_step(made, split(without_targets(cases[0].whole), 1), part_of)
    made.step.terms, made.step.needs_targets = terms, True
    return found


def _one_step(made: Assembled, batches: list[Batch], take: Callable[[Tensor], _T]) -> dict[str, _T]:
    """Figures and gradients of one step, which leaves the weights alone, as ``take`` copies them."""
    step, found = made.step, dict[str, _T]()

    def record() -> None:
        found["norm: largest"] = take(made.engine.norm(math.inf))
        for name, grad in made.engine.placed_gradients():
            found[f"gradient: {name.removeprefix('model.')}"] = take(grad)

    update, clip = step.update, step.clip_norm
    step.update, step.clip_norm = record, None
    result = step.run(0, batches)
    step.update, step.clip_norm = update, clip
    demand = list(result.routing.demand.values())
    figures = _figures(result) | {DEMAND: torch.cat(demand) if demand else torch.zeros(0)}
    return {name: take(value) for name, value in figures.items()} | found


def _steps(made: Assembled, twin: Twin, split: _Split, numbers: range) -> dict[str, Part]:
    """Optimizer steps of two micro-batches and of one in turn, and the weights and states after them."""
    found: dict[str, Part] = {}
    for number in numbers:
        whole = mixed(twin.sequences, SEQ, VOCAB, seed=number + 10)
        result = made.step.run(number, split(whole, 2 - number % 2))
        found |= {f"{key} of step {number}": part_of(value) for key, value in _figures(result).items()}
    return found | _parts("weight", state_tensors(made.engine, made.controllers))


def _later() -> range:
    return range(STEPS, STEPS + MORE_STEPS)


def _figures(result: StepResult) -> dict[str, Tensor]:
    """Losses as of the whole step, and both norms."""
    figures = {"loss: nats": result.loss, "norm: L2": result.grad_norm, "loss: tokens": float(result.tokens)}
    figures |= {f"loss: nats {depth} ahead": nats for depth, nats in enumerate(result.ahead, 1)}
    for key, values_L in result.aux.items():
        values = zip(result.routing.layers, values_L, strict=True)
        figures |= {f"loss: {key} in layer {layer}": value for layer, value in values}
    figures |= {f"state: {key}": value for key, value in result.routing.metrics().items()}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}


def _parts(kind: str, tensors: dict[str, Tensor]) -> dict[str, Part]:
    return {f"{kind}: {name}": part_of(tensor) for name, tensor in tensors.items()}
