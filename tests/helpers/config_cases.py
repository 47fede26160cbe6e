"""Configs with keys set, and those that the rules of several keys refuse, each with words of its message."""

import dataclasses
from dataclasses import replace

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
from moetrain.models.options import AttentionBackend
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.models.wiring_options import Wiring
from moetrain.moe.balance.settings import LossConfig, LossScope
from moetrain.moe.options import Backend, ExpertKind, Keep
from moetrain.train.optim.options import AdamW8bitConfig, MuonConfig
from moetrain.train.options import EngineConfig, Precision, Residual

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
    (
        {"experts.kind": ExpertKind.adapters, "model.num_shared_experts": 1},
        "layer 0: adapters share the dense network: set model.num_shared_experts=0",
    ),
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
    ({"model.wiring": Wiring.shortcut}, "model.wiring=shortcut: shared experts", "num_shared_experts=1"),
    ({"model.future.layers": 1, "model.wiring": Wiring.momentum}, "model.wiring=momentum", "future.layers=1"),
    ({"train.future.weight": 0.1}, "train.future is of model.future.layers"),
    ({"model.layer_experts": (12, 6)}, "layer_experts=[12,6] has 2 numbers, but there are 4 MoE layers"),
    ({"model.layer_experts": (6, 6, 6, 6)}, "the largest is 6, but model.num_experts=12"),
    ({"model.layer_experts": (12, 12, 2, 12), "router.top_k": 3}, "layer 2: router.top_k=3 must lie between"),
    ({"model.expert_widths": (8, 8)}, "expert_widths=[8,8] has 2 numbers, but there are 12 experts"),
    ({"model.expert_widths": (0,) * 12}, "model.expert_widths=0 must be 1 or more"),
    (
        {"experts.kind": ExpertKind.adapters, "model.wiring": Wiring.residual},
        "layer 0: experts.kind=adapters has its network in the layer",
        "set model.wiring=plain",
    ),
    ({"experts.block": 0}, "experts.block=0"),
    ({"experts.backend": Backend.megablocks}, "has blocks of 128 rows, but experts.block=null"),
    ({"experts.backend": Backend.megablocks, "experts.block": 64}, "experts.block=64: set experts.block=128"),
    (
        {"experts.keep": Keep.inputs, "train.recompute": True},
        "experts.keep=inputs with train.recompute=true",
        "a third time",
    ),
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
    ({"replay.record": "here", "router.capacity_factor": 1.0}, "capacity or rounding takes some away"),
    ({"replay.force": "nowhere"}, "replay.force=nowhere holds no record of routes"),
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
        "balance.losses.0.name=lokality is not known; known: choice_balance, choice_share,",
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
    (
        {"balance.losses": [with_options(DIRICHLET, alpha=True)]},
        "options.alpha is a number or a list of",
    ),
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
    ({"train.task": "next_tokn"}, "train.task=next_tokn is not known; known: next_token, thor (did you"),
    (
        {"model.attention": "auto"},
        "model.attention=auto is not known; known: gated_delta, grouped_query",
        BACKEND,
    ),
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
    ({"optim": AdamW8bitConfig(), "train.precision": Precision.fp64}, "=fp64 with optim=adamw_8bit"),
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
    ({"engine": EngineConfig(name="warp")}, "engine.name=warp is not known; known: deepspeed, native"),
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
