"""What one rank of a large job holds: rank 0 is built and stepped in one process, without data or memory.

    python benchmarks/rank_memory.py --world 1024 experiment=qwen3_30b_a3b parallel.ep=64 [KEY=VALUE ...]

Options are those of ``moetrain train``. The process group is torch's fake one, tensors are fake (shapes
without memory) and on the CPU; model, layout, losses, clipping and optimizer are the trainer's own. Tokens go
to experts in turn, so that the numbers of rows are known without any value. What is counted: docs/memory.md.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rehearsal import AloneTracker, Collectives, Rehearsal, Tracker, deal_in_turn, nbytes, tell_counts
from timing import machine, write_json
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.data import Batch
from moetrain.errors import UserError
from moetrain.models.count import abstract_decoder, count_parameters
from moetrain.ops.cpu.product import product
from moetrain.parallel.materialize import allocate
from moetrain.train.assemble import Assembled, build_task, with_step
from moetrain.train.engine import NativeEngine, lay_out
from moetrain.train.optim.adamw_8bit import tables
from moetrain.train.optim.build import build_optimizer
from moetrain.train.optim.options import AdamW8bitConfig
from moetrain.train.options import Precision, TrainConfig

GATHERED = "Unsharded Param"  # FSDPMemTracker's names
ACTIVATIONS = "Activation"


def by_owner(named: Iterable[tuple[str, Tensor | None]]) -> dict[str, int]:
    """Bytes on this rank: the experts', and all others'."""
    sums = {"experts": 0, "others": 0}
    for name, tensor in named:
        sums["experts" if ".experts." in name else "others"] += 0 if tensor is None else nbytes(tensor)
    return sums


def micro_batch(cfg: TrainConfig, world: int) -> Batch:
    """One micro-batch of full rows, each one document. UserError where a rank's share of a step is more."""
    seq, asked = cfg.data.seq_len, cfg.train.micro_batch_size
    share = cfg.train.global_batch_tokens // (seq * world)
    if share > asked:
        raise UserError(
            f"train.global_batch_tokens={cfg.train.global_batch_tokens} are {share} sequences a rank, "
            f"and only a step of one micro-batch is measured: set train.micro_batch_size={share}, "
            f"or train.global_batch_tokens={asked * seq * world}"
        )
    ids_BS = torch.zeros(share, seq, dtype=torch.int64)
    return Batch(ids_BS, ids_BS, None, None, ids_BS[:, 0], ids_BS, ids_BS, None, ids_BS.numel())


def build(cfg: TrainConfig, world: int, fake: FakeTensorMode | None) -> Assembled:
    """What the trainer assembles, without drawing values, its step rehearsed.

    Without ``fake`` the tensors are real and hold whatever the memory held.
    """
    if cfg.model.vocab_size is None:
        raise UserError("model.vocab_size=null is the tokenizer's, and there is none here: set a number")
    task, counts = build_task(cfg, cfg.model.vocab_size, "cpu")
    data = lay_out(task, cfg, "cpu", world)
    with fake or nullcontext():
        allocate(task, "cpu")
        engine = NativeEngine(task, build_optimizer(task, cfg.optim), data)
        made = with_step(cfg, engine, counts, partial(Rehearsal, world=world))
    for (layer,) in task.model.moe_layers().values():
        deal_in_turn(layer)
        if fake is not None:
            tell_counts(layer, micro_batch(cfg, world).input_ids_BS.numel())
    return made


def measure(cfg: TrainConfig, world: int, fake: FakeTensorMode | None) -> dict[str, Any]:
    """Bytes of this rank's first step, by kind. ``fake`` None: real tensors, over the real process group."""
    made = build(cfg, world, fake)
    assert isinstance(made.engine, NativeEngine)
    task, optimizer = made.task, made.engine.optimizer
    after_forward: list[dict[str, int]] = []
    with fake or nullcontext():
        batch = micro_batch(cfg, world)
        tracked = Tracker if isinstance(task, FSDPModule) else AloneTracker
        with tracked(task, optimizer) as tracker, Collectives() as collectives:
            hook = task.register_forward_hook(lambda *_: after_forward.append(snapshot(tracker, "current")))
            made.step.run(0, [batch])
        hook.remove()
        # Untracked: the tracker takes the global shapes that DTensor reasons about for memory.
        optimizer.step()
    parameters = dict(task.named_parameters())
    state = [(name, value) for name, p in parameters.items() for value in optimizer.state.get(p, {}).values()]
    return {
        "parameters": by_owner(parameters.items()),
        "gradients": by_owner((name, p.grad) for name, p in parameters.items()),
        "optimizer": by_owner(state),
        "activations": after_forward[0][ACTIVATIONS],
        "gathered": max((snap.get(GATHERED, 0) for snap in module_snapshots(tracker)), default=0),
        "peak": snapshot(tracker, "peak"),
        "collectives": {k: {"calls": n, "bytes": collectives.bytes[k]} for k, n in collectives.calls.items()},
    }


