"""A dense decoder's tensors become those of an MoE decoder that computes the same. Run it: python THIS_FILE

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moetrain.models import Decoder
from moetrain.models.options import ModelConfig
from moetrain.moe.options import ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.upcycle import CopyOptions, Target, upcycle

VOCAB = 61
DENSE = ModelConfig(d_model=24, num_layers=3, num_heads=4, d_ff=40, num_experts=0)
MOE = replace(DENSE, num_experts=5, d_ff_expert=40, first_dense=1)  # the first layer stays dense


def logits(model: Decoder, ids_BS: Tensor) -> Tensor:
    """[B, S, V]."""
    logits_BSV: Tensor = model(ids_BS).hidden_BSD @ model.head_weight.t()
    return logits_BSV


@torch.no_grad()
def main() -> float:
    """Upcycle and compare; returns the largest difference of any logit, over the largest logit."""
    torch.manual_seed(0)
    router, experts = TopKOptions(top_k=2), ExpertsConfig()
    dense = Decoder(DENSE, router, experts, VOCAB).double().eval()
    made = upcycle(dense.state_dict(), Target(MOE, router, experts), CopyOptions(), seed=0)
    moe = Decoder(MOE, router, experts, VOCAB).double().eval()
    moe.load_state_dict(made.state)
    ids_BS = torch.randint(VOCAB, (2, 17))
    expected_BSV, found_BSV = logits(dense, ids_BS), logits(moe, ids_BS)
    off = ((found_BSV - expected_BSV).abs().max() / expected_BSV.abs().max()).item()
    counts = [sum(p.numel() for p in model.parameters()) for model in (dense, moe)]
    print(f"{counts[0]:,} parameters became {counts[1]:,}; {made.reason}")
    print(f"function kept: {made.preserves}; logits differ by {off:.1e} of the largest")
    return off


if __name__ == "__main__":
    main()
