"""An upcycled model laid out over ranks still computes what the dense one did.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from moetrain.checkpoint.state_dict import model_tensors
from moetrain.cli import main
from moetrain.config.hydra.compose import compose_train, load_yaml
from moetrain.config.stored import trained_config
from moetrain.convert.open_model import open_model
from moetrain.data import load_tokenizer
from moetrain.parallel.ranks import run_ranks
from moetrain.train.assemble import assemble
from moetrain.train.initial import load_initial

DENSE = ("model.num_experts=0", "balance=none", "train.precision=fp64", "train.steps=5", "model.init_std=0.3")
LAYOUTS = {
    "ep 2": ["parallel.ep=2"],
    "ep 2 x efsdp 2": ["parallel.ep=2", "parallel.dp_shard=4"],
    "hsdp 2 x ep 2": ["parallel.ep=2", "parallel.dp_shard=2", "parallel.dp_replicate=2"],
}


def ids() -> Tensor:
    return torch.randint(257, (3, tiny.SEQ), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def models(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A dense fp64 run, and what became of it by each of two methods."""
    root = tmp_path_factory.mktemp("upcycled")
    dense = root / "dense"
    sizes = {"copy": ["model.num_experts=8"], "granular": ["model.num_experts=8", "model.d_ff_expert=12"]}
    made = {}
    with tiny.alone():
        assert tiny.train(corpus, dense, *DENSE) == 0
        for method, size in sizes.items():
            made[method] = root / method
            said = [f"source={dense}", f"target={made[method]}", f"method={method}", "prove=false"]
            assert main(["upcycle", *said, *size, "router.top_k=2"]) == 0
    return dense, made


@torch.no_grad()
def logits_on(rank: int, world: int, folders: list[str], layout: list[str]) -> list[Tensor]:
    return [logits(folder, world, layout) for folder in folders]


def logits(folder: str, world: int, layout: list[str]) -> Tensor:
    """[B, S, V] of a model started from ``folder`` as training starts it."""
    cfg = compose_train([f"init_from={folder}", "train.precision=fp64", *layout])
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    made = assemble(cfg, tokenizer.vocab_size, "cpu", world)
    load_initial(Path(folder), model_tensors(made.task.model), {}, tokenizer, load_yaml)
    made.task.eval()
    logits_BSV = made.task(ids()).logits_BSV
    assert logits_BSV is not None
    return logits_BSV


@pytest.mark.parametrize(
    "layout",
    [
        "ep 2",
        pytest.param("ep 2 x efsdp 2", marks=pytest.mark.real),
        pytest.param("hsdp 2 x ep 2", marks=pytest.mark.slow),
    ],
)
def test_the_function_is_kept(models: tuple[Path, dict[str, Path]], layout: str) -> None:
    dense, made = models
    model = open_model(dense, trained_config).build()
    with torch.no_grad():
        expected_BSV = model.logits(model(ids()).hidden_BSD)
    assert expected_BSV.dtype is torch.float64
    scale = expected_BSV.abs().max().item()
    assert scale > 1
    world = 2 if layout == "ep 2" else 4
    folders = [str(folder) for folder in made.values()]
    found = run_ranks(logits_on, world, folders, LAYOUTS[layout])
    assert len(found) == world
    for logits_BSV in (value for of_rank in found for value in of_rank):
        torch.testing.assert_close(logits_BSV, expected_BSV, rtol=1e-12, atol=1e-12 * scale)
