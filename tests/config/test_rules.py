"""Every cross-field rule: what it refuses, what it says, and the nearest values that it accepts."""

import dataclasses
import os
from dataclasses import replace

import pytest

from moetrain.config import validate as validate_module
from moetrain.config.hydra.compose import compose_train
from moetrain.config.rules import balance as rules_balance
from moetrain.config.rules import data as rules_data
from moetrain.config.rules import layers as rules_layers
from moetrain.config.rules import model as rules_model
from moetrain.config.rules import rope as rules_rope
from moetrain.config.rules import train as rules_train
from moetrain.config.rules.checks import is_installed
from moetrain.config.validate import validate, validate_generate
from moetrain.data.options import (
    DomainsData,
    HubData,
    LocalData,
    MixtureData,
    MixturePart,
    SourceKind,
    TokenizerConfig,
    TokenizerKind,
)
from moetrain.errors import UserError
from moetrain.models.options import AttentionBackend
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.moe.balance.settings import LossConfig, LossScope
from moetrain.parallel.options import ExpertDispatch
from moetrain.train.log.options import WandbTracker
from moetrain.train.optim.options import MuonConfig
from moetrain.train.options import EngineConfig, GenerateConfig, Residual

SHAPE = {"model.d_model": 240, "model.num_heads": 6, "model.num_layers": 4, "model.num_experts": 12}
LOOP = {
    "data.seq_len": 64,
    "train.micro_batch_size": 6,
    "train.global_batch_tokens": 6 * 64 * 2,
    "train.steps": 100,
    "schedule.horizon": 100,
    "schedule.warmup_steps": 10,
}


def change(cfg, changes):
    """A copy of a frozen config with dotted keys set."""
    for key, value in changes.items():
        *path, last = key.split(".")
        parents = [cfg]
        for name in path:
            parents.append(getattr(parents[-1], name))
        new = dataclasses.replace(parents[-1], **{last: value})
        for parent, name in zip(reversed(parents[:-1]), reversed(path), strict=True):
            new = dataclasses.replace(parent, **{name: new})
        cfg = new
    return cfg


@pytest.fixture(scope="module")
def base():
    return change(compose_train([]), {**SHAPE, **LOOP})


NAN, INF = float("nan"), float("inf")
LOSS = LossConfig()
LLAMA3, YARN = (RopeScaling(kind, 8.0, 64) for kind in (RopeKind.llama3, RopeKind.yarn))
LOCALITY, DIRICHLET = LossConfig("locality"), LossConfig("dirichlet", scope=LossScope.sequence)


def with_options(loss, **options):
    return dataclasses.replace(loss, options=options)


BACKEND = "model.attention_backend"
ON_CPU = {"train.device": "cpu"}

