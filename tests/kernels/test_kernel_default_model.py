"""Three training steps of the default model by the Triton backends, interpreted: equal to ``loop``."""

from __future__ import annotations

from pathlib import Path

import interpreted  # noqa: F401  before any kernel
import pytest
import tiny
from torch import Tensor

from moetrain.cli import main

STEPS = 3
FEW_TOKENS = [  # all else is what ``moetrain train`` takes, and a vocabulary of its default tokenizer's size
    "data=local", "data.tokenizer.kind=bytes", "model.vocab_size=4096", "data.seq_len=16",
    "train.micro_batch_size=2", "train.global_batch_tokens=32", "train.threads=1", "train.deterministic=true",
    "experts.block=16", f"train.steps={STEPS}", f"checkpoint.every={STEPS}", "train.eval_every=0",
    "train.eval_samples=1", "train.sample_tokens=1",
]  # fmt: skip


def trained(corpus: Path, run: Path, backend: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The rows of the steps, and the weights after them."""
    data = [f"data.path={corpus}/text", f"data.cache_dir={corpus}/cache"]
    assert main(["train", f"run.dir={run}", *data, *FEW_TOKENS, f"experts.backend={backend}"]) == 0
    tensors, _ = tiny.contents(tiny.checkpoint(run, STEPS))
    return tiny.steps(run), {name: t for name, t in tensors.items() if name.startswith("model.")}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("training")
@pytest.mark.parametrize("backend", ["triton", "triton_block_sparse"])
@pytest.mark.filterwarnings("error:.*experts.backend")  # the kernels compute, or it fails
def test_three_steps_of_the_default_model(backend: str, corpus: Path, tmp_path: Path) -> None:
    want_rows, want_tensors = trained(corpus, tmp_path / "loop", "loop")
    got_rows, got_tensors = trained(corpus, tmp_path / backend, backend)
    assert len(want_rows) == len(got_rows) == STEPS
    for want, got in zip(want_rows, got_rows, strict=True):
        print(backend, {k: (want[k], got[k]) for k in ("train/loss", "train/grad_norm")})
        assert got["train/loss"] == pytest.approx(want["train/loss"], rel=1e-6)
        assert got["train/grad_norm"] == pytest.approx(want["train/grad_norm"], rel=1e-5)
    off = {name: (got_tensors[name] - tensor).abs() for name, tensor in want_tensors.items()}
    mean = {name: float(difference.square().mean().sqrt()) for name, difference in off.items()}
    largest = max(float(difference.max()) for difference in off.values())
    print(backend, "weights: root mean square of a tensor at most", max(mean.values()), "largest", largest)
    # AdamW moves a weight by the learning rate (1.2e-3 in all) however small its gradient: where that is
    # rounding alone, so is the direction.
    assert max(mean.values()) <= 1e-6, mean
    assert largest <= 1e-4
