"""A decoder in which every parameter has a gradient, since every token goes to every expert, and its data.

Shapes: B batch, S sequence, T = B S, D model, F hidden, E experts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.assignment import Assignment
from moetrain.moe.routing import Routing

V, D, HIDDEN, E, S = 23, 10, 7, 3, 11
PARTS, BATCH, STEPS = 8, 2, 3  # a step's data comes in PARTS micro-batches of BATCH sequences


class DenseRouter(nn.Module):
    is_router = True

    def __init__(self) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(torch.randn(E, D) * 0.5)

    def forward(self, x_TD: Tensor, prev: Routing | None) -> Routing:
        logits_TE = F.linear(x_TD, self.weight_ED)
        if prev is not None and prev.logits_TE is not None:
            logits_TE = logits_TE + 0.1 * prev.logits_TE
        tokens = x_TD.shape[0]
        return Routing(
            assignment=Assignment(
                token_ids_N=torch.arange(tokens).repeat(E),
                weights_N=logits_TE.softmax(-1).T.reshape(-1),
                counts_E=torch.full((E,), tokens),
            ),
            num_tokens_B=torch.tensor([tokens]),
            demand_BE=torch.full((1, E), tokens),
            logits_TE=logits_TE,
        )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)
        self.mix = nn.Linear(D, D)
        self.router = DenseRouter()
        self.w_up_EDF = nn.Parameter(torch.randn(E, D, HIDDEN) * 0.3)
        self.w_down_EFD = nn.Parameter(torch.randn(E, HIDDEN, D) * 0.3)

    def forward(self, x_BSD: Tensor, prev: Routing | None = None) -> tuple[Tensor, Routing]:
        x_TD = self.mix(self.norm(x_BSD)).reshape(-1, D)
        routing = self.router(x_TD, prev=prev)
        hidden_ETF = F.silu(torch.einsum("td,edf->etf", x_TD, self.w_up_EDF))
        y_ETD = torch.einsum("etf,efd->etd", hidden_ETF, self.w_down_EFD)
        y_TD = (y_ETD * routing.assignment.weights_N.view(E, -1, 1)).sum(0)
        return x_BSD + y_TD.view_as(x_BSD), routing


@dataclass(frozen=True)
class Output:
    hidden_BSD: Tensor
    records: list[Routing]


class StandIn(nn.Module):
    """Like the decoder: blocks, a result that holds Routings, and tied logits outside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.RMSNorm(D)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, ids_BS: Tensor, use_extra: bool = False) -> Output:
        x_BSD, records = self.embedding(ids_BS), []
        for block in self.blocks:
            x_BSD, routing = block(x_BSD, prev=records[-1] if records else None)
            records.append(routing)
        if use_extra:
            x_BSD = x_BSD * self.unused.mean()
        return Output(self.norm(x_BSD), records)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        return F.linear(hidden_BSD, self.embedding.weight)


def model() -> StandIn:
    torch.manual_seed(3)
    return StandIn().double()


def step_data(step: int) -> tuple[Tensor, Tensor]:
    """[PARTS, BATCH, S] inputs and labels; parts differ in valid tokens, and two have none at all."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, V, (PARTS, BATCH, S), generator=generator)
    labels = torch.randint(0, V, (PARTS, BATCH, S), generator=generator)
    for part in range(PARTS):
        labels[part, :, : part % 5] = -100
    labels[[1, 6]] = -100
    return ids, labels


def loss_of(net: StandIn, ids_BS: Tensor, labels_BS: Tensor, valid: int) -> Tensor:
    """Cross-entropy and a z-term of the routers, both sums over tokens divided by the step's valid tokens."""
    out = net(ids_BS)
    ce = F.cross_entropy(net.logits(out.hidden_BSD).flatten(0, 1), labels_BS.flatten(), reduction="sum")
    mask_T = (labels_BS.flatten() != -100).double()
    z = sum((r.logits_TE.logsumexp(-1).square() * mask_T).sum() for r in out.records)
    return (ce + 0.1 * z) / valid
