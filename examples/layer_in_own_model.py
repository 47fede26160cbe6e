"""A MoELayer in a model of one's own, which learns to add neighbouring tokens. Run it: python THIS_FILE

Shapes: B batch, S sequence, D model, V vocabulary, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe import MoELayer, RouterContext, Routing

VOCAB, WIDTH, EXPERTS, BATCH, SEQ = 13, 32, 5, 8, 17
BIAS_STEP = 0.01


class Adder(nn.Module):
    """Experts see each token beside the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.moe = MoELayer(2 * WIDTH, 48, EXPERTS, router="sigmoid", router_options={"top_k": 2})
        self.head = nn.Linear(2 * WIDTH, VOCAB)

    def forward(self, ids_BS: Tensor, ctx: RouterContext) -> tuple[Tensor, Routing]:
        x_BSD = self.embed(ids_BS)
        pair_BSD = torch.cat([F.pad(x_BSD, (0, 0, 1, 0))[:, :-1], x_BSD], dim=-1)
        y_BSD, routing = self.moe(pair_BSD, ctx)
        return self.head(y_BSD), routing


def main(steps: int = 60) -> list[float]:
    """Train; returns the losses."""
    torch.manual_seed(0)
    model = Adder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        ids_BS = torch.randint(VOCAB, (BATCH, SEQ))
        sample_ids_B = torch.arange(BATCH) + step * BATCH  # a router's noise, if any, follows samples
        logits_BSV, routing = model(ids_BS, RouterContext(BATCH, SEQ, sample_ids_B, step=step))
        sums_BS = (ids_BS[:, 1:] + ids_BS[:, :-1]) % VOCAB
        loss = F.cross_entropy(logits_BSV[:, 1:].flatten(0, 1), sums_BS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # busy experts are chosen less: balance without a loss of its own
            load_E = routing.demand_E.float()
            model.moe.router.bias_E += BIAS_STEP * torch.sign(load_E.mean() - load_E)
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            print(f"step {step + 1:3}  loss {loss:.3f}  tokens of each expert {load_E.tolist()}")
    return losses


if __name__ == "__main__":
    main()