REFUSED = [
    ({"model.d_model": 0}, "model.d_model=0 must be 1 or more"),
    ({"model.num_layers": -1}, "model.num_layers=-1"),
    ({"model.d_ff_expert": 0}, "model.d_ff_expert=0"),
    ({"model.moe_every": 0}, "model.moe_every=0"),
    ({"model.num_experts": -1}, "model.num_experts=-1 must be 0 or more"),
    ({"model.num_shared_experts": -1}, "model.num_shared_experts=-1"),
    ({"model.d_ff_shared": 0, "model.num_shared_experts": 1}, "model.d_ff_shared=0 must be 1 or more"),
    ({"model.d_ff_shared": 7}, "model.d_ff_shared=7 is of shared experts", "model.num_shared_experts=1"),
    ({"model.shared_gate": True}, "model.shared_gate=True is of shared experts"),
    ({"model.sliding_window": 0}, "model.sliding_window=0 must be 1 or more"),
    (ON_CPU | {BACKEND: AttentionBackend.flex}, f"{BACKEND}=flex: on a cpu device", f"set {BACKEND}=auto"),
    (ON_CPU | {BACKEND: AttentionBackend.varlen}, f"{BACKEND}=varlen: its kernel is CUDA's"),
    ({"model.rope_theta": 0.0}, "model.rope_theta=0.0 must be above 0"),
    ({"model.rope_scaling.factor": 2.0}, "model.rope_scaling.factor=2.0 is not used by", "linear or llama3"),
    ({"model.rope_scaling": RopeScaling(RopeKind.linear, 0.5)}, "model.rope_scaling.factor=0.5 must be 1 or"),
    ({"model.rope_scaling": RopeScaling(RopeKind.linear, 2.0, 64)}, "original_max_positions=64 is not used"),
    ({"model.rope_scaling": RopeScaling(RopeKind.yarn, 2.0)}, "kind=yarn needs model.rope_scaling.original"),
    ({"model.rope_scaling": RopeScaling(RopeKind.llama3, 2.0)}, "kind=llama3 needs model.rope_scaling.orig"),
    ({"model.rope_scaling": replace(LLAMA3, original_max_positions=0)}, "original_max_positions=0 must be 1"),
    ({"model.rope_scaling": replace(LLAMA3, low_freq_factor=0.0)}, "low_freq_factor=0.0 must be above 0"),
    (
        {"model.rope_scaling": replace(LLAMA3, low_freq_factor=4.0)},
        "model.rope_scaling.high_freq_factor=4.0 must be above model.rope_scaling.low_freq_factor=4.0",
    ),
    ({"model.rope_scaling": replace(LLAMA3, truncate=False)}, "truncate=False is not used", "take kind=yarn"),
    (
        {"model.rope_scaling": replace(YARN, beta_fast=INF)},
        "model.rope_scaling.beta_fast=inf must be a finite number",
    ),
    ({"model.rope_scaling": replace(YARN, attention_factor=0.0)}, "attention_factor=0.0 must be above 0"),
    ({"model.rope_scaling": YARN, "model.rope_theta": 1.0}, "model.rope_theta=1.0 must be above 1"),
    ({"model.norm_eps": NAN}, "model.norm_eps=nan"),
    ({"experts.block": 0}, "experts.block=0"),
    ({"model.num_heads": 7}, "model.num_heads=7 does not divide model.d_model=240: take 8 heads"),
    ({"model.num_heads": 16}, "model.head_dim=15 = model.d_model=240 / model.num_heads=16 must be even"),
    ({"model.head_dim": 33}, "model.head_dim=33 must be even"),
    ({"model.num_kv_heads": 4}, "model.num_kv_heads=4 does not divide model.num_heads=6: take 3"),
    ({"model.first_dense": 5}, "model.first_dense=5 exceeds model.num_layers=4"),
    ({"model.moe_every": 5}, "model.moe_every=5", "none of the 4 layers MoE", "model.num_experts=0"),
    ({"model.first_dense": 4}, "model.first_dense=4", "none of the 4 layers MoE"),
    ({"model.vocab_size": 300}, "model.vocab_size=300", "the tokenizer's 512"),
    (
        {"model.vocab_size": 256, "data.tokenizer": TokenizerConfig(kind=TokenizerKind.bytes)},
        "model.vocab_size=256",
        "the tokenizer's 257",
    ),
    ({"router.top_k": 13}, "router.top_k=13", "num_experts=12: lower router.top_k or raise num_experts"),
    ({"router.top_k": 0}, "router.top_k=0"),
    ({"router.num_groups": 5}, "router.num_groups=5 must divide num_experts=12: take 6"),
    ({"router.num_groups": 0}, "router.num_groups=0"),
    ({"router.num_groups": 4, "router.top_groups": 5}, "router.top_groups=5", "num_groups=4"),
    ({"router.num_groups": 6, "router.top_groups": 1, "router.top_k": 3}, "router=topk", "top_k=3"),
    ({"router.capacity_factor": 0.0}, "router.capacity_factor=0.0 must be above 0"),
    ({"router.eval_capacity_factor": INF}, "router.eval_capacity_factor=inf"),
    ({"router.min_capacity": -1}, "router.min_capacity=-1"),
    ({"router.jitter": 1.0}, "router.jitter=1.0 must lie in [0, 1)"),
    ({"router.group": "4"}, "router.group=4 does not divide train.micro_batch_size=6", "take 3"),
    ({"router.group": "0"}, "router.group=0 must be sequence, all, or a number"),
    ({"router.group": "batch"}, "router.group=batch must be sequence, all, or a number"),
    ({"router.group": "all", "train.micro_batch_size": 3}, "train.micro_batch_size=3, but the share is 12"),
    ({"router.group": "all", "router.capacity_factor": 1.0}, "router.group=all has no capacity"),
    ({"balance.losses": [LOSS, dataclasses.replace(LOSS, coef=-1.0)]}, "balance.losses.1.coef=-1.0"),
    ({"balance.losses": [dataclasses.replace(LOSS, coef=INF)]}, "balance.losses.0.coef=inf"),
    (
        {"balance.losses": [LOSS, dataclasses.replace(DIRICHLET, scope=LossScope.global_batch)]},
        "balance.losses.1.scope=global_batch is not offered for dirichlet: take sequence or micro",
    ),
    (
        {"balance.losses": [LossConfig("mi", scope=LossScope.running)]},
        "balance.losses.0.scope=running is not offered for mi: take sequence, global_batch or micro",
    ),
    (
        {"balance.losses": [LossConfig("lokality")]},
        "balance.losses.0.name=lokality is not known; known: chunk_sparsity, dirichlet",
        "did you mean locality?",
    ),
    ({"balance.losses": [LOSS, LOSS]}, "balance.losses names a loss twice"),
    (
        {"balance.losses": [LOSS, with_options(LOCALITY, stepness=0.5)]},
        "balance.losses.1.options.stepness is not an option; known: steepness (did you mean steepness?)",
    ),
    ({"balance.losses": [with_options(LOSS, alpha=1.0)]}, "losses.0.options.alpha", "there are none"),
    ({"balance.losses": [with_options(LOCALITY, steepness=0.0)]}, "options.steepness=0.0 must be above 0"),
    (
        {"balance.losses": [with_options(LOCALITY, steepness="x")]},
        "balance.losses.0.options.steepness is a number, not 'x'",
    ),
    ({"balance.losses": [with_options(DIRICHLET, alpha=True)]}, "options.alpha is a number, not True"),
    ({"balance.losses": [with_options(DIRICHLET, alpha=INF)]}, "losses.0.options.alpha=inf must be a finite"),
    (
        {"balance.losses": [LossConfig("chunk_sparsity", options={"chunk_length": 0})]},
        "balance.losses.0.options.chunk_length=0 must be 1 or more",
    ),
    (
        {"balance.losses": [LossConfig("penalty")]},
        "router=topk has no loss of its own: take balance.losses.0.name=penalty out",
    ),
    ({"balance.controllers": {"bas": {}}}, "balance.controllers.bas is not known", "did you mean bias?"),
    ({"balance.controllers": {"bias": {"rate": -0.1}}}, "controllers.bias.rate=-0.1 must be above 0"),
    ({"balance.controllers": {"bias": {"rat": 0.1}}}, "balance.controllers.bias.rat is not an option"),
    ({"balance.controllers": {"sparsity": {"rate": 1.0}}}, "controllers.sparsity.rate=1.0 must be above 1"),
    (
        {"balance.controllers": {"chunk_sparsity": {"max_factor": 0.5}}},
        "balance.controllers.chunk_sparsity.max_factor=0.5 must be 1 or more",
    ),
    (
        {"balance.controllers": {"chunk_sparsity": {"max_factor": 2.0}}, "balance.losses": [LOSS]},
        "controllers.chunk_sparsity.max_factor=2.0 is not used by balance.losses=['switch']",
    ),
    ({"balance.controllers": {"running_load": {}}}, "running_load.decay=0.9 is not used: no loss has"),
    ({"train.task": "next_tokn"}, "train.task=next_tokn is not known; known: next_token (did you"),
    ({"model.attention": "auto"}, "model.attention=auto is not known; known: grouped_query", BACKEND),
    ({"model.feed_forward": "dense"}, "model.feed_forward=dense has no experts, but model.num_experts=12"),
    (
        {"model.feed_forward": "mo"},
        "model.feed_forward=mo is not known; known:",
        "plugins=[package]",
    ),
    ({"data.seq_len": 1}, "data.seq_len=1 must be 2 or more"),
    ({"data.val_fraction": 0.0}, "data.val_fraction=0.0 must lie in (0, 1)"),
    ({"data.val_fraction": 1.0}, "data.val_fraction=1.0 must lie in (0, 1)"),
    ({"data.tokenizer.vocab_size": 256}, "data.tokenizer.vocab_size=256 must be 257 or more"),
    ({"data.tokenizer.kind": TokenizerKind.file}, "data.tokenizer.kind=file needs data.tokenizer.path"),
    ({"data.tokenizer.path": "/x"}, "data.tokenizer.path=/x is not used by data.tokenizer.kind=bpe"),
    (
        {"data.tokenizer": TokenizerConfig(kind=TokenizerKind.file, path="/no/such")},
        "data.tokenizer.path=/no/such does not exist",
    ),
    ({"data": LocalData(path="/no/such/*.txt")}, "data.path=/no/such/*.txt"),
    ({"data": HubData(path="a/b", max_documents=0)}, "data.max_documents=0"),
    ({"data": DomainsData(domains=["wiki_en", "wiki_xx"])}, "data.domains=", "wiki_xx", "shakespeare"),
    ({"data": DomainsData(domains=[])}, "data.domains=[]"),
    ({"data": MixtureData()}, "data.parts is empty", "kind: local"),
    (
        {"data": MixtureData(parts={"a": MixturePart(SourceKind.stdlib, weight=0.0)})},
        "data.parts.a.weight=0.0",
    ),
    ({"data": MixtureData(parts={"a": MixturePart(SourceKind.local)})}, "data.parts.a.path is not set"),
    ({"data": MixtureData(parts={"a": MixturePart(SourceKind.hub)})}, "data.parts.a.path is not set"),
    (
        {"data": MixtureData(parts={"a": MixturePart(SourceKind.stdlib, path="x")})},
        "data.parts.a.path=x is not used by data.parts.a.kind=stdlib",
    ),
    (
        {"data": MixtureData(parts={"a": MixturePart(SourceKind.local, path="/no/such")})},
        "data.parts.a.path=/no/such",
    ),
    (
        {"data": MixtureData(parts={"a": MixturePart(SourceKind.domains, domains=["x"])})},
        "data.parts.a.domains=['x']",
    ),
    (
        {"data": MixtureData(parts={"a": MixturePart(SourceKind.stdlib, domains=["python"])})},
        "data.parts.a.domains",
    ),
    ({"train.steps": 0}, "train.steps=0 must be 1 or more"),
    ({"train.micro_batch_size": 0}, "train.micro_batch_size=0"),
    ({"train.threads": 0}, "train.threads=0"),
    ({"train.eval_every": -1}, "train.eval_every=-1"),
    ({"train.seed": -1}, "train.seed=-1"),
    ({"train.spike_factor": 1.0}, "train.spike_factor=1.0 must be above 1"),
    ({"train.residual": Residual.fp32}, "train.residual=fp32 is of train.precision=bf16, not of fp32"),
    ({"train.device": "gpu"}, "train.device=gpu is not known; known: auto, cpu, cuda"),
    ({"checkpoint.every": -1}, "checkpoint.every=-1"),
    ({"checkpoint.keep_last": 0}, "checkpoint.keep_last=0 must be 1 or more"),
    ({"optim.lr": 0.0}, "optim.lr=0.0 must be above 0"),
    ({"optim.lr": NAN}, "optim.lr=nan"),
    ({"optim.eps": 0.0}, "optim.eps=0.0"),
    ({"optim.weight_decay": -0.1}, "optim.weight_decay=-0.1"),
    ({"optim.clip_norm": 0.0}, "optim.clip_norm=0.0"),
    ({"optim.betas": (0.9,)}, "optim.betas=[0.9] must be two numbers"),
    ({"optim.betas": (0.9, 1.0)}, "optim.betas=1.0 must lie in [0, 1)"),
    ({"optim": MuonConfig(ns_steps=0)}, "optim.ns_steps=0"),
    ({"optim": MuonConfig(momentum=1.0)}, "optim.momentum=1.0"),
    ({"optim": MuonConfig(adamw_lr=0.0)}, "optim.adamw_lr=0.0"),
    ({"schedule.horizon": 0, "schedule.warmup_steps": 0}, "schedule.horizon=0"),
    ({"schedule.warmup_steps": 101}, "schedule.warmup_steps=101 exceeds schedule.horizon=100"),
    ({"schedule.decay_fraction": 0.0}, "schedule.decay_fraction=0.0 must lie in (0, 1]"),
    ({"schedule.min_ratio": 1.1}, "schedule.min_ratio=1.1 must lie in [0, 1]"),
    ({"parallel.ep": 2}, "start a multiple of 2 ranks"),
    ({"parallel.ep": 5}, "parallel.ep=5 does not divide model.num_experts="),
    ({"parallel.ep": 2, "model.num_experts": 0, "balance.losses": []}, "set parallel.ep=1"),
    ({"parallel.dp_replicate": 0}, "parallel.dp_replicate=0"),
    ({"parallel.timeout": 0.0}, "parallel.timeout=0.0"),
    ({"parallel.timeout": 1e30}, "parallel.timeout=1e+30"),
    ({"parallel.dp_replicate": 2}, "parallel.dp_replicate=2 does not divide the 1 ranks"),
    ({"parallel.dp_shard": 2}, "parallel.dp_replicate=1 times parallel.dp_shard=2 is 2", "has 1 ranks"),
    ({"train.global_batch_tokens": 400}, "train.global_batch_tokens=400", "384", "384 or 768"),
    ({"train.global_batch_tokens": 63}, "train.global_batch_tokens=63", "the nearest that are: 384"),
    ({"engine": EngineConfig(name="warp")}, "engine.name=warp is not known; known: native"),
    ({"run.name": ""}, "run.name is empty"),
    ({"run.name": "../x"}, "run.name=../x", "run.dir"),
    ({"run.name": "/x"}, "run.name=/x", "run.dir"),
    ({"run.dir": __file__}, "is a file, not a folder"),
    ({"run.root": __file__}, "is a file, not a folder"),
    ({"resume": "/no/such"}, "resume=/no/such does not exist"),
    ({"init_optimizer": True}, "init_optimizer=true needs init_from"),
    ({"compare.arms": {"a/b": []}}, "compare.arms.a/b"),
    ({"compare.arms": {"..": []}}, "compare.arms..."),
    ({"compare.arms": {"a": []}, "compare.seeds": []}, "compare.seeds=[]"),
    ({"compare.arms": {"a": []}, "compare.seeds": [1, 1]}, "compare.seeds=[1, 1]"),
]


