"""What an alarm suggests is an override that moetrain takes, for every router, and changes the config."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from layer_cases import COMMAND

from moetrain.config.hydra.compose import compose_train
from moetrain.config.rules.router import built_router
from moetrain.config.validate import validate
from moetrain.models import Decoder
from moetrain.moe import ROUTERS
from moetrain.train.alarms.build import suggestion

ALARMS = ("collapse", "dead_experts", "low_entropy", "large_logits", "imbalance_cost", "loss_spike")


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_a_suggestion_composes(name):
    overrides = [f"router={name}"]
    cfg = compose_train(overrides)
    router = built_router(cfg)
    suggestions = {suggestion(cfg, [router], alarm) for alarm in ALARMS}
    assert None not in suggestions
    for helps in suggestions:
        mended = compose_train([*overrides, *helps.split()])
        validate(mended)
        assert dataclasses.asdict(mended) != dataclasses.asdict(cfg), helps
    assert suggestion(cfg, [router], "throughput") is None


@pytest.mark.parametrize("name", sorted(COMMAND))
def test_what_is_suggested_for_a_layer_composes(name):
    cfg = compose_train(COMMAND[name])
    with torch.device("meta"):
        routers = list(Decoder(cfg.model, cfg.router, cfg.experts, 11).routers().values())
    assert routers
    for alarm in ALARMS:
        if helps := suggestion(cfg, routers, alarm):
            validate(mended := compose_train([*COMMAND[name], *helps.split()]))
            assert dataclasses.asdict(mended) != dataclasses.asdict(cfg), helps
    assert suggestion(cfg, routers, "loss_spike")