def snapshot(tracker: MemTracker, kind: str) -> dict[str, int]:
    """Bytes by the tracker's names."""
    return named(tracker.get_tracker_snapshot(kind)[torch.device("cpu")])


def module_snapshots(tracker: MemTracker) -> Iterable[dict[str, int]]:
    """What the tracker saw before and after each FSDP module gathered, computed and gave back."""
    for stats in tracker.memory_tracking.values():
        for snaps in stats.snapshots.values():
            yield from (named(snap[torch.device("cpu")]) for snap in snaps)


def named(device_snapshot: dict[Any, int]) -> dict[str, int]:
    return {getattr(key, "value", key): size for key, size in device_snapshot.items()}


def rehearse(cfg: TrainConfig, world: int) -> dict[str, Any]:
    """:func:`measure` of rank 0 of ``world``, with nothing real. UserError where a step needs values."""
    if world < 1:
        raise UserError(f"--world={world} is no number of ranks: give 1 or more")
    validate(cfg, world)
    # Whether oneDNN's product may be used is found out with values, once a process.
    product(torch.ones(2048, 2), torch.ones(2, 1024))
    if isinstance(cfg.optim, AdamW8bitConfig):
        tables(torch.device("cpu"))  # likewise
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        # allow_non_fake_inputs: the meta tensors that become fake ones, and the meshes' rank tables
        return measure(cfg, world, FakeTensorMode(allow_non_fake_inputs=True))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"this configuration reads a value on the host ({error.func}), and fake tensors have none: "
            "leave out capacities, rounds (experts.max_rows_per_rank) and the like"
        ) from None
    finally:
        dist.destroy_process_group()


def even_shares(cfg: TrainConfig, world: int) -> dict[str, float]:
    """Bytes a rank if every parameter were cut into equal parts, one for each rank that shares a copy."""
    assert cfg.model.vocab_size is not None
    ranks = world // cfg.parallel.dp_replicate
    counts = count_parameters(abstract_decoder(cfg.model, cfg.router, cfg.experts, cfg.model.vocab_size))
    size = 8 if cfg.train.precision is Precision.fp64 else 4
    return {
        "experts": counts.experts * size / ranks,
        "others": (counts.total - counts.experts) * size / ranks,
    }


def show(cfg: TrainConfig, world: int, found: dict[str, Any], seconds: float) -> None:
    def row(title: str, *sizes: float) -> None:
        print(f"{title:34}" + "".join(f"{size / 2**20:14,.2f}" for size in sizes))

    t = cfg.train
    print(f"rank 0 of {world}, ep {cfg.parallel.ep}, {t.precision.value}, recompute {t.recompute}; MiB")
    print(f"{'':34}{'experts':>14}{'others':>14}{'together':>14}")
    shares = even_shares(cfg, world)
    for title, sizes in (
        ("parameters, if split evenly", shares),
        ("parameters", found["parameters"]),
        ("gradients", found["gradients"]),
        ("optimizer state", found["optimizer"]),
    ):
        row(title, *sizes.values(), sum(sizes.values()))
    row("activations kept for backward", found["activations"])
    row("gathered parameters, at most", found["gathered"])
    peak = found["peak"]
    row("peak of forward and backward", peak["Total"])
    for kind, size in peak.items():
        if size and kind != "Total":
            row(f"  of it {kind.lower()}", size)
    row("the same from the second step on", peak["Total"] + sum(found["optimizer"].values()))
    for kind, c in found["collectives"].items():
        print(f"{kind:34}{c['bytes'] / 2**20:14,.2f} in {c['calls']} calls")
    print(
        f"{seconds:.1f} s, {time.process_time():.1f} s of processor time with imports, "
        f"on {machine()['cpu']}, {torch.get_num_threads()} thread(s)"
    )


def main() -> int:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as moetrain train takes them")
    parser.add_argument("--world", type=int, default=1024, help="ranks of the job")
    parser.add_argument("--out")
    args = parser.parse_args()
    try:
        cfg = compose_train(args.overrides)
        found = rehearse(cfg, args.world)
    except UserError as error:
        print(f"rank_memory: error: {error}", file=sys.stderr)
        return error.exit_code
    seconds = time.perf_counter() - started
    show(cfg, args.world, found, seconds)
    write_json(args.out, {"machine": machine(), "world": args.world, "seconds": seconds, **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