@pytest.mark.parametrize(
    ("changes", "fragments"), [(r[0], r[1:]) for r in REFUSED], ids=[r[1] for r in REFUSED]
)
def test_refused(base, changes, fragments):
    base = change(base, {"data.tokenizer.vocab_size": 512})
    with pytest.raises(UserError) as caught:
        validate(change(base, changes))
    text = str(caught.value)
    assert [f for f in fragments if f not in text] == [], text
    assert "\n" not in text


ACCEPTED = [
    {},
    {"model.num_experts": 0, "router.top_k": 9},  # dense: the router is not built
    {"model.num_experts": 0, "model.moe_every": 5},
    {"model.num_heads": 7, "model.head_dim": 32},
    {"model.num_kv_heads": 3},
    ON_CPU | {BACKEND: AttentionBackend.blocks},
    {"model.first_dense": 3},
    {"model.moe_every": 4},
    {"model.rope_scaling": YARN},
    {"model.rope_scaling": RopeScaling(RopeKind.linear, 1.0)},
    {"model.rope_scaling": replace(LLAMA3, low_freq_factor=3.9)},
    {"model.num_shared_experts": 2, "model.d_ff_shared": 1, "model.shared_gate": True},
    {"model.vocab_size": 4096, "data.tokenizer.vocab_size": 4096},
    {"router.top_k": 12},
    {"router.top_k": None, "model.num_experts": 1},
    {"router.num_groups": 4, "router.top_groups": 2, "router.top_k": 6},
    {"router.group": "3"},
    {"router.jitter": 0.0},
    {"balance.losses": []},
    {"balance.losses": [LOCALITY, with_options(DIRICHLET, alpha=0.1)]},
    {
        "balance.losses": [LossConfig("chunk_sparsity", options={"chunk_length": 1})],
        "balance.controllers": {"chunk_sparsity": {"max_factor": 1}},
    },
    {"balance.losses": [LossConfig(scope=LossScope.running)], "balance.controllers": {"running_load": {}}},
    {"balance.losses": [dataclasses.replace(DIRICHLET, scope=LossScope.micro)]},
    {"schedule.warmup_steps": 100},
    {"schedule.decay_fraction": 1.0, "schedule.min_ratio": 1.0},
    {"train.global_batch_tokens": 384},
    {"train.eval_every": 0, "checkpoint.every": 0},
    {"train.device": "cpu"},
    {"data.seq_len": 2},
    {"optim": MuonConfig()},
    {"data": HubData(path="a/b", seq_len=64)},
    {
        "data": MixtureData(
            seq_len=64, parts={"a": MixturePart(SourceKind.stdlib), "b": MixturePart(SourceKind.domains)}
        )
    },
    {"run.name": "a/b", "resume": "none"},
    {"compare.arms": {"moe": [], "dense-1.5": []}, "compare.seeds": [0]},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=[str(sorted(a)) for a in ACCEPTED])
