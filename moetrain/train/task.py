"""The training task: a batch becomes a sum of losses, a count, and the routings of its MoE layers.

Shapes: B batch, S sequence, T = B S tokens, V vocabulary. Next-token prediction is the one task today.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from moetrain.data import Batch
from moetrain.models.cache import KVCache
from moetrain.models.decoder import Decoder
from moetrain.models.loss import cross_entropy_sum, token_nll
from moetrain.moe import RouterContext, RoutingRecord


class TaskOutput(NamedTuple):
    """A pytree, as FSDP2 wants of a module's output; what was not asked for is None."""

    nll_sum: Tensor | None
    nll_BS: Tensor | None
    logits_BSV: Tensor | None
    records: dict[int, RoutingRecord]  # a block's place -> what its layer told


class NextToken(nn.Module):
    """The root module of training: decoder and loss, so that FSDP gathers the head's weight once for both."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    @property
    def blocks(self) -> nn.ModuleList:
        """What ``parallelize`` wraps one by one."""
        return self.model.blocks

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
        """With labels: the summed loss in nats, or each token's (``per_token``, no gradient); else logits."""
        hidden_BSD, records = self.model(input_ids_BS, ctx, doc_ids_BS, positions_BS, cache, documents)
        if labels_BS is None:
            return TaskOutput(None, None, self.model.logits(hidden_BSD), records)
        if per_token:
            nll_BS = token_nll(hidden_BSD, self.model.head_weight, labels_BS)
            return TaskOutput(None, nll_BS, None, records)
        nll_sum, _ = cross_entropy_sum(hidden_BSD, self.model.head_weight, labels_BS)
        return TaskOutput(nll_sum, None, None, records)


def batch_arguments(
    batch: Batch, seed: int, step: int, group: dist.ProcessGroup | None = None
) -> dict[str, object]:
    """The keyword arguments of :class:`NextToken` for a batch (labels included).

    ``group``: the ranks whose tokens a router may couple; None: this one's.
    """
    rows, seq = batch.input_ids_BS.shape
    ctx = RouterContext(
        batch=rows,
        seq=seq,
        sample_ids_B=batch.sample_ids_B,
        token_ids_T=batch.input_ids_BS.reshape(-1),
        valid_T=None if batch.valid_BS is None else batch.valid_BS.reshape(-1),
        seed=seed,
        step=step,
        group=group,
    )
    return {
        "input_ids_BS": batch.input_ids_BS,
        "labels_BS": batch.labels_BS,
        "ctx": ctx,
        "doc_ids_BS": batch.doc_ids_BS,
        "positions_BS": batch.positions_BS,
        "documents": batch.documents,
    }
