"""Each rank's peak resident memory from nothing to the first step, beside what its shards take.

    python benchmarks/start_memory.py FOLDER [KEY=VALUE ...] [--ranks 1 2 4] [--sources drawn converted]

Real gloo ranks on this machine start one layer of Qwen3-30B-A3B's widths with a vocabulary of 32,768 (0.76 B
parameters, 3 GB in fp32) by the trainer's own path: drawn, from a Hugging Face folder, from that folder
converted (each tensor in one block), and from a checkpoint of 4 ranks with ep 4. FOLDER takes 15 GB and is
left for the next call. Options: those of ``moetrain train``.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from timing import machine, write_json
from torch import Tensor

from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.config.hydra.compose import compose_train, load_yaml
from moetrain.ops.local_part import local_part
from moetrain.parallel.ranks import run_ranks
from moetrain.plain import to_yaml
from moetrain.train.engine import NativeEngine
from moetrain.train.options import TrainConfig
from moetrain.train.run_files import CONFIG, TOKENIZER
from moetrain.train.start import start

MODEL = [
    *("experiment=qwen3_30b_a3b", "model.num_layers=1", "model.vocab_size=32768", "data=local"),
    *("data.seq_len=16", "train.micro_batch_size=1", "train.global_batch_tokens=64"),
    *("train.threads=1", "train.eval_every=0", "train.sample_tokens=0", "checkpoint.every=1"),
    *("schedule.warmup_steps=1", "schedule.horizon=10", "train.steps=1"),
]
SOURCES = ["drawn", "Hugging Face", "converted", "checkpoint"]
LAYOUTS = {1: ["ep 1"], 2: ["ep 1", "ep 2"], 4: ["ep 1", "ep 4"]}
ALLOWED = 1.2, 0.7e9  # times the shards, plus what torch itself takes


def peak_memory(reset: bool = False) -> int:
    """Most bytes of this process that were resident since it began, or since the last ``reset``."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def begin(rank: int, world: int, cfg: TrainConfig, checkpoint: Path | None) -> dict[str, int]:
    peak_memory(reset=True)
    folder = Path(cfg.run.dir or ".") / "checkpoints"
    built = start(cfg, "cpu", Checkpointer(folder), checkpoint, load_yaml)
    peak = peak_memory()
    engine = built.state.engine
    assert isinstance(engine, NativeEngine)
    optimizer = engine.optimizer.state.values()
    held = [*engine.task.parameters(), *(v for state in optimizer for v in state.values())]
    shards = sum(local_part(tensor).nbytes for tensor in held if isinstance(tensor, Tensor))
    built.state.loader.close()
    return {"shards": shards, "peak": peak}


def write_text(folder: Path) -> None:
    draw = random.Random(1)
    folder.mkdir(parents=True)
    words = ["a", "rank", "holds", "its", "shards", "and", "no", "more"]
    for number in range(100):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=300)))


def write_run(rank: int, world: int, cfg: TrainConfig, folder: Path) -> None:
    """A run folder with a checkpoint of before the first step, optimizer state included."""
    checkpointer = Checkpointer(folder / "checkpoints")
    built = start(cfg, "cpu", checkpointer, None, load_yaml)
    built.state.save(checkpointer)
    checkpointer.close()
    built.state.loader.close()
    if rank == 0:
        built.corpus.tokenizer.save(folder / TOKENIZER)
        (folder / CONFIG).write_text(to_yaml(cfg))


def prepare(folder: Path, options: list[str]) -> None:
    """The text, a run on 4 ranks, its export, and that converted; once."""
    if not (folder / "text").exists():
        write_text(folder / "text")
    if not (folder / "run" / CONFIG).exists():
        cfg = compose_train([*options, "data.tokenizer.kind=bytes", "parallel.ep=4", "run.dir=unused"])
        run_ranks(write_run, 4, cfg, folder / "run", timeout=1200)
    if not (folder / "hf").exists():
        export = ["export", f"checkpoint={folder}/run", f"target={folder}/hf", "family=qwen3_moe"]
        subprocess.run([sys.executable, "-m", "moetrain", *export], check=True)
    if not (folder / "converted").exists():
        convert = ["convert", f"source={folder}/hf", f"target={folder}/converted"]
        subprocess.run([sys.executable, "-m", "moetrain", *convert], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as moetrain train takes them")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES)
    parser.add_argument("--out")
    args = parser.parse_args()
    data = [f"data.path={args.folder}/text", f"data.cache_dir={args.folder}/cache"]
    options = [*MODEL, *data, *args.overrides]
    prepare(args.folder, options)
    checkpoint = args.folder / "run" / "checkpoints" / "step_00000000"
    found: list[dict[str, Any]] = []
    print(f"{'ranks':>5} {'layout':8} {'from':14} {'shards MB':>10} {'peak MB':>10} {'allowed MB':>11}")
    for world in args.ranks:
        for layout in LAYOUTS[world]:
            given = [*options, f"parallel.ep={layout.split()[1]}", "run.dir=unused"]
            cfg = compose_train([*given, "data.tokenizer.kind=bytes"])
            hugging_face, converted = (
                compose_train([*given, f"init_from={args.folder}/{name}"]) for name in ("hf", "converted")
            )
            sources: dict[str, tuple[TrainConfig, Path | None]] = {
                "drawn": (cfg, None),
                "Hugging Face": (hugging_face, None),
                "converted": (converted, None),
                "checkpoint": (cfg, checkpoint),
            }
            for source in args.sources:
                chosen, resumed = sources[source]
                ranks = run_ranks(begin, world, chosen, resumed, timeout=1200)
                most = max(ranks, key=lambda r: r["peak"] / (ALLOWED[0] * r["shards"] + ALLOWED[1]))
                allowed = ALLOWED[0] * most["shards"] + ALLOWED[1]
                sizes = [size / 1e6 for size in (most["shards"], most["peak"], allowed)]
                print(
                    f"{world:5} {layout:8} {source:14} {sizes[0]:10,.0f} {sizes[1]:10,.0f} {sizes[2]:11,.0f}"
                    + ("" if most["peak"] <= allowed else "  TOO MUCH"),
                    flush=True,
                )
                found.append({"ranks": world, "layout": layout, "source": source, "each": ranks})
    write_json(args.out, {"machine": machine(), "starts": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
