"""Losses of engine=deepspeed beside those of engine=native, on real text in fp32, on two CPU ranks.

    pip install 'moetrain[deepspeed]'
    python benchmarks/deepspeed_losses.py --steps 100

Each row is a run of its own by DeepSpeed's launcher against one by torchrun, with the same overrides: the
largest difference of the training loss over the first ten steps, and over all of them. The first rows compare
native runs: what another order of sums makes of the same numbers. Last, one folder goes on from engine to
engine, DeepSpeed, native, DeepSpeed, against a native run that was never interrupted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BIN = Path(sys.executable).parent
ALONE = [sys.executable, "-m", "moetrain"]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "moetrain"]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2", "--module", "moetrain"]
OVERRIDES = [
    "model.d_model=64", "model.num_layers=2", "model.d_ff=128", "model.d_ff_expert=64", "data.seq_len=64",
    "train.micro_batch_size=4", "train.global_batch_tokens=1024", "train.device=cpu", "train.threads=1",
    "train.eval_every=0", "train.eval_samples=4", "train.sample_tokens=1",
]  # fmt: skip


def train(launcher: list[str], engine: list[str], steps: int, folder: Path) -> list[float]:
    """The loss of every step in ``folder``, which the run goes on with."""
    command = [*launcher, "train", *OVERRIDES, *engine, f"train.steps={steps}", f"run.dir={folder}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == steps, (len(losses), steps)
    return losses


def apart(one: list[float], other: list[float]) -> str:
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return f"{max(differences[:10]):9.1e} {max(differences):9.1e}   {other[-1]:.6f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4))
    args = parser.parse_args()
    steps, stages = args.steps, args.stages
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{'':34} {'10 steps':>9} {f'{steps} steps':>9}   loss of the last step", flush=True)
        one = train(ALONE, ["engine=native"], steps, folder / "alone")
        native = {}
        for ep in (1, 2):
            native[ep] = train(
                TORCHRUN, ["engine=native", f"parallel.ep={ep}"], steps, folder / f"native{ep}"
            )
            print(f"native ep {ep} against one process     {apart(one, native[ep])}", flush=True)
        print(f"native ep 2 against native ep 1      {apart(native[1], native[2])}", flush=True)
        for stage in stages:
            for ep in (1, 2)[: 1 if stage == 3 else 2]:  # stage 3 does not spread experts
                engine = ["engine=deepspeed", f"engine.zero_stage={stage}", f"parallel.ep={ep}"]
                losses = train(DEEPSPEED, engine, steps, folder / f"stage{stage}ep{ep}")
                row = f"stage {stage}, ep {ep} against native ep {ep}   "
                print(f"{row} {apart(native[ep], losses)}", flush=True)
        third = steps // 3
        for stage in stages:
            moved, ep = folder / f"moved{stage}", 1 if stage == 3 else 2
            engine = ["engine=deepspeed", f"engine.zero_stage={stage}", f"parallel.ep={ep}"]
            train(DEEPSPEED, engine, third, moved)
            train(TORCHRUN, ["engine=native", "parallel.ep=1"], 2 * third, moved)
            losses = train(DEEPSPEED, engine, steps, moved)
            print(f"stage {stage}, native, stage {stage}, by thirds {apart(native[ep], losses)}", flush=True)


if __name__ == "__main__":
    main()
