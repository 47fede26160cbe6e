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
    "train.micro_batch_size=2", "train.global_batch_tokens=64", "train.threads=1", "train.deterministic=true",
    "experts.block=16",
    f"train.steps={STEPS}", f"checkpoint.every={STEPS}", "train.eval_every=0", "train.eval_samples=1",
    "train.sample_tokens=1",
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
    off = {name: float((got_tensors[name] - t).abs().max()) for name, t in want_tensors.items()}
    print("largest difference of a weight", max(off.values()), max(off, key=lambda name: off[name]))
    assert max(off.values()) <= 1e-5, off
