"""The presets of block wirings and of experts' shapes, cut down to the tiny model: overrides by name."""

from __future__ import annotations

WIRINGS = {
    "pr_moe": [
        "experiment=pr_moe", "model.num_layers=4", "model.num_experts=6", "model.layer_experts=[4,6]",
    ],
    "smallthinker": ["experiment=smallthinker", "model.num_experts=6"],
    "pre_gated": ["experiment=pre_gated", "model.num_layers=4"],
    "hmoe": [
        "experiment=hmoe", "model.num_experts=4", "model.expert_widths=[4,12,8,8]", "model.d_ff_expert=12",
    ],
    "momentum_smoe": ["experiment=momentum_smoe", "model.num_layers=3", "model.num_experts=6"],
    "adam_smoe": [
        "experiment=momentum_smoe", "model.num_layers=3", "model.momentum.kind=adam", "model.num_experts=6",
    ],
    "robust_smoe": [
        "experiment=momentum_smoe", "model.num_layers=3", "model.momentum.kind=robust", "model.num_experts=6",
    ],
    "scmoe": ["experiment=scmoe", "model.num_layers=4"],
    "scmoe, block_input": ["experiment=scmoe", "model.num_layers=4", "model.shortcut_from=block_input"],
    "drelu": ["experts=drelu", "model.layer_widths=[12,8]"],
}  # fmt: skip
