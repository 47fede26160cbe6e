"""Evaluation on held-out documents: exact sums over all ranks, in total and per domain.

Shapes: B batch, S sequence, M domains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from moetrain.data import Batch
from moetrain.errors import UserError
from moetrain.models.decoder import Decoder
from moetrain.moe import Router
from moetrain.parallel.distributed import all_reduce_sum_
from moetrain.train.log.diagnostics import RoutingDiagnostics
from moetrain.train.log.metrics import EvalSums
from moetrain.train.replay import Replay
from moetrain.train.task import Task, batch_arguments


@torch.no_grad()
def evaluate(
    task: Task,
    batches: Iterable[Batch],
    domains: Sequence[str],
    seed: int,
    byte_scale: float = 1.0,
    group: dist.ProcessGroup | None = None,
    replay: Replay | None = None,
    diagnostics: RoutingDiagnostics | None = None,
) -> tuple[EvalSums, dict[str, EvalSums]]:
    """The sums over all held-out tokens, and over those of each domain. All ranks call it together.

    Every rank must bring the same number of batches. ``byte_scale``: bytes of text for each byte of the
    tokens' own lengths (``PackedSplit.byte_scale``). Sums are over the ranks of ``group``; None: all ranks.
    The state of training does not change: no gradient, no router state, no random state. Raises UserError, on
    every rank, if no batch of any rank has a label. A task that an engine laid out is evaluated within the
    engine's ``forward_only``. ``replay``: records the experts that tokens take, or forces them.
    ``diagnostics`` gets the records of every batch.
    """
    device = next(task.parameters()).device
    sums = torch.zeros(3, max(len(domains), 1), dtype=torch.float64, device=device)  # nats, tokens, bytes
    replay = replay or Replay()
    was_training = task.training
    task.eval()
    try:
        for number, cpu_batch in enumerate(batches):
            batch = cpu_batch.to(device)
            forced = replay.forced(cpu_batch)
            output = task(**batch_arguments(batch, seed, step=0, forced=forced), per_token=True)
            replay.add(cpu_batch, output.records)
            if diagnostics is not None:
                diagnostics.add(output.records)
            replay.flush(f"batch_{number:08d}")
            asked_BS = batch.labels_BS != -100
            domain_n = batch.domain_ids_BS[asked_BS]
            for row, values_BS in enumerate((output.nll_BS, asked_BS, batch.byte_counts_BS)):
                sums[row].index_add_(0, domain_n, values_BS[asked_BS].double())
    finally:
        task.train(was_training)
    all_reduce_sum_(sums, name="the evaluation's losses", group=group)
    sums[2] *= byte_scale
    columns = sums.t().tolist()
    per_domain = {
        name: EvalSums(nats, int(tokens), round(size))
        for name, (nats, tokens, size) in zip(domains, columns, strict=False)
        if tokens
    }
    total = sums.sum(1).tolist()
    if not total[1]:
        raise UserError("evaluation: none of the tokens is to be predicted, so that there is no loss to tell")
    return EvalSums(total[0], int(total[1]), round(total[2])), per_domain


def other_modes(model: Decoder) -> tuple[str, ...]:
    """The modes of routing in evaluation other than the default one."""
    modes = (mode for router in _routers(model) for mode in router.eval_modes[1:])
    return tuple(dict.fromkeys(modes))


@contextlib.contextmanager
def routing_by(model: Decoder, mode: str) -> Iterator[None]:
    """A context in which routers evaluate by ``mode``; routers without that mode keep their default."""
    routers = [router for router in _routers(model) if mode in router.eval_modes]
    before = [router.eval_mode for router in routers]
    for router in routers:
        router.eval_mode = mode
    try:
        yield
    finally:
        for router, mode_before in zip(routers, before, strict=True):
            router.eval_mode = mode_before


def _routers(model: Decoder) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]
