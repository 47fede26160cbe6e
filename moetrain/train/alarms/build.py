"""The alarms of a config: what they need of the model and its layout, and what each suggests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from moetrain.models.count import Flops
from moetrain.models.decoder import Decoder
from moetrain.moe.balance import CONTROLLERS
from moetrain.moe.routers import ROUTERS, Router
from moetrain.train.alarms.routing import Ranks
from moetrain.train.alarms.watch import AlarmWatch
from moetrain.train.options import TrainConfig


def build_alarms(cfg: TrainConfig, model: Decoder, flops: Flops) -> AlarmWatch:
    """The watch over a run of ``cfg``; ``model`` may be laid out over ranks already."""
    share = flops.experts / flops.forward if flops.forward else 0.0
    routers = list(model.routers().values())
    return AlarmWatch(cfg.alarms, partial(suggestion, cfg, routers), _ranks(model, cfg.parallel.ep), share)


def suggestion(cfg: TrainConfig, routers: Sequence[Router], alarm: str) -> str | None:
    """An override of ``moetrain train`` that may help against an alarm; None where there is none."""
    if alarm == "loss_spike":
        factor = cfg.alarms.loss_spike
        return f"train.on_nonfinite=rollback train.spike_factor={factor:g}" if factor else None
    if alarm == "large_logits":
        balances = all(router.has_logits for router in routers)
        has_z = any(loss.name == "z" for loss in cfg.balance.losses)
        return "balance=switch" if balances and not has_z else f"optim.lr={cfg.optim.lr / 2:g}"
    if alarm in ("collapse", "dead_experts", "imbalance_cost", "low_entropy"):
        return _balance(cfg, routers)
    return None


def _balance(cfg: TrainConfig, routers: Sequence[Router]) -> str | None:
    """A balance that these routers can have and the run has not, else a router that balances itself.

    Neither where layers have a choice of their own and take no router.
    """
    moved = any(CONTROLLERS[name].moves_bias for name in cfg.balance.controllers)
    if all(router.reads_bias and router.has_scores for router in routers) and not moved:
        return "balance=aux_free"
    losses = {loss.name for loss in cfg.balance.losses}
    if all(router.has_scores and router.has_logits for router in routers) and "switch" not in losses:
        return "balance=switch"
    chosen = all(type(router) is ROUTERS[cfg.router.name].cls for router in routers)
    return "router=topk_sigmoid balance=aux_free" if chosen else None


def _ranks(model: Decoder, ep: int) -> Ranks:
    """The experts of each rank of ``parallel.ep``, by layer; those without a network have none."""
    ranks = {}
    for place, layers in model.moe_layers().items():
        for layer in layers if ep > 1 else ():
            each = layer.experts.num_experts // ep
            ranks[place] = [range(rank * each, (rank + 1) * each) for rank in range(ep)]
    return ranks
