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
        ("dynmoe", {"tau": 10.0, "learn_tau": True}, {}, [("penalty", 0.01, "global_batch")]),
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
