"""One optimizer step: micro-batches, balance losses, one gradient rule, clip, update, controllers.

Shapes: L MoE layers, E experts of one layer. What is a mapping goes by a layer's place in the decoder.

The gradient rule: every loss is divided by the step's global count before its backward pass, and gradients
are summed over micro-batches and ranks. Nothing is averaged, so no layout changes what a step does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.data import Batch
from moetrain.errors import TrainingError, UserError
from moetrain.models.options import future_layers, moe_layers
from moetrain.moe import Router, RoutingRecord
from moetrain.moe.balance import (
    Controller,
    LossTerm,
    Measured,
    StepTotals,
    all_factors,
    count_ahead,
    total_loss,
)
from moetrain.ops.local_part import local_part
from moetrain.ops.transfer import to_device
from moetrain.parallel.distributed import all_reduce_sum_, rank
from moetrain.parallel.watchdog.flight_recorder import watched
from moetrain.train.engine import Engine
from moetrain.train.future import FutureLoss, counts_ahead
from moetrain.train.future_options import FutureLossConfig
from moetrain.train.log.metrics import RoutingStats, RoutingSummary
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.replay import Replay
from moetrain.train.task import batch_arguments

_Counts = dict[str, dict[int, Tensor]]  # name -> a tensor a layer, by its place
_Forced = Mapping[int, Tensor] | None  # the experts that a micro-batch's tokens must take, by layer


@dataclass(frozen=True)
class StepResult:
    """What one step did. ``problem`` is a phrase where something was not finite or spiked, else None."""

    loss: float  # nats per target token, of the global batch
    grad_norm: float
    tokens: int  # target tokens and all others, of the global batch
    aux: dict[str, list[float]]
    routing: RoutingSummary
    control: dict[str, float]  # figures of controllers, by name
    messages: list[str]  # of controllers, for the user
    problem: str | None
    applied: bool  # the update was made; with a problem: it broke the weights
    ahead: tuple[float, ...] = ()  # nats per target of each layer that predicts further tokens


class TrainStep:
    """Runs optimizer steps on an engine's task; holds no state of its own beyond what it was given.

    ``group``: the ranks whose tokens add up to the step's; None: all ranks.
    """

    def __init__(
        self,
        engine: Engine,
        terms: Sequence[LossTerm],
        controllers: Sequence[Controller],
        monitor: LossMonitor,
        clip_norm: float | None,
        seed: int,
        group: dist.ProcessGroup | None = None,
        future: FutureLossConfig | None = None,
    ) -> None:
        self.engine, self.task, self.terms, self.controllers = engine, engine.task, terms, controllers
        self.monitor, self.clip_norm, self.seed = monitor, clip_norm, seed
        self.group = group or (dist.group.WORLD if dist.is_initialized() else None)
        self.needs_targets = True  # a proof about balance losses alone has none
        self.update = engine.update  # a proof about gradients looks at them instead
        self.device = next(self.task.parameters()).device
        self.stats = RoutingStats(self.device)
        self._routers = self.task.model.routers()
        self._freezing = [m for m in self.task.modules() if isinstance(m, Router) and m.freezes]
        self._router_stats: dict[int, Tensor] = {}
        self._measured = Measured(controllers)
        self.replay = Replay()
        self._has_moe_layers = bool(moe_layers(self.task.model.cfg))
        places = future_layers(self.task.model.cfg)
        self._future = FutureLoss(future or FutureLossConfig(), places, self.device)
        self._signals: _Counts = {}  # of controllers for losses, on the device, as the step begins

    def run(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """Step number ``step`` (from 0) on this rank's micro-batches; all ranks call it together."""
        targets, tokens = self._global_counts(batches)
        if not targets and self.needs_targets:
            raise TrainingError(
                f"step {step + 1}: none of its {tokens} tokens is to be predicted, so that it has no loss: "
                "its sequences hold nothing but ends of documents"
            )
        forced = [self.replay.forced(batch) for batch in batches]
        batches = [batch.to_train(self.device) for batch in batches]
        signals = {name: tensors for c in self.controllers for name, tensors in c.signals().items()}
        self._signals = _to_device(signals, self.device)
        ahead = self._has_moe_layers and any(term.counts_ahead and term.is_on(step) for term in self.terms)
        counts = self._count_ahead(step, batches, forced) if ahead and len(batches) > 1 else None
        self._router_stats = {}
        self._measured.clear()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        aux_sums: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            arguments = batch_arguments(batch, self.seed, step, self.group, forced[index])
            output = self.engine.forward(arguments, last=index == len(batches) - 1)
            assert output.loss_sum is not None  # a batch has labels
            extra, raw = self._balance(step, tokens, output.records, counts)
            loss = output.loss_sum / max(targets, 1)
            for part in (extra, self._future.add(step, output.ahead_sums)):
                loss = loss if part is None else loss + part
            self.engine.backward(loss)
            loss_sum += output.loss_sum.detach()
            records = {layer: record.detach() for layer, record in output.records.items()}
            self.stats.add(records)
            self._measured.add(records)
            self.replay.add(batch, records)
            self._add_router_stats(output.records)
            for key, values_L in raw.items():
                aux_sums[key] = aux_sums[key] + values_L if key in aux_sums else values_L.clone()
        self.replay.flush(f"step_{step + 1:08d}.rank_{rank(self.group):05d}")
        self._drop_frozen_gradients(step)
        return self._finish(loss_sum, aux_sums, targets, tokens)

    def _finish(self, loss_sum: Tensor, aux_sums: dict[str, Tensor], targets: int, tokens: int) -> StepResult:
        ahead_K = self._future.sums_K
        all_reduce_sum_(loss_sum, *aux_sums.values(), ahead_K, name="the losses", group=self.group)
        routing = self.stats.reduce(self.group)
        norm = self.engine.clip(self.clip_norm)
        # The first of two waits: whether to update at all. What else is read of the step comes along.
        total, norm, sums_F, ahead_K, *aux_L = _on_host(
            [loss_sum, norm, routing.sums_F, ahead_K, *aux_sums.values()]
        )
        routing, aux_sums = replace(routing, sums_F=sums_F), dict(zip(aux_sums, aux_L, strict=True))
        loss, grad_norm = float(total) / max(targets, 1), float(norm)
        problem = self.monitor.check(loss, grad_norm)
        applied = problem is None
        if problem is None:
            self.update()
            for controller in self.controllers:
                controller.update(routing.demand, float(tokens), aux_sums)
            self._follow_measured()
            self._update_routers()
            problem = self._broken_weights()
        elif not math.isfinite(grad_norm):
            name = self._first_not_finite(list(self.engine.gradients().values()))
            problem += f"; first parameter with a gradient that is not finite: {name}" if name else ""
        self.engine.drop_gradients()
        aux = {key: values_L.tolist() for key, values_L in aux_sums.items()}
        control = {k: v for controller in self.controllers for k, v in controller.metrics().items()}
        messages = [line for controller in self.controllers if applied for line in controller.messages()]
        ahead = self._future.means(ahead_K.tolist())
        return StepResult(loss, grad_norm, tokens, aux, routing, control, messages, problem, applied, ahead)

    def _global_counts(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """(target tokens, valid tokens) of the whole step; layers that look ahead have their own."""
        layers = len(self._future.places)
        rows = [[b.num_targets, _valid_tokens(b), *counts_ahead(b, layers)] for b in batches]
        counts = torch.tensor(rows, dtype=torch.int64).sum(0)
        all_reduce_sum_(counts, name="the step's tokens", group=self.group)
        self._future.start(counts[2:].tolist())
        return int(counts[0]), int(counts[1])

    def _add_router_stats(self, records: Mapping[int, RoutingRecord]) -> None:
        """Sum what routers want of the whole step, where they want anything."""
        for layer, record in records.items():
            if record.stats is not None:
                before = self._router_stats.get(layer)
                self._router_stats[layer] = record.stats.clone() if before is None else before + record.stats

    def _follow_measured(self) -> None:
        if sums := self._measured.tensors():
            all_reduce_sum_(*sums, name="what controllers measure", group=self.group)
            self._measured.follow()

    def _drop_frozen_gradients(self, step: int) -> None:
        """Where ranks share parameters, an unused one has a gradient of zeros, by which it would decay."""
        for router in self._freezing:
            for parameter in router.frozen(step):
                parameter.grad = None

    def _update_routers(self) -> None:
        if self._router_stats:
            stats = self._router_stats.values()
            all_reduce_sum_(*stats, name="the routers' statistics", group=self.group)
            changed = [p for layer in self._router_stats for p in self._routers[layer].parameters()]
            # a collective of those that put sharded parameters together
            with self.engine.editing(changed), watched("the routers' update", "all_gather"):
                for layer, of_layer in self._router_stats.items():
                    self._routers[layer].after_step(of_layer)

    def _balance(
        self, step: int, tokens: int, records: Mapping[int, RoutingRecord], counts: _Counts | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What :func:`total_loss` gives; UserError where a layer's router cannot have a loss."""
        with _as_user_error():
            if counts is None:  # one micro-batch: its own forward has the counts
                counts = self._summed(step, [records])
            factors = all_factors(self.controllers)
            ahead = self._future.layer_tokens
            totals = StepTotals(max(tokens, 1), counts, self._signals, factors, step, ahead)
            return total_loss(records, self.terms, totals)

    @torch.no_grad()
    def _count_ahead(self, step: int, batches: Sequence[Batch], forced: Sequence[_Forced]) -> _Counts:
        """The step's load before its first backward pass: one forward without gradient per micro-batch."""
        records = [
            self.task(**batch_arguments(b, self.seed, step, self.group, ids)).records
            for b, ids in zip(batches, forced, strict=True)
        ]
        with _as_user_error():
            return self._summed(step, records)

    @torch.no_grad()
    def _summed(self, step: int, records: Sequence[Mapping[int, RoutingRecord]]) -> _Counts:
        """What the losses count ahead, over the global batch."""
        counts = count_ahead(records, self.terms, step)
        of_layers = [tensor for by_layer in counts.values() for tensor in by_layer.values()]
        all_reduce_sum_(*of_layers, name="the experts' load", group=self.group)
        return counts

    @torch.no_grad()
    def _broken_weights(self) -> str | None:
        """What the update broke, as a phrase; None where all weights are finite: one norm tells.

        The second wait of a step.
        """
        weights = list(self.engine.weights().values())
        norms = torch._foreach_norm([w for w in weights if w.numel()])
        broken = torch.zeros((), dtype=torch.int64, device=self.device)
        if norms:  # a rank may hold no weights
            broken = (~torch.stack(norms).isfinite()).any().long()
        all_reduce_sum_(broken, name="whether all weights are finite")
        name = self._first_not_finite(weights) if int(broken) else None
        return None if name is None else f"the update made {name} not finite"

    def _first_not_finite(self, tensors: Sequence[Tensor | None]) -> str | None:
        """The first parameter whose tensor (its own or its gradient) is not finite on any rank."""
        local = [t if t is None else local_part(t) for t in tensors]
        flags = torch.tensor([t is not None and not bool(t.isfinite().all()) for t in local]).long()
        all_reduce_sum_(flags, name="what is not finite")
        names = [name.removeprefix("model.") for name, _ in self.task.named_parameters()]
        return next((name for name, flag in zip(names, flags.tolist(), strict=True) if flag), None)


def _to_device(given: Mapping[str, Mapping[int, Tensor]], device: torch.device) -> _Counts:
    """The same tensors on ``device``: those of another in one copy, the rest as they are."""
    tensors = [tensor for by_layer in given.values() for tensor in by_layer.values()]
    away = [tensor for tensor in tensors if tensor.device.type != device.type]
    flat = to_device(torch.cat([tensor.reshape(-1) for tensor in away]), device) if away else None
    parts = iter(() if flat is None else flat.split([tensor.numel() for tensor in away]))
    return {
        name: {
            layer: next(parts).view(tensor.shape) if tensor.device.type != device.type else tensor
            for layer, tensor in by_layer.items()
        }
        for name, by_layer in given.items()
    }


@contextlib.contextmanager
def _as_user_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"balance.losses: {error}") from None


def _on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """fp64 copies of their shapes, in one host synchronisation."""
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _valid_tokens(batch: Batch) -> int:
    return batch.input_ids_BS.numel() if batch.valid_BS is None else int(batch.valid_BS.sum())