def test_accepted(base, changes):
    assert validate(change(base, changes)) == []


def test_every_rule_refuses_something(base):
    """Each rule function, called alone, raises for at least one of the cases above."""
    base = change(base, {"data.tokenizer.vocab_size": 512})
    rules = [*rules_model.RULES, *rules_balance.RULES, *rules_layers.RULES, *rules_rope.RULES]
    rules += [*rules_data.RULES, *rules_train.RULES]
    own_tests = {
        rules_layers.attention_accepts_its_options,
        rules_layers.layers_accept_their_options,
        rules_train.compiler_is_there,
        rules_train.compiler_is_right,
        rules_train.tracker_is_installed,
    }
    silent = set(rules) - own_tests
    for changes, *_ in REFUSED:
        cfg = change(base, changes)
        for rule in list(silent):
            try:
                rule(cfg, 1)
            except UserError:
                silent.discard(rule)
            except (ZeroDivisionError, ValueError):  # an earlier rule stands before this one
                pass
    assert {r.__name__ for r in silent} == set()
    assert validate_module.model.RULES is rules_model.RULES


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_nearest_global_batches_are_valid(base, world):
    wrong = change(base, {"train.global_batch_tokens": 2000})
    with pytest.raises(UserError, match="the nearest that are: ") as caught:
        validate(wrong, world)
    below, above = map(int, str(caught.value).rpartition(": ")[2].split(" or "))
    assert below < 2000 < above == below + 384 * world
    for tokens in (below, above):
        validate(change(base, {"train.global_batch_tokens": tokens}), world)


