"""Dense sources of any activation, and the MoE decoder that upcycling makes of them, in fp64.

Sizes are distinct and mostly prime. Shapes: B batch, S sequence, D model, F hidden, P = 2F (gated) or F.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from model_cases import TINY, VOCAB, tokens
from torch import Tensor

from moetrain.models import Decoder
from moetrain.models.options import ModelConfig
from moetrain.moe.mlp import MLP
from moetrain.moe.options import Activation, Backend, ExpertKind, ExpertsConfig, RouterConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.upcycle import MethodOptions, Target, Upcycled, upcycle

SEED = 5
State = dict[str, Tensor]


def config(**changes: Any) -> ModelConfig:
    return replace(TINY, **{"num_layers": 2, "d_ff": 29, "d_ff_expert": 29, "num_experts": 8, **changes})


def experts_config(activation: str, kind: ExpertKind = ExpertKind.networks) -> ExpertsConfig:
    return ExpertsConfig(kind, Activation(activation), Backend.loop)


def build(cfg: ModelConfig, router: RouterConfig, activation: str = "swiglu") -> Decoder:
    return Decoder(cfg, router, experts_config(activation), VOCAB).double()


def dense_state(activation: str = "swiglu", seed: int = 0, **changes: Any) -> State:
    """A dense decoder's state, whose feed-forward networks are MLPs of ``activation``."""
    torch.manual_seed(seed)
    cfg = config(**{**changes, "num_experts": 0})
    state = {name: t.clone() for name, t in build(cfg, TopKOptions()).state_dict().items()}
    state = {name: t for name, t in state.items() if ".feed_forward." not in name}
    for layer in range(cfg.num_layers):
        for name, value in MLP(cfg.d_model, cfg.d_ff, activation).double().state_dict().items():
            state[f"blocks.{layer}.feed_forward.{name}"] = value
    return state


def dense_layer(state: State, layer: int, activation: str) -> MLP:
    start = f"blocks.{layer}.feed_forward."
    own = {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}
    width, d_ff = own["w_down_DF"].shape
    mlp = MLP(width, d_ff, activation).double()
    mlp.load_state_dict(own)
    return mlp


def target(router: RouterConfig | None = None, activation: str = "swiglu", **changes: Any) -> Target:
    kind = changes.pop("kind", ExpertKind.networks)
    router = TopKOptions(top_k=2) if router is None else router
    return Target(config(**changes), router, experts_config(activation, kind))


def loaded(result: Upcycled, goal: Target) -> Decoder:
    """The target model with the result's tensors: every one of them, and no other."""
    model = Decoder(goal.model, goal.router, goal.experts, VOCAB).double()
    model.load_state_dict(result.state, strict=True)
    return model


def worst(goal: Target, state: State, options: MethodOptions, **more: Any) -> tuple[float, Upcycled]:
    """The largest relative error of any MoE layer's output against the dense layer's, and the result."""
    result = upcycle(state, goal, options, SEED, **more)
    model = loaded(result, goal)
    errors = []
    for layer in goal.layers:
        x_BSD = inputs(goal.model.d_model)
        expected = dense_layer(state, layer, goal.activation)(x_BSD)
        errors.append(relative(model.blocks[layer].feed_forward(x_BSD)[0], expected))
    return max(errors), result


def inputs(width: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 11, width, dtype=torch.float64, generator=generator)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def logits(model: Decoder) -> Tensor:
    return model.logits(model(tokens(2, 7)).hidden_BSD)


def gate_up_down(result: State, layer: int, columns: int) -> list[Tensor]:
    """The experts' matrices as [E, F, D] each: gate (where there is one), up, down."""
    start = f"blocks.{layer}.feed_forward.experts."
    up_EDCF = result[start + "w_gate_up_EDCF"]
    assert up_EDCF.shape[2] == columns
    return [*up_EDCF.permute(2, 0, 3, 1), result[start + "w_down_EFD"]]


def dense_matrices(state: State, layer: int, columns: int) -> list[Tensor]:
    """The dense layer's matrices as [F, D] each."""
    start = f"blocks.{layer}.feed_forward."
    ups = ["w_gate_FD", "w_up_FD"][-columns:]
    return [*(state[start + name] for name in ups), state[start + "w_down_DF"].t()]
