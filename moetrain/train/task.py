"""Training tasks: a batch becomes a sum of losses, and the records of its MoE layers; a registry of them.

Shapes: B batch, S sequence, T = B S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from moetrain.errors import UserError
from moetrain.models.cache import KVCache
from moetrain.models.decoder import Decoder
from moetrain.models.future import nll_sums
from moetrain.models.loss import cross_entropy_sum, token_nll
from moetrain.moe import RouterContext, RoutingRecord
from moetrain.nearest import nearest
from moetrain.ops.transfer import to_device

if TYPE_CHECKING:
    from moetrain.data import Batch


class TaskOutput(NamedTuple):
    """A pytree, as FSDP2 wants of a module's output; what was not asked for is None."""

    loss_sum: Tensor | None
    nll_BS: Tensor | None
    logits_BSV: Tensor | None
    records: dict[int, RoutingRecord]  # a block's place -> what its layer told
    ahead_sums: tuple[Tensor, ...] = ()  # of each layer that predicts further tokens, the sum of its nats


class Inputs(NamedTuple):
    """What a decoder read, and what is asked of each position: no loss where the label is IGNORE."""

    input_ids_BS: Tensor
    labels_BS: Tensor
    doc_ids_BS: Tensor | None
    positions_BS: Tensor | None
    documents: int | None


class Task(nn.Module):
    """The root module of training: decoder and loss, so that FSDP gathers the head's weight once for both.

    A task defines the loss of training; evaluation scores the next tokens of held-out text whichever task it
    is. Modules of a task besides the decoder are not in checkpoints: they must not be trained, and must be
    the same in every run.
    """

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    @property
    def blocks(self) -> nn.ModuleList:
        """What ``parallelize`` wraps one by one."""
        return self.model.blocks

    def loss_sum(self, hidden_BSD: Tensor, inputs: Inputs) -> Tensor:
        """The sum of all positions' losses, in nats; the step divides it by the global batch's labels."""
        raise NotImplementedError

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
        """With labels: the summed loss, or each token's nats (``per_token``, no gradient); else logits."""
        trains = labels_BS is not None and not per_token and self.model.cfg.future.layers > 0
        hidden_BSD, records, ahead = self.model(
            input_ids_BS, ctx, doc_ids_BS, positions_BS, cache, documents, look_ahead=trains
        )
        if labels_BS is None:
            return TaskOutput(None, None, self.model.logits(hidden_BSD), records)
        if per_token:
            nll_BS = token_nll(hidden_BSD, self.model.head_weight, labels_BS)
            return TaskOutput(None, nll_BS, None, records)
        inputs = Inputs(input_ids_BS, labels_BS, doc_ids_BS, positions_BS, documents)
        valid_T = None if ctx is None else ctx.valid_T
        valid_BS = None if valid_T is None else valid_T.view_as(labels_BS)
        sums = nll_sums(ahead, self.model.head_weight, labels_BS, valid_BS, doc_ids_BS)
        return TaskOutput(self.loss_sum(hidden_BSD, inputs), None, None, records, sums)


Builder = Callable[[Decoder], Task]
TASKS: dict[str, Builder] = {}


def register_task(name: str) -> Callable[[Builder], Builder]:
    """Decorator: make a :class:`Task`, or what builds one around a decoder, known as ``train.task``.

    The builder gets a decoder on the meta device, and may refuse it by a ValueError with a message of one
    line. A second use of a name is an error.
    """

    def add(builder: Builder) -> Builder:
        if TASKS.setdefault(name, builder) is not builder:
            raise ValueError(f"task {name!r} is registered already")
        return builder

    return add


def task_of(name: str) -> Builder:
    """The builder of the task ``name``. Raises UserError for one that is not known."""
    if name not in TASKS:
        raise UserError(
            f"train.task={name} is not known{nearest(name, TASKS)}; a plugin's task needs plugins=[package] "
            "on the command line"
        )
    return TASKS[name]


class NextToken(Task):
    """Cross-entropy of the label, the token that follows."""

    def loss_sum(self, hidden_BSD: Tensor, inputs: Inputs) -> Tensor:
        nll_sum, _ = cross_entropy_sum(hidden_BSD, self.model.head_weight, inputs.labels_BS)
        return nll_sum


register_task("next_token")(NextToken)


@register_task("thor")
def _two_passes(model: Decoder) -> Task:
    from moetrain.train.consistency import TwoPassTask  # which is a Task

    return TwoPassTask(model)


def batch_arguments(
    batch: Batch,
    seed: int,
    step: int,
    group: dist.ProcessGroup | None = None,
    forced: Mapping[int, Tensor] | None = None,
) -> dict[str, object]:
    """The keyword arguments of a :class:`Task` for a batch (labels included).

    ``group``: the ranks whose tokens a router may couple; None: this rank alone. ``forced``: the experts that
    tokens must take, by layer (``RouterContext.forced``), on any device.
    """
    device = batch.input_ids_BS.device
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
        forced=None if forced is None else {n: to_device(ids_TK, device) for n, ids_TK in forced.items()},
        domain_ids_T=None if batch.token_domains_BS is None else batch.token_domains_BS.reshape(-1),
    )
    return {
        "input_ids_BS": batch.input_ids_BS,
        "labels_BS": batch.labels_BS,
        "ctx": ctx,
        "doc_ids_BS": batch.doc_ids_BS,
        "positions_BS": batch.positions_BS,
        "documents": batch.documents,
    }
