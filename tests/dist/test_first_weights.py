"""A fresh model has the same bits on every layout, and no rank holds more of a parameter than its shard."""

from __future__ import annotations

import own_layer
import pytest
import torch
from largest import Largest
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.checkpoint.state_dict import model_tensors
from moetrain.config.hydra.compose import compose_train
from moetrain.models.feed_forward import FEED_FORWARDS
from moetrain.ops.local_part import local_part
from moetrain.parallel.ranks import run_ranks
from moetrain.train.assemble import assemble

VOCAB = 61
MODEL = [
    *("data=local", "data.path=unused", "data.seq_len=8", "model.d_model=28", "model.num_layers=2"),
    *("model.num_heads=2", "model.d_ff=11", "model.d_ff_expert=13", "model.num_experts=8"),
    *("model.num_shared_experts=1", "model.qkv_bias=true", "train.seed=11"),
]
ROUTERS = {
    "topk": ["router=topk"],
    "orthogonal": ["router=base"],
    "equal rows": ["router=sigma"],
    "buffers": ["router=dynmoe"],
    "parameters": ["router=moepp"],
    "hashed": ["router=hash"],
    "a plug-in's layer": ["router=topk", "model.first_dense=1"],
}
LAYOUTS = {
    "dp 2": (2, []),
    "ep 2": (2, ["parallel.ep=2"]),
    "ddp 2": (2, ["parallel.dp_replicate=2", "parallel.dp_shard=1"]),
    "ep 4": (4, ["parallel.ep=4"]),
    "ep 2 x efsdp 2": (4, ["parallel.ep=2"]),
    "hsdp 2 x ep 2": (4, ["parallel.dp_replicate=2", "parallel.ep=2"]),
    "ep 8": (8, ["parallel.ep=8"]),
    "hsdp 2 x ep 2 x efsdp 2": (8, ["parallel.dp_replicate=2", "parallel.ep=2"]),
    "dp 8": (8, []),
}
FEW = ("ep 2", "ddp 2", "ep 2 x efsdp 2")


def tensors(rank: int, world: int, names: list[str], precision: str) -> dict[str, dict[str, Tensor]]:
    """By "router, layout": the whole of every tensor of a fresh model, and the largest tensor held."""
    found = {}
    for name in names:
        router, layout = name.split(", ")
        parallel = LAYOUTS[layout][1] if world > 1 else []
        cfg = compose_train([*MODEL, *ROUTERS[router], *parallel, f"train.precision={precision}"])
        with pytest.MonkeyPatch.context() as patch:
            if "plug-in" in router:
                patch.setitem(FEED_FORWARDS, "dense", own_layer.build)
            held = model_tensors(assemble(cfg, VOCAB, "cpu", world).task.model)
        whole = {
            k: t.detach().full_tensor() if isinstance(t, DTensor) else t.clone() for k, t in held.items()
        }
        found[name] = whole if rank == 0 else {}
    return found


def largest(rank: int, world: int, parallel: list[str]) -> tuple[int, int]:
    """The largest tensor made on the way, and the largest shard held in the end; in elements."""
    cfg = compose_train([*MODEL, *parallel])
    with Largest() as seen:
        model = assemble(cfg, VOCAB, "cpu", world).task.model
    return seen.numel, max(local_part(t).numel() for t in model_tensors(model).values())


def check(world: int, layouts: list[str], precision: str = "fp32") -> None:
    names = [f"{router}, {layout}" for layout in layouts for router in ROUTERS]
    one = run_ranks(tensors, 1, names, precision)[0]
    many = run_ranks(tensors, world, names, precision)[0]
    for name in names:
        assert one[name].keys() == many[name].keys()
        differing = [key for key, tensor in one[name].items() if not tensor.equal(many[name][key])]
        assert not differing, name


@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_draws_the_same_weights(world):
    check(world, [layout for layout in FEW if LAYOUTS[layout][0] == world])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_all_layouts_draw_the_same_weights(world, precision):
    check(world, [layout for layout in LAYOUTS if LAYOUTS[layout][0] == world], precision)


@pytest.mark.parametrize("layout", ["ep 2", "dp 2"])
def test_no_rank_makes_a_tensor_larger_than_its_shards(layout):
    for made, held in run_ranks(largest, 2, LAYOUTS[layout][1]):
        assert made <= held


def test_seeds_and_names_draw_others():
    def model(seed: int) -> dict[str, Tensor]:
        cfg = compose_train([*MODEL, f"train.seed={seed}"])
        return model_tensors(assemble(cfg, VOCAB, "cpu", 1).task.model)

    one, other = model(1), model(2)
    alike = [key for key in one if one[key].equal(other[key])]
    assert all("norm" in key or ".b_" in key or "bias_E" in key for key in alike)
    assert not torch.equal(one["model.blocks.0.attention.w_out_DQ"], one["model.blocks.1.attention.w_out_DQ"])
