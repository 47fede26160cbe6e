"""THOR's task: a step's tokens pass twice, by other experts, and both predictions are held together.

Zuo et al. 2022, arXiv:2110.04260: the loss is the cross entropy of both passes and a weight times half the
Kullback-Leibler divergences between their predictions, either way.

Shapes: B batch, S sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moetrain.models.cache import KVCache
from moetrain.models.consistency_loss import symmetric_kl_sum
from moetrain.models.decoder import Decoder
from moetrain.models.loss import cross_entropy_sum
from moetrain.moe import RouterContext, RoutingRecord
from moetrain.moe.routers.thor import ThorOptions
from moetrain.moe.routing import register_record
from moetrain.train.task import Task, TaskOutput

_SECOND = 0x7403_0000  # what the second pass adds to the seed of its draws


@dataclass(frozen=True, kw_only=True)
class TwoPasses(RoutingRecord):
    """The record of a layer that computed every token twice: ``demand_BE`` and what follows are sums.

    sums_2E  int64, assignments computed, and the demand that capacity granted.
    """

    sums_2E: Tensor

    @property
    def computed_E(self) -> Tensor:
        return self.sums_2E[0]

    @property
    def granted_E(self) -> Tensor:
        return self.sums_2E[1]


register_record(TwoPasses)


class TwoPassTask(Task):
    """Cross entropy of both passes, and their distance times ``router.consistency``.

    Two passes of the decoder are kept for one backward pass: twice the memory of activations, and twice the
    compute. Held-out text passes once. Raises ValueError where experts are not drawn by chance.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        options = [router.options for router in model.routers().values()]
        drawn = [one for one in options if isinstance(one, ThorOptions)]
        if not drawn or len(drawn) < len(options):
            names = ", ".join(sorted({one.name for one in options})) or "none: model.num_experts=0"
            raise ValueError(
                f"both passes are of experts by chance, and here the router is {names}: set router=thor, or "
                "train.task=next_token"
            )
        self.weight = drawn[0].consistency

    def forward(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor | None = None,
        ctx: RouterContext | None = None,
        doc_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        cache: KVCache | None = None,
        per_token: bool = False,
        documents: int | None = None,
    ) -> TaskOutput:
        """With labels: the summed loss of both passes, or each token's nats of one; else its logits."""
        if labels_BS is None or per_token:
            return super().forward(
                input_ids_BS, labels_BS, ctx, doc_ids_BS, positions_BS, cache, per_token, documents
            )
        if ctx is None:
            batch, seq = input_ids_BS.shape
            ctx = RouterContext.default(batch, seq, input_ids_BS.device)
        arguments = (doc_ids_BS, positions_BS, None, documents)
        one = self.model(input_ids_BS, ctx, *arguments)
        two = self.model(input_ids_BS, replace(ctx, seed=ctx.seed + _SECOND), *arguments)
        head_VD = self.model.head_weight
        hidden = (one.hidden_BSD, two.hidden_BSD)
        loss = cross_entropy_sum(hidden[0], head_VD, labels_BS)[0]
        loss = loss + cross_entropy_sum(hidden[1], head_VD, labels_BS)[0]
        if self.weight:
            loss = loss + self.weight * symmetric_kl_sum(*hidden, head_VD, labels_BS)
        records: dict[int, RoutingRecord] = {
            layer: _both(record, two.records[layer]) for layer, record in one.records.items()
        }
        return TaskOutput(loss, None, None, records)


def _both(one: RoutingRecord, two: RoutingRecord) -> TwoPasses:
    return TwoPasses(
        num_tokens_B=one.num_tokens_B,
        demand_BE=one.demand_BE + two.demand_BE,
        valid_T=one.valid_T,
        sums_2E=torch.stack([one.computed_E + two.computed_E, one.granted_E + two.granted_E]),
    )