def test_layouts_of_several_ranks(base):
    base = change(base, {"train.global_batch_tokens": 384 * 4})
    validate(change(base, {"parallel.dp_replicate": 2}), 4)
    validate(change(base, {"parallel.dp_replicate": 2, "parallel.dp_shard": 2}), 4)
    with pytest.raises(UserError, match="is 4, but this run has 2 ranks"):
        validate(change(base, {"parallel.dp_replicate": 2, "parallel.dp_shard": 2}), 2)
    with pytest.raises(UserError, match="dp_replicate=3 does not divide the 4 ranks"):
        validate(change(base, {"parallel.dp_replicate": 3}), 4)


@pytest.mark.parametrize(("steps", "said"), [(99, "stops before"), (101, "goes on after")])
def test_steps_that_do_not_end_with_the_schedule_are_a_warning(base, steps, said):
    (warning,) = validate(change(base, {"train.steps": steps}))
    assert f"train.steps={steps}" in warning
    assert "schedule.horizon=100" in warning
    assert said in warning


def test_compile_wants_a_torch_that_compiles_rightly(base, monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.12.1")
    rules_train.compiler_is_right(base, 1)
    with pytest.raises(
        UserError, match=r"train.compile=true: torch 2.12.1 compiles gradients wrongly: install 2.13"
    ):
        rules_train.compiler_is_right(change(base, {"train.compile": True}), 1)


def test_compile_wants_a_compiler(base, monkeypatch, tmp_path):
    cfg = change(base, {"train.compile": True})
    monkeypatch.setattr("torch.__version__", "2.13.0")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"train.compile=true needs a C\+\+ compiler"):
        validate(cfg)
    for name, env in (("g++", None), ("my-cxx", "my-cxx -O2")):
        tool = tmp_path / name
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
        if env:
            monkeypatch.setenv("CXX", env)
        validate(cfg)
        tool.unlink()
    with pytest.raises(UserError, match="my-cxx"):
        validate(cfg)


