"""build_optimizer: who decays, who gets Muon, learning rates, and states made ahead of a load."""

import dataclasses

import pytest
import torch
from model_cases import decoder
from torch import nn

from moetrain.errors import UserError
from moetrain.train.optim.build import (
    build_optimizer,
    check_groups,
    freeze,
    group_parameters,
    set_lr,
)
from moetrain.train.optim.options import AdamWConfig, MuonConfig

E, D, F, V = 3, 5, 7, 11


class Router(nn.Module):
    is_router = True

    def __init__(self) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(torch.randn(E, D))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)
        self.query = nn.Linear(D, D)
        self.router = Router()
        self.w_gate_up_EDCF = nn.Parameter(torch.randn(E, D, 2, F))
        self.w_down_EFD = nn.Parameter(torch.randn(E, F, D))
        self.bias_ED = nn.Parameter(torch.zeros(E, D))
        self.shared_gate = nn.Linear(D, 1, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList([Block()])
        self.norm = nn.RMSNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embedding.weight

    def loss(self) -> torch.Tensor:
        return torch.stack([(p - 1).square().sum() for p in self.parameters() if p.requires_grad]).sum()


VECTORS = ["blocks.0.bias_ED", "blocks.0.norm.weight", "blocks.0.query.bias", "norm.weight"]
HIDDEN = ["blocks.0.query.weight", "blocks.0.w_down_EFD", "blocks.0.w_gate_up_EDCF"]
OTHERS = ["blocks.0.router.weight_ED", "blocks.0.shared_gate.weight", "embedding.weight"]


def names(groups):
    return {kind: sorted(name for name, _ in named) for kind, named in groups.items()}


def test_adamw_decays_matrices_and_nothing_else():
    groups = group_parameters(Model(), muon=False)
    assert names(groups) == {"decay": sorted(HIDDEN + OTHERS), "no_decay": VECTORS}


def test_muon_takes_hidden_matrices_alone():
    groups = group_parameters(Model(), muon=True)
    assert names(groups) == {"muon": HIDDEN, "decay": OTHERS, "no_decay": VECTORS}


def test_biases_do_not_decay_and_get_no_muon():
    model = decoder(qkv_bias=True, num_shared_experts=1, shared_gate=True)
    for muon in (False, True):
        groups = names(group_parameters(model, muon))
        assert {f"blocks.0.attention.b_{part}" for part in ("q_Q", "k_G", "v_G")} <= set(groups["no_decay"])
        assert "blocks.0.feed_forward.shared_gate_1D" in groups["decay"]
    model = decoder(first_dense=1, out_bias=True, mlp_bias=True)
    for muon in (False, True):
        no_decay = set(names(group_parameters(model, muon))["no_decay"])
        biases = ("attention.b_out_D", *(f"feed_forward.b_{p}" for p in ("gate_F", "up_F", "down_D")))
        assert {f"blocks.0.{name}" for name in biases} <= no_decay


def test_frozen_parameters_are_left_out_but_not_all_of_them():
    model = Model()
    model.embedding.weight.requires_grad_(False)
    assert "embedding.weight" not in names(group_parameters(model, muon=True))["decay"]
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(model.requires_grad_(False), AdamWConfig())


def test_freezing_goes_by_patterns_that_must_match():
    model = decoder()
    freeze(model, ["embed_VD", "blocks.*.attention.w_*"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"embed_VD", *(n for n, _ in model.named_parameters() if ".attention.w_" in n)}
    assert not frozen & set(names(group_parameters(model, muon=False))["decay"])
    with pytest.raises(UserError, match=r"optim\.frozen: blocks\.9\.\* matches no parameter"):
        freeze(model, ["embed_VD", "blocks.9.*"])


def test_a_parameter_in_no_group_or_in_two_is_an_error():
    model = Model()
    groups = group_parameters(model, muon=False)
    twice = {**groups, "extra": groups["no_decay"][:1]}
    with pytest.raises(ValueError, match=r"blocks\.0\.\S+ is in 2 optimizer groups"):
        check_groups(model, twice)
    with pytest.raises(ValueError, match=r"in 0 optimizer groups"):
        check_groups(model, {"decay": groups["decay"]})


@pytest.mark.parametrize("cfg", [AdamWConfig(lr=0.01), MuonConfig(lr=0.02, adamw_lr=0.003)])
def test_set_lr_scales_every_groups_own_peak(cfg):
    optimizer = build_optimizer(Model(), cfg)
    set_lr(optimizer, 0.25)
    set_lr(optimizer, 0.5)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    others = 0.003 if isinstance(cfg, MuonConfig) else 0.01
    expected = {"decay": others / 2, "no_decay": others / 2}
    assert rates == ({"muon": 0.01, **expected} if isinstance(cfg, MuonConfig) else expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adamw_is_fused_and_equals_the_plain_loop(dtype):
    fused, plain = Model().to(dtype), Model().to(dtype)
    cfg = AdamWConfig(lr=0.03, weight_decay=0.4)
    optimizer = build_optimizer(fused, cfg)
    assert all(group["fused"] for group in optimizer.param_groups)
    groups = [
        {"params": [p for _, p in named], "weight_decay": 0.4 if kind == "decay" else 0.0}
        for kind, named in group_parameters(plain, muon=False).items()
    ]
    reference = torch.optim.AdamW(groups, lr=0.03, betas=cfg.betas, eps=cfg.eps, foreach=False, fused=False)
    for _ in range(4):
        for model, opt in ((fused, optimizer), (plain, reference)):
            opt.zero_grad()
            model.loss().backward()
            opt.step()
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        (AdamWConfig(lr=-1.0), r"optim\.lr=-1"),
        (AdamWConfig(lr=float("nan")), r"optim\.lr=nan"),
        (AdamWConfig(weight_decay=-0.1), r"optim\.weight_decay=-0\.1"),
        (AdamWConfig(betas=(0.9, 1.0)), r"optim\.betas=1\.0"),
        (AdamWConfig(eps=0.0), r"optim\.eps"),
        (AdamWConfig(clip_norm=0.0), r"optim\.clip_norm"),
        (MuonConfig(adamw_lr=0.0), r"optim\.adamw_lr"),
        (MuonConfig(momentum=1.0), r"optim\.momentum"),
        (MuonConfig(ns_steps=0), r"optim\.ns_steps"),
    ],
)
def test_an_impossible_value_names_its_key(cfg, named):
    with pytest.raises(UserError, match=named):
        build_optimizer(Model(), cfg)


def test_the_config_is_not_changed():
    cfg = MuonConfig()
    build_optimizer(Model(), cfg)
    assert cfg == dataclasses.replace(MuonConfig())
