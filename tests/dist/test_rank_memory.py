"""benchmarks/rank_memory.py: rank 0 of four, all of it fake, counts what the real rank 0 of four counts."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import rank_memory
import rehearsal

from moetrain.config.hydra.compose import compose_train
from moetrain.errors import UserError
from moetrain.models.count import abstract_decoder, count_parameters
from moetrain.packages import is_installed
from moetrain.parallel.ranks import run_ranks
from moetrain.train.options import TrainConfig

pytestmark = pytest.mark.real

WORLD = 4
T, D, E, K = 11, 14, 6, 3  # 33 assignments do not go evenly to 6 experts, nor 263 words or a width to 4 ranks
TINY = [
    "data.tokenizer.kind=bytes", "model.vocab_size=263", f"model.d_model={D}", "model.num_layers=2",
    "model.num_heads=2", "model.head_dim=6", "model.d_ff=10", "model.d_ff_expert=5", f"model.num_experts={E}",
    "model.num_shared_experts=1", "model.first_dense=1", "router=qwen3", f"router.top_k={K}",
    "balance=switch", f"data.seq_len={T}", "train.micro_batch_size=1",
    f"train.global_batch_tokens={WORLD * T}", "train.device=cpu", "parallel.ep=2",
]  # fmt: skip
HIERARCHICAL = ["parallel.dispatcher=hierarchical", "train.precision=bf16"]
FOUR = ["parallel.ep=4", "model.num_experts=8"]
CASES = {
    "bf16, recompute": ["train.precision=bf16", "train.recompute=true"],
    "hsdp, fp32, muon": ["parallel.dp_replicate=2", "optim=muon"],
    "latent attention": [
        "model.attention=latent", "model.head_dim=null", "model.latent.q_lora_rank=7",
        "model.latent.kv_lora_rank=5", "model.latent.qk_nope_head_dim=3", "model.latent.qk_rope_head_dim=4",
        "model.latent.v_head_dim=9", "train.precision=bf16", "train.recompute=true",
    ],
    "hierarchical, two nodes of one rank": [*HIERARCHICAL, "parallel.ranks_per_node=1"],
    "hierarchical, two nodes of two ranks": [*HIERARCHICAL, "parallel.ranks_per_node=2", *FOUR],
    "hierarchical, no node sums": [
        *HIERARCHICAL,
        "parallel.ranks_per_node=2",
        *FOUR,
        "parallel.node_sums=false",
    ],
}  # fmt: skip
if is_installed("bitsandbytes"):
    CASES["8-bit moments"] = ["optim=adamw_8bit", "optim.min_8bit_size=100"]
EVEN = [
    "model.vocab_size=264", "model.d_model=16", "model.d_ff_expert=8", "model.head_dim=4",
    "model.num_experts=8", "model.first_dense=0",
]  # fmt: skip


def composed(*overrides: str) -> TrainConfig:
    return compose_train([*TINY, *overrides])


def fake(*overrides: str) -> dict[str, Any]:
    return rank_memory.rehearse(composed(*overrides), WORLD)


def real(rank: int, world: int, configs: list[TrainConfig]) -> list[dict[str, Any]]:
    """The lowest peak of three: gloo's threads may hold a sum's buffers a moment after it was waited for."""
    measured = [[rank_memory.measure(cfg, world, None) for _ in range(3)] for cfg in configs]
    return [min(found, key=lambda counted: counted["peak"]["Total"]) for found in measured]


@pytest.fixture(scope="module")
def of_a_real_rank() -> dict[str, dict[str, Any]]:
    first = run_ranks(real, WORLD, [composed(*case) for case in CASES.values()])[0]
    return dict(zip(CASES, first, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_fake_rank_counts_the_bytes_of_a_real_one(name, of_a_real_rank):
    """Every figure, though the real rank learns its counts from the others.

    Parameters, gradients, optimizer, activations, the peak's parts, the collectives.
    """
    assert fake(*CASES[name]) == of_a_real_rank[name]
    assert not dist.is_initialized()


@cache
def even(layers: int) -> tuple[TrainConfig, dict[str, Any]]:
    """Widths that four ranks divide, all layers MoE and recomputed."""
    overrides = [*EVEN, f"model.num_layers={layers}", "train.recompute=true", "train.precision=bf16"]
    return composed(*overrides), fake(*overrides)


def test_what_divides_evenly_is_held_evenly_under_adamw():
    cfg, found = even(2)
    model = abstract_decoder(cfg.model, cfg.router, cfg.experts, 264)
    counts = count_parameters(model)
    experts, others = counts.experts * 4 // WORLD, (counts.total - counts.experts) * 4 // WORLD
    assert found["parameters"] == found["gradients"] == {"experts": experts, "others": others}
    of_experts = [".experts." in name for name, _ in model.named_parameters()]
    steps = {"experts": 4 * of_experts.count(True), "others": 4 * of_experts.count(False)}  # fp32 scalars
    assert found["optimizer"] == {kind: 2 * size + steps[kind] for kind, size in found["parameters"].items()}


def test_what_a_recomputed_layer_keeps():
    """By hand: what a third layer adds."""
    tokens, width, num_experts, assignments = T, 16, 8, T * K
    block_input = tokens * width * 2  # bf16
    record = 2 * tokens * num_experts * 4 + assignments * (8 + 4 + 8)  # scores, logits; ids, weights, choice
    record += 2 * (num_experts + 1) * 8 + 8  # counts, demand with a place for padding; tokens
    way_back = assignments * 8 + tokens * 8  # which rows are a token's, and where they end
    added = even(3)[1]["activations"] - even(2)[1]["activations"]
    assert added == block_input + record + way_back


def test_rows_are_dealt_in_turn():
    assert rehearsal.in_turn(33, 6) == [6, 6, 6, 5, 5, 5]
    assert rehearsal.in_turn(2, 5) == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["router.capacity_factor=1.5"], "reads a value on the host"),
        (["parallel.dispatcher=all_gather"], "parallel.dispatcher=all_gather reads counts"),
        (["router=relu"], "router=relu fixes no number of rows"),
        (["train.global_batch_tokens=88"], "or train.global_batch_tokens=44"),
        (["model.vocab_size=null"], "model.vocab_size=null"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        fake(*overrides)
    assert not dist.is_initialized()
