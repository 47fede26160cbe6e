"""Low-rank products that upcycling draws beside a dense model's matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_cases import VOCAB, tokens
from upcycle_cases import SEED, config, dense_state, experts_config, target

from moetrain.models import Decoder
from moetrain.models.lora_options import LoraConfig
from moetrain.moe.options import ExpertKind
from moetrain.moe.routers.topk import TopKOptions
from moetrain.ops.low_rank import is_factor
from moetrain.upcycle import AdaptersOptions, CopyOptions, LowRankOptions, upcycle

LORA = LoraConfig(rank=3, targets=("*.attention.w_*", "*.feed_forward.w_*", "*.experts.w_*=2"))
OPTIONS = {
    ExpertKind.adapters: AdaptersOptions,
    ExpertKind.low_rank: LowRankOptions,
    ExpertKind.networks: CopyOptions,
}


@pytest.mark.parametrize("kind", list(ExpertKind), ids=lambda kind: kind.name)
def test_products_are_drawn_and_the_function_is_kept(kind: ExpertKind) -> None:
    """PESC's adapters, MixLoRA's products around one network, and copies of it with a product each."""
    around = replace(LORA, targets=("*.attention.w_*", "*.feed_forward.w_*=2"))
    of_copies = replace(LORA, targets=("*.attention.w_*", "*.experts.w_*=2"))
    lora = {ExpertKind.adapters: LORA, ExpertKind.low_rank: around, ExpertKind.networks: of_copies}[kind]
    more = {"d_ff_expert": 5} if kind is ExpertKind.adapters else {}
    goal = target(kind=kind, first_dense=1, lora=lora, **more)
    state = dense_state()
    for name, weight in list(state.items()):
        state[f"optim.{name}.exp_avg"] = torch.ones_like(weight)
        state[f"optim.{name}.step"] = torch.tensor(3.0)
    options = OPTIONS[kind]
    result = upcycle(state, goal, options(carry_optimizer=True), SEED)
    assert result.preserves
    made = {name: t for name, t in result.state.items() if not name.startswith("optim.")}
    model = Decoder(goal.model, goal.router, goal.experts, VOCAB).double()
    model.load_state_dict(made, strict=True)
    dense = Decoder(config(num_experts=0), TopKOptions(), experts_config("swiglu"), VOCAB).double()
    dense.load_state_dict({name: t for name, t in state.items() if not name.startswith("optim.")})
    ids_BS = tokens(2, 7)
    torch.testing.assert_close(model(ids_BS).hidden_BSD, dense(ids_BS).hidden_BSD, rtol=1e-12, atol=1e-12)
    products = {name: t for name, t in made.items() if is_factor(name)}
    of_layers = {ExpertKind.adapters: 3 + 3 + 2, ExpertKind.low_rank: 3 + 3, ExpertKind.networks: 2}[kind]
    assert len(products) == 2 * (2 * 4 + of_layers)
    for name, tensor in products.items():
        assert tensor.any() == name.rpartition(".")[2].startswith("a_")
        assert not result.state[f"optim.{name}.exp_avg"].any()
        assert result.state[f"optim.{name}.step"] == 0
    assert result.state["optim.blocks.0.attention.w_q_QD.step"] == 3
