"""Options of routers, experts and losses through the whole trainer: resumed, recomputed, generating."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny

from moetrain.cli import main

pytestmark = [pytest.mark.usefixtures("training"), pytest.mark.real]

PRIOR = "{name: dirichlet, scope: sequence, stop_step: 2, options: {by_domain: [[1, 2, 0.5, 1, 1]]}}"
OPTIONS = {
    "base, of the stream": ["router=base", "router.affinity=stream"],
    "dirichlet of domains, stopped": ["router=topk", f"balance.losses=[{PRIOR}]"],
    "dropout between the layers": ["router=switch", "experts=switch_finetune"],
    "dynmoe for deepspeed": ["router=dynmoe_deepspeed", "router.interval=2"],
    "adapters and products": ["experts=adapters", "model.lora.rank=2"],
    "products around one network": ["experts.kind=low_rank", "model.lora.rank=2", "model.lora.dropout=0.1"],
    "layers that look ahead": ["router=topk_sigmoid", "balance=aux_free", "model.future.layers=2"],
}
THREE = ["train.steps=3", "checkpoint.every=1", "checkpoint.keep_last=9", "train.eval_every=3"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_resumed_and_recomputed_runs_have_the_same_bits(
    options: list[str], corpus: Path, tmp_path: Path
) -> None:
    run, copy, again = (tmp_path / name for name in ("run", "copy", "again"))
    assert tiny.train(corpus, run, *options, *THREE) == 0
    shutil.copytree(run, copy)
    for step in (2, 3):
        shutil.rmtree(tiny.checkpoint(copy, step))
    assert tiny.train(corpus, copy, *options, *THREE) == 0
    assert tiny.train(corpus, again, *options, *THREE, "train.recompute=true") == 0
    for other in (copy, again):
        assert tiny.steps(other) == tiny.steps(run)
        assert tiny.evaluations(other) == tiny.evaluations(run)
        tensors, others = (tiny.contents(tiny.checkpoint(folder, 3))[0] for folder in (run, other))
        assert not [key for key, tensor in tensors.items() if not tensor.equal(others[key])]
    assert main(["generate", f"checkpoint={run}", "prompt=abc", "max_new_tokens=3"]) == 0
