"""What a router's yaml brings is what its paper says: settings, experts, losses."""

from __future__ import annotations

import pytest

from moetrain.config.hydra.compose import compose_train
from moetrain.plain import plain

FIRST = [("gshard_first", 0.01, "global_batch")]


@pytest.mark.parametrize(
    ("router", "settings", "experts", "losses"),
    [
        ("adaptive", {"margin": 0.1}, {}, FIRST),
        ("threshold", {"threshold": 0.9, "drop_order": "choice"}, {}, FIRST),
        ("cosine", {"top_k": 1, "temperature": 0.07}, {}, [("switch", 0.01, "global_batch")]),
        (
            "blockffn",
            {"top_k": None},
            {"activation": "silu"},
            [("locality", 0.002, "global_batch"), ("chunk_sparsity", 0.05, "global_batch")],
        ),
        (
            "gw",
            {"top_k": 1, "threshold": 1.8, "slots": 8, "renormalize": False},
            {},
            [("switch", 0.01, "global_batch")],
        ),
        ("hyper", {"top_k": 2, "hidden": 256}, {}, []),
        ("mask", {"top_k": 1, "rare_visible": 1}, {}, [("switch", 0.01, "global_batch")]),
        (
            "stable",
            {"switch_step": 6000, "width": 50, "capacity_factor": 2.0, "eval_capacity_factor": 2.0},
            {"activation": "relu"},
            [("excess", 0.3, "global_batch"), ("penalty", 0.3, "global_batch")],
        ),
        (
            "vq",
            {"top_k": 1, "distance": "l2", "commitment": 0.25, "usage_decay": None},
            {"activation": "relu"},
            [("gshard_first", 0.01, "global_batch"), ("penalty", 0.08, "global_batch")],
        ),
        (
            "domain",
            {"top_k": 2, "gate": "embedding", "decision": "token", "experts": None},
            {},
            [("switch", 0.01, "global_batch")],
        ),
        (
            "moec",
            {"top_k": 1, "width": 32, "dropout": 0.5, "period": 250},
            {},
            [("switch", 0.01, "global_batch"), ("penalty", 1.0, "global_batch")],
        ),
        ("similarity", {"top_k": 2, "temperature": None}, {}, [("switch", 0.01, "global_batch")]),
        (
            "module_former",
            {"top_k": 2, "hidden": 256, "sampled": 0, "held": 0},
            {"activation": "gelu"},
            [("mi", 0.01, "global_batch")],
        ),
        ("multi_hash", {"top_k": None, "salt": 0}, {"activation": "relu"}, []),
        ("words", {"words": None}, {}, []),
        ("dynmoe", {"tau": 10.0, "learn_tau": True}, {}, [("penalty", 0.01, "global_batch")]),
        ("emo", {"min_pool": None}, {}, [("switch", 0.1, "global_batch"), ("z", 0.001, "global_batch")]),
        (
            "dynmoe_deepspeed",
            {"name": "dynmoe", "tau": 1.0, "learn_tau": False},
            {},
            [(name, 0.01, "global_batch") for name in ("penalty", "choice_balance", "choice_share")],
        ),
        (
            "sigma",
            {"top_k": 4},
            {"activation": "relu", "first_weights": "one_network"},
            [("entropy", 0.001, "global_batch")],
        ),
        (
            "competesmoe",
            {"rate": 0.05, "most_layers": 3, "winners_coef": 0.1, "diversity_coef": 1.0},
            {},
            [
                (name, coef, "global_batch")
                for name, coef in (("gshard_first", 0.01), ("z", 0.001), ("penalty", 0.01))
            ],
        ),
        (
            "competesmoe_v1",
            {"rate": 0.03},
            {"activation": "relu"},
            [("switch", 0.025, "global_batch"), ("penalty", 0.05, "global_batch")],
        ),
        (
            "thor",
            {"level": "step", "eval_level": "sequence", "consistency": 5.0},
            {"activation": "relu"},
            [],
        ),
        ("comet", {"top_k": 2, "gamma": 1.0}, {}, [("penalty", 1.0, "global_batch")]),
        ("dselect_k", {"top_k": 2, "gamma": 1.0}, {}, [("penalty", 1.0, "global_batch")]),
        (
            "evomoe",
            {"tau_start": 2.0, "tau_end": 0.3, "threshold": 0.001, "hard_step": None},
            {},
            [("l1", 0.01, "global_batch")],
        ),
        (
            "prototypes",
            {"capacity_factor": 1.0, "eval_capacity_factor": 1.0},
            {},
            [("sum_over_k", 0.01, "global_batch")],
        ),
        (
            "sam",
            {"top_k": 2, "num_groups": None, "capacity_factor": 1.0},
            {},
            [("sum_over_k", 0.01, "global_batch"), ("penalty", 0.01, "global_batch")],
        ),
        ("scot", {"gamma": 0.5}, {}, []),
        (
            "switch",
            {"top_k": 1, "capacity_factor": 1.25, "jitter": 0.01},
            {"activation": "relu", "first_weights": "tenth"},
            [("switch", 0.01, "global_batch")],
        ),
    ],
)
def test_a_preset_is_its_papers(
    router: str, settings: dict[str, object], experts: dict[str, object], losses: list[tuple[str, float, str]]
) -> None:
    cfg = compose_train([f"router={router}"])
    found = plain(cfg)
    assert {key: found["router"][key] for key in settings} == settings
    default = {"activation": "swiglu", "first_weights": "model"}
    assert {key: found["experts"][key] for key in default} == default | experts
    assert [(loss["name"], loss["coef"], loss["scope"]) for loss in found["balance"]["losses"]] == losses
