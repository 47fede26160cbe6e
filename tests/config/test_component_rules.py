"""What the edge refuses of a component's settings, the component refuses when it is built, and alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from torch import nn

from moetrain.config.hydra.compose import compose_train
from moetrain.config.stored import trained_config
from moetrain.config.validate import validate, validate_eval, validate_generate
from moetrain.data.corpus import prepare
from moetrain.data.options import DomainsData, MixtureData, MixturePart, SourceKind, TokenizerConfig
from moetrain.errors import UserError
from moetrain.evaluation.command import eval_app
from moetrain.evaluation.options import EvalConfig, EvalData
from moetrain.models.decoder import Decoder
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.moe import MoELayer, build_router
from moetrain.moe.balance import build_controllers, make_terms
from moetrain.moe.balance.settings import LossConfig
from moetrain.parallel.apply import parallelize
from moetrain.parallel.mesh import Meshes, build_meshes
from moetrain.parallel.options import ExpertDispatch
from moetrain.train.assemble import assemble
from moetrain.train.optim.build import build_optimizer
from moetrain.train.optim.options import MuonConfig
from moetrain.train.optim.schedule import lr_factor
from moetrain.train.options import GenerateConfig, Residual, TrainConfig
from moetrain.train.sample import generate_app
from moetrain.train.start import build

WORLD = 4  # ranks, where a layout is asked; otherwise one
HIERARCHICAL = {"parallel.ep": 4, "parallel.dispatcher": ExpertDispatch.hierarchical}


def changed(node: Any, changes: dict[str, Any]) -> Any:
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        node = replace(node, **{head: changed(getattr(node, head), {rest: value}) if rest else value})
    return node


def decoder(cfg: TrainConfig) -> object:
    return Decoder(cfg.model, cfg.router, cfg.experts, 31)


def layer(cfg: TrainConfig) -> object:
    m, experts = cfg.model, cfg.experts
    shared = {"num_shared_experts": m.num_shared_experts, "d_ff_shared": m.d_ff_shared}
    rows = {"block": experts.block, "max_rows_per_rank": experts.max_rows_per_rank}
    return MoELayer(5, 3, 7, router_options=cfg.router, shared_gate=m.shared_gate, **shared, **rows)


def router(cfg: TrainConfig) -> object:
    return build_router(cfg.router.name, d_model=5, num_experts=cfg.model.num_experts, options=cfg.router)


def balance(cfg: TrainConfig) -> object:
    return build_controllers(cfg.balance.controllers, make_terms(cfg.balance.losses), {})


def whole(cfg: TrainConfig) -> object:
    return assemble(cfg, 31, "cpu", 1)


def meshes(cfg: TrainConfig) -> object:
    return build_meshes(cfg.parallel, WORLD)


def optimizer(cfg: TrainConfig) -> object:
    return build_optimizer(nn.Linear(3, 2), cfg.optim)


def schedule(cfg: TrainConfig) -> object:
    return lr_factor(cfg.schedule, 0)


def corpus(cfg: TrainConfig) -> object:
    return prepare(cfg.data)


def run(cfg: TrainConfig) -> object:
    return build(cfg, "cpu")


Build = Callable[[TrainConfig], object]
YARN = RopeScaling(RopeKind.yarn, 2.0, 64)
LOSS = LossConfig()
CASES: list[tuple[Build, dict[str, Any]]] = [
    (decoder, {"model.d_model": 0}),
    (decoder, {"model.num_heads": 7}),
    (decoder, {"model.num_kv_heads": 3}),
    (decoder, {"model.head_dim": 33}),
    (decoder, {"model.first_dense": 3}),
    (decoder, {"model.moe_every": 3}),
    (decoder, {"model.d_ff_shared": 7}),
    (decoder, {"model.rope_scaling": RopeScaling(RopeKind.none, 2.0)}),
    (decoder, {"model.rope_scaling": RopeScaling(RopeKind.yarn, 2.0)}),
    (decoder, {"model.rope_scaling": replace(YARN, beta_fast=0.5)}),
    (decoder, {"model.rope_scaling": YARN, "model.rope_theta": 1.0}),
    (decoder, {"experts.block": 0}),
    (layer, {"experts.block": 0}),
    (layer, {"experts.max_rows_per_rank": 0}),
    (layer, {"model.shared_gate": True}),
    (layer, {"router.min_capacity": -1}),
    (router, {"router.jitter": 1.0}),
    (router, {"router.num_groups": 0}),
    (router, {"router.num_groups": 3}),
    (router, {"router.capacity_factor": 0.0}),
    (balance, {"balance.losses": [replace(LOSS, coef=-1.0)]}),
    (balance, {"balance.losses": [LossConfig("locality", options={"steepness": 0.0})]}),
    (balance, {"balance.controllers": {"bias": {"rate": 0.0}}}),
    (whole, {"balance.losses": [LossConfig("penalty")]}),
    (whole, {"train.task": "next_tokn"}),
    (whole, {"engine.name": "nativ"}),
    (meshes, {"parallel.timeout": 0.0}),
    (meshes, {"parallel.dp_replicate": 3}),
    (meshes, {"parallel.dp_shard": 2}),
    (meshes, {"parallel.dp_shard": 2, "parallel.dp_replicate": 2, "parallel.ep": 4}),
    (meshes, {"parallel.overlap": 2}),
    (meshes, {"parallel.overlap": 2, **HIERARCHICAL}),
    (meshes, {"parallel.node_sums": False}),
    (meshes, {"parallel.ranks_per_node": 3, **HIERARCHICAL}),
    (optimizer, {"optim.lr": 0.0}),
    (optimizer, {"optim.betas": (0.9,)}),
    (optimizer, {"optim": MuonConfig(ns_steps=100)}),
    (schedule, {"schedule.decay_fraction": 0.0}),
    (schedule, {"schedule.warmup_steps": 1000}),
    (corpus, {"data.seq_len": 1}),
    (corpus, {"data.tokenizer": TokenizerConfig(vocab_size=256)}),
    (corpus, {"data.tokenizer.path": "/no/such"}),
    (corpus, {"data": DomainsData(domains=["wiki_xx"])}),
    (corpus, {"data": MixtureData()}),
    (corpus, {"data": MixtureData(parts={"a": MixturePart(SourceKind.stdlib, 0.0)})}),
    (corpus, {"data": MixtureData(parts={"a": MixturePart(SourceKind.hub)})}),
    (run, {"train.threads": 0}),
    (run, {"train.residual": Residual.fp32}),
    (run, {"train.global_batch_tokens": 400}),
]


def line(act: Callable[[], object], kinds: tuple[type[Exception], ...] = (UserError,)) -> str:
    with pytest.raises(kinds) as caught:
        act()
    return str(caught.value)


@pytest.fixture(scope="module")
def base() -> TrainConfig:
    fits = {"optim.lr": 0.001, "train.global_batch_tokens": 8 * 256 * WORLD}
    return changed(compose_train(["model=tiny", "model.num_layers=2", "balance=none"]), fits)


def name_of(case: tuple[Build, dict[str, Any]]) -> str:
    return f"{case[0].__name__}: {', '.join(case[1])}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_component_refuses_what_the_edge_refuses(base, case):
    build_it, changes = case
    cfg = changed(base, changes)
    edge = line(lambda: validate(cfg, WORLD if build_it is meshes else 1))
    said = line(lambda: build_it(cfg), (UserError, ValueError))
    assert edge.endswith(said)  # the edge may name the part that says so
    assert "\n" not in said


@dataclass(frozen=True)
class Placed:
    """As much of a mesh as is asked before experts are spread."""

    ranks: int

    def __getitem__(self, name: str) -> Placed:
        return self

    def size(self) -> int:
        return self.ranks


@pytest.mark.parametrize(("ep", "overlap"), [(2, 1), (7, 2)])
def test_experts_that_ranks_cannot_share_are_refused(base, ep, overlap):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([MoELayer(5, 3, 7)])

    cfg = replace(base.parallel, ep=ep, overlap=overlap)
    laid = Meshes(ep=ep, sparse=Placed(ep), cfg=cfg)
    said = line(lambda: parallelize(Model(), laid))
    assert said.startswith("blocks.0 has 7 experts, ")
    assert f"parallel.{'overlap=2' if overlap > 1 else 'ep=2'}" in said


@pytest.mark.parametrize(
    ("check", "app", "cfg"),
    [
        (validate_generate, generate_app, GenerateConfig(checkpoint="/no/such", prompt="a")),
        (validate_generate, generate_app, GenerateConfig(checkpoint="/no/such", prompt="a", top_p=0.0)),
        (validate_eval, eval_app, EvalConfig(checkpoint="/no/such", data=EvalData(path=__file__))),
        (validate_eval, eval_app, EvalConfig(checkpoint="/no/such", batch_size=0)),
        (validate_eval, eval_app, EvalConfig(checkpoint="/no/such")),
    ],
    ids=["generate", "top_p", "eval", "batch_size", "nothing"],
)
def test_an_app_refuses_what_its_command_refuses(check, app, cfg):
    assert line(lambda: check(cfg)) == line(lambda: app(cfg, trained_config))


def test_what_the_edge_accepts_is_built(base):
    validate(base)
    for build_it in (decoder, layer, router, balance, whole, optimizer, schedule):
        build_it(base)
    assert dataclasses.is_dataclass(build_meshes(base.parallel, 1))
