"""The twin has its config's structure at a small size, and a proof is of nothing else."""

from __future__ import annotations

import pytest

from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import smallest_world
from moetrain.models.options import attention_kinds
from moetrain.verify.certificate import proof_hash
from moetrain.verify.twin import SEQ, twin_of


def twin(world: int, *overrides: str, most: int = 8):
    return twin_of(compose_train(list(overrides)), world, most)


@pytest.mark.parametrize(
    ("world", "overrides", "layout"),
    [
        (4, ["parallel.ep=4"], (1, 4, 4)),  # small enough as it is
        (64, ["parallel.ep=8"], (1, 4, 2)),
        (1024, ["parallel.ep=64"], (1, 4, 2)),
        (32, ["parallel.ep=4", "parallel.dp_replicate=4"], (2, 4, 2)),
        (128, [], (1, 2, 1)),
        (9, ["parallel.ep=3"], (1, 9, 3)),  # three and three: nothing smaller has both axes
    ],
)
def test_a_large_layout_keeps_its_axes(world, overrides, layout):
    small = twin(world, *overrides, "model.num_experts=192")
    parallel = small.cfg.parallel
    assert (parallel.dp_replicate, parallel.dp_shard, parallel.ep) == layout
    assert small.world == parallel.dp_replicate * parallel.dp_shard
    assert small.sequences % (2 * small.world) == 0


@pytest.mark.parametrize("experiment", ["olmoe_1b_7b", "mixtral_8x7b", "qwen3_30b_a3b", "qwen3_next_80b_a3b"])
def test_published_shapes_keep_their_structure(experiment):
    cfg = compose_train([f"experiment={experiment}", "parallel.ep=2", "parallel.dp_replicate=4"])
    small = twin_of(cfg, 16, 8).cfg
    assert small.model.num_experts == cfg.model.num_experts
    assert small.router.top_k == cfg.router.top_k
    assert small.model.qk_norm is cfg.model.qk_norm
    grouped = cfg.model.num_kv_heads not in (None, cfg.model.num_heads)
    assert (small.model.num_kv_heads < small.model.num_heads) == grouped
    assert small.model.d_model * small.model.num_layers < 100
    assert attention_kinds(small.model) == attention_kinds(cfg.model)


def test_what_a_published_model_adds_is_in_the_twin():
    options = ["num_shared_experts=4", "d_ff_shared=5632", "shared_gate=true", "qkv_bias=true"]
    rope = ["kind=yarn", "factor=4", "original_max_positions=32768"]
    model = twin(2, *(f"model.{o}" for o in options), *(f"model.rope_scaling.{r}" for r in rope)).cfg.model
    assert (model.num_shared_experts, model.shared_gate, model.qkv_bias) == (2, True, True)
    assert model.d_ff_shared not in (None, 2 * model.d_ff_expert)
    assert model.rope_scaling.original_max_positions < SEQ
    assert (model.rope_scaling.kind.name, model.rope_scaling.factor) == ("yarn", 4.0)


@pytest.mark.parametrize(("ep", "layout"), [(2, (2, 1)), (4, (4, 2)), (64, (4, 2)), (8, (8, 4))])
def test_rows_that_go_by_nodes_do_in_the_twin(ep, layout):
    """(ep, ranks of a node); how many ranks a node really has is not known here."""
    options = [f"parallel.ep={ep}", "parallel.dispatcher=hierarchical", "model.num_experts=192"]
    parallel = twin(ep, *options).cfg.parallel
    assert (parallel.ep, parallel.ranks_per_node) == layout


def test_where_fsdp_cuts_through_experts_it_does_in_the_twin():
    """128 experts over ep 64 leave two a rank, for 16 ranks to share."""
    small = twin(1024, "parallel.ep=64", "model.num_experts=128")
    ways = small.cfg.parallel.dp_shard // small.cfg.parallel.ep
    assert small.cfg.model.num_experts // small.cfg.parallel.ep % ways
    assert small.cfg.model.d_model % ways == small.cfg.model.d_ff_expert % ways == 0
    assert small.cfg.model.num_experts > 100


def test_capacities_drop_and_rounds_are_several_in_the_twin():
    small = twin(2, "router=topk", "router.capacity_factor=1.0", "experts.max_rows_per_rank=100000").cfg
    assert small.router.min_capacity <= 1
    assert small.experts.max_rows_per_rank < 20


def test_a_proof_is_of_structure_and_layout():
    def of(world: int, *overrides: str) -> str:
        return proof_hash(compose_train(list(overrides)), world)

    base = of(4, "parallel.ep=2")
    assert base == of(4, "parallel.ep=2", "optim.lr=0.5", "data.seq_len=64", "train.seed=3", "run.name=x")
    assert base == of(
        4,
        "parallel.ep=2",
        "parallel.dp_shard=4",
        "model.d_model=512",
        "train.precision=bf16",
        "parallel.timeout=9",
    )
    others = [
        of(2, "parallel.ep=2"),
        of(4, "parallel.ep=4"),
        of(4, "parallel.ep=2", "router=relu"),
        of(4, "parallel.ep=2", "model.num_experts=16"),
        of(4, "parallel.ep=2", "optim=muon"),
        of(4, "parallel.ep=2", "train.recompute=true"),
        of(4, "parallel.ep=2", "parallel.overlap=2"),
    ]
    assert len({base, *others}) == 8


def test_the_smallest_world_of_a_layout():
    def world(*overrides: str) -> int:
        return smallest_world(compose_train(list(overrides)).parallel)

    assert world() == 2
    assert world("parallel.ep=4", "parallel.dp_replicate=2") == 8
    assert world("parallel.ep=2", "parallel.dp_shard=6") == 6