def test_a_tracker_that_is_not_installed(base, monkeypatch, tmp_path):
    monkeypatch.setattr(rules_train, "is_installed", lambda package: False)
    with pytest.raises(UserError, match=r"tracker=wandb needs .* pip install 'moetrain\[wandb\]'"):
        validate(change(base, {"tracker": WandbTracker()}))
    monkeypatch.undo()
    (tmp_path / "surely_a_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_installed("surely_a_folder")
    assert not is_installed("surely_not_there")
    assert is_installed("pytest")


def test_cuda_without_a_gpu(base):
    import torch

    cfg = change(base, {"train.device": "cuda"})
    if torch.cuda.is_available():
        assert validate(cfg) == []
    else:
        with pytest.raises(UserError, match=r"train\.device=cuda, but torch .* sees no CUDA device"):
            validate(cfg)


GENERATE = [
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"temperature": -0.1}, "temperature=-0.1"),
    ({"temperature": NAN}, "temperature=nan"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_p": 0.0}, "top_p=0.0 must lie in (0, 1]"),
    ({"top_p": 1.1}, "top_p=1.1"),
    ({"device": "gpu"}, "device=gpu"),
    ({"prompt": None}, "exactly one of"),
    ({"prompt_file": "x"}, "exactly one of"),
    ({"prompt": None, "prompt_file": "/no/such"}, "prompt_file=/no/such"),
    ({"checkpoint": "/no/such"}, "checkpoint=/no/such"),
]


