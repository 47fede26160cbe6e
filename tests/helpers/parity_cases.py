"""What is proved equal to one process, and the layouts on which: every router, layer and wiring there is.

A router that is registered is in ``SUBJECTS`` by itself, from its own yaml, and so is a feed-forward layer of
``layer_cases``; what needs options of its own is named here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from layer_cases import COMMAND
from wiring_cases import WIRINGS

from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.errors import UserError
from moetrain.moe import ROUTERS
from moetrain.parallel.options import ParallelConfig
from moetrain.parallel.ranks import RankError, RanksTimeoutError
from moetrain.train.options import Precision, TrainConfig
from moetrain.verify.command import prove_each
from moetrain.verify.compare import Check
from moetrain.verify.twin import Twin, twin_of

MODEL = [
    "model.num_experts=8", "model.num_shared_experts=1", "model.d_ff_shared=96", "model.shared_gate=true",
    "model.qkv_bias=true", "model.rope_scaling.kind=yarn", "model.rope_scaling.factor=2",
    "model.rope_scaling.original_max_positions=64",
]  # fmt: skip
VARIANTS = {
    "topk": ["router=topk", "router.capacity_factor=1.2", "router.jitter=0.1", "balance=switch"],
    "sigmoid": ["router=sigmoid", "router.num_groups=4", "router.top_groups=2", "balance=aux_free"],
    "expert_choice": ["router=expert_choice"],
    "expert_choice, all": ["router=expert_choice", "router.group=all"],
    "relu": ["router=relu"],
    "base": ["router=base"],
    "base, all": ["router=base", "router.group=all", "router.solver=auction"],
    "moepp": ["router=moepp", "router.capacity_factor=1.1"],
    "sparsemixer2": ["router=sparsemixer2"],
    "quantile": ["router=sigmoid", "balance=quantile"],
    "phi": ["router=topk", "balance=phi"],
    "rounds": ["router=topk", "experts.max_rows_per_rank=64", "balance=sequence"],
}
# options that other tests prove on one layout or two
MORE = {
    "rounding": ["router=topk", "router.rounding=nearest"],
    "local repair": [
        "router=topk", "router.repair=local_fill_in", "router.capacity_factor=0.7", "router.local_devices=2",
        "router.local_sequences=2",
    ],
    "dropout": ["router=topk", "experts.dropout=0.4", "experts.input_dropout=0.1"],
    "permutation": ["router=topk", "router.permutation_steps=1", "balance=penalty"],
    "frozen experts": ["router=module_former", "experts.frozen=3", "router.held=3"],
    "avg_k, scores": ["model=avg_k", "model.avg_k.weight=score", "balance=switch_only"],
}  # fmt: skip
LAYOUTS = {
    "dp 2": (2, []),
    "ep 2": (2, ["parallel.ep=2"]),
    "dp 4": (4, []),
    "ep 4": (4, ["parallel.ep=4"]),
    "ep 2 x efsdp 2": (4, ["parallel.ep=2"]),
    "hsdp 2 x 2": (4, ["parallel.dp_replicate=2"]),
    "hsdp 2 x ep 2": (4, ["parallel.dp_replicate=2", "parallel.ep=2"]),
    "ddp 4": (4, ["parallel.dp_replicate=4", "parallel.dp_shard=1"]),
    "hierarchical, ep 4": (4, ["parallel.ep=4", "parallel.dispatcher=hierarchical"]),
    "all_gather, ep 2 x efsdp 2": (4, ["parallel.ep=2", "parallel.dispatcher=all_gather"]),
    "overlap 2, ep 2": (2, ["parallel.ep=2", "parallel.overlap=2"]),
    "ep 8": (8, ["parallel.ep=8"]),
    "ep 2 x efsdp 4": (8, ["parallel.ep=2"]),
    "ep 4 x efsdp 2": (8, ["parallel.ep=4"]),
    "hsdp 2 x ep 4": (8, ["parallel.dp_replicate=2", "parallel.ep=4"]),
    "hsdp 2 x ep 2 x efsdp 2": (8, ["parallel.dp_replicate=2", "parallel.ep=2"]),
}
# experts that eight ranks can share, where the wiring's own number cannot be
EIGHT = {
    "pr_moe": ["model.num_experts=16", "model.layer_experts=[8,16]"],
    "hmoe": ["model.num_experts=8", "model.expert_widths=[4,12,8,8,4,12,8,8]"],
    "drelu": ["model.num_experts=8", "model.num_layers=2", "model.d_ff_expert=12"],
}
SUBJECTS: dict[str, list[str]] = {
    **{f"router {name}": [*MODEL, f"router={name}"] for name in sorted(ROUTERS)},
    **{f"variant {name}": [*MODEL, *given, "model.first_dense=1"] for name, given in VARIANTS.items()},
    **{f"option {name}": ([] if "model=avg_k" in given else MODEL) + given for name, given in MORE.items()},
    **{f"layer {name}": given for name, given in COMMAND.items()},
    **{
        f"wiring {name}": [*given, *EIGHT.get(name, ["model.num_experts=8"])]
        for name, given in WIRINGS.items()
    },
}
CASES = [(subject, layout) for subject in SUBJECTS for layout in LAYOUTS]
EQUAL, REFUSED, WRONGLY_REFUSED = "equal", "refused", "refused, and should not be"


@dataclass(frozen=True)
class Verdict:
    """``kind``: equal, refused (expert parallelism, by a layer without a use for it), else what is wrong."""

    kind: str
    numbers: int = 0
    text: str = ""

    @property
    def good(self) -> bool:
        return self.kind in (EQUAL, REFUSED)


def judge(subject: str, layouts: Sequence[str], tolerance: float = 1e-9) -> dict[str, Verdict]:
    """Prove a subject on layouts of one number of ranks, in fp64, by ranks that live on from one to the next.

    Where one of them fails, each is proved by ranks of its own.
    """
    verdicts: dict[str, Verdict] = {}
    twins: dict[str, Twin] = {}
    cfg = compose_train(SUBJECTS[subject])
    for layout in layouts:
        try:
            twins[layout] = twin(cfg, layout)
        except UserError as error:
            expected = "so it has no use for parallel.ep" in str(error)
            verdicts[layout] = Verdict(REFUSED if expected else WRONGLY_REFUSED, 0, str(error))
    try:
        found = prove_each(list(twins.values()), tolerance) if twins else []
    except (RankError, RanksTimeoutError) as error:
        if len(twins) > 1:
            for layout in twins:
                verdicts |= judge(subject, [layout], tolerance)
            return verdicts
        (layout,) = twins
        return verdicts | {layout: Verdict("failed", 0, str(error).strip().splitlines()[-1])}
    return verdicts | {layout: _verdict(checks) for layout, checks in zip(twins, found, strict=True)}


def twin(subject: TrainConfig, layout: str) -> Twin:
    """Raises UserError for a layout that the subject, which has none, refuses."""
    assert subject.parallel == ParallelConfig()
    world = LAYOUTS[layout][0]
    cfg = replace(subject, parallel=_parallel(layout))
    validate(cfg, world)
    small = twin_of(cfg, world, 8)
    return replace(small, cfg=replace(small.cfg, train=replace(small.cfg.train, precision=Precision.fp64)))


@functools.cache
def _parallel(layout: str) -> ParallelConfig:
    return compose_train(LAYOUTS[layout][1]).parallel


def _verdict(checks: Sequence[Check]) -> Verdict:
    broken = [check.problem for check in checks if not check.holds]
    numbers = sum(check.number for check in checks)
    if broken:
        return Verdict("differs", numbers, str(broken[0]))
    return Verdict(EQUAL if numbers > 100 else "compared too little", numbers)
