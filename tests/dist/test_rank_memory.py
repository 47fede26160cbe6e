"""benchmarks/rank_memory.py: rank 0 of four, all of it fake, counts what the real rank 0 of four counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from spawn import run_ranks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import rank_memory

from moetrain.config.compose import compose_train
from moetrain.errors import UserError

WORLD = 4
# 33 assignments a rank do not go evenly to 6 experts, nor the vocabulary or the widths to 4 ranks.
TINY = [
    "data.tokenizer.kind=bytes", "model.vocab_size=263", "model.d_model=14", "model.num_layers=3", "model.num_heads=2", "model.head_dim=6",
    "model.d_ff=10", "model.d_ff_expert=5", "model.num_experts=6", "model.num_shared_experts=1",
    "model.first_dense=1", "router=qwen3", "router.top_k=3", "balance=switch", "data.seq_len=11",
    "train.micro_batch_size=1", f"train.global_batch_tokens={WORLD * 11}", "train.device=cpu",
]  # fmt: skip
CASES = {
    "fp32": ["parallel.ep=2"],
    "bf16, recompute": ["parallel.ep=2", "train.precision=bf16", "train.recompute=true"],
    "hsdp": ["parallel.ep=2", "parallel.dp_replicate=2", "train.precision=bf16"],
    "muon": ["parallel.ep=2", "optim=muon"],
}


def composed(*overrides: str) -> Any:
    return compose_train([*TINY, *overrides])


def real(rank: int, world: int) -> dict[str, Any]:
    return {name: rank_memory.measure(composed(*case), world, None) for name, case in CASES.items()}


def fake(rank: int, world: int) -> dict[str, Any]:
    return {name: rank_memory.rehearse(composed(*case), WORLD) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, Any], dict[str, Any]]:
    return run_ranks(fake, 1, init=False)[0], run_ranks(real, WORLD)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_fake_rank_counts_the_bytes_of_a_real_one(found, name):
    expected = found[1][name]
    assert found[0][name] == expected
    assert min(expected["activations"], expected["gathered"], expected["collectives"]["alltoall_base"]["calls"])