@pytest.mark.parametrize(("changes", "said"), GENERATE, ids=[g[1] for g in GENERATE])
def test_generate_refused(changes, said):
    cfg = GenerateConfig(checkpoint=os.path.dirname(__file__), prompt="x", top_p=1.0, temperature=0.0)
    validate_generate(cfg)
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace("]", r"\]")):
        validate_generate(change(cfg, changes))


HIERARCHICAL = {"parallel.ep": 4, "parallel.dispatcher": ExpertDispatch.hierarchical}
DISPATCH = [
    ({"parallel.overlap": 0}, "parallel.overlap=0 must be 1 or more"),
    ({"parallel.overlap": 2}, "parallel.overlap=2 needs parallel.ep above 1: set parallel.overlap=1"),
    ({"parallel.overlap": 2, **HIERARCHICAL}, "is of parallel.dispatcher=all_to_all, not of hierarchical"),
    ({"parallel.ep": 4, "parallel.overlap": 4}, "parallel.overlap=4", "=12 / parallel.ep=4 leaves 3 a rank"),
    ({"parallel.node_sums": False}, "is of parallel.dispatcher=hierarchical, not of all_to_all"),
    ({"parallel.ranks_per_node": 0, **HIERARCHICAL}, "parallel.ranks_per_node=0 must be 1 or more"),
    ({"parallel.ranks_per_node": 3, **HIERARCHICAL}, "parallel.ranks_per_node=3 and parallel.ep=4: one must"),
    (HIERARCHICAL, "parallel.ranks_per_node=3 (LOCAL_WORLD_SIZE) and parallel.ep=4"),
]


@pytest.mark.parametrize(("changes", "said"), [(d[0], d[1:]) for d in DISPATCH], ids=[d[1] for d in DISPATCH])
def test_dispatch_refused(base, changes, said, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError) as caught:
        validate(change(base, {"train.global_batch_tokens": 384 * 4, **changes}), 4)
    assert all(text in str(caught.value) for text in said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [
    {"parallel.ep": 4, "parallel.overlap": 3},
    {"parallel.ranks_per_node": 2, "parallel.node_sums": False, **HIERARCHICAL},
    {"parallel.ranks_per_node": 4, **HIERARCHICAL},
    {"parallel.ranks_per_node": 4, **HIERARCHICAL, "parallel.ep": 2},
    {"parallel.ranks_per_node": 3, **HIERARCHICAL, "parallel.ep": 1},
])  # fmt: skip
def test_dispatch_accepted(base, changes):
    validate(change(base, {"train.global_batch_tokens": 384 * 4, **changes}), 4)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_default_trains_on_more_ranks_without_another_option(world, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    validate(compose_train([]), world)


def test_a_share_that_is_no_whole_sequence_is_refused():
    with pytest.raises(UserError, match=r"train.global_batch_tokens=2048 is no multiple"):
        validate(compose_train([]), 3)
