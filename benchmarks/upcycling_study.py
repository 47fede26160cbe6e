"""The same further tokens from one dense model: continued, upcycled by each method, and an MoE from scratch.

    python benchmarks/upcycling_study.py --folder runs/upcycling_study [--workers 2] [--seeds 0 1 2]

Needs the text of data=domains (moetrain data fetch domains). For each seed: a small dense model is trained,
then five copies of it on a domain each (donors of method=join), then every arm goes on for the same tokens,
batches and learning rates. Each step is a moetrain command in a process and a folder of its own: what is done
is not repeated, so an interrupted study goes on by the same command. Writes study.md and study.png there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from timing import machine

from moetrain.report.compare import comparison_figure
from moetrain.train.log.jsonl import read_metrics

DOMAINS = ("wiki_en", "wiki_fr", "wiki_es", "shakespeare", "python")
BASE_STEPS, DONOR_STEPS, STEPS = 600, 150, 200
TEXT = ("data=domains", "data.seq_len=128", "data.val_fraction=0.005")
SHAPE = (
    *("model=tiny_dense", "model.d_model=64", "model.num_layers=2", "model.num_heads=2", "model.d_ff=256"),
    *("data.tokenizer.vocab_size=1024", *TEXT),
)
RUN = (
    *("train.micro_batch_size=16", "train.global_batch_tokens=2048", "train.threads=1"),
    *("checkpoint.keep_last=1", "train.sample_tokens=1"),
)
MOE = ("router=topk", "router.top_k=2", "model.num_experts=8")


@dataclass(frozen=True)
class Arm:
    """``upcycle``: how the dense model becomes an MoE; None: it does not. ``train``: of the training."""

    upcycle: tuple[str, ...] | None
    train: tuple[str, ...] = ()


ARMS = {
    "dense, continued": Arm(None),
    "MoE from scratch": Arm(None, (*SHAPE, *MOE, "model.d_ff_expert=256")),
    "copy": Arm(("method=copy", *MOE)),
    "copy, optimizer kept": Arm(
        ("method=copy", "method.carry_optimizer=true", *MOE), ("init_optimizer=true",)
    ),
    "copy, every second layer": Arm(("method=copy", *MOE, "model.moe_every=2")),
    "copy, noise": Arm(("method=copy", "method.noise_std=0.02", *MOE)),
    "drop": Arm(("method=drop", *MOE)),
    "granular": Arm(
        ("method=granular", "router=topk", "router.top_k=4", "model.num_experts=16", "model.d_ff_expert=128")
    ),
    "split, random": Arm(
        ("method=split", "router=topk", "router.top_k=4", "model.num_experts=8", "model.d_ff_expert=32")
    ),
    "split, clusters and shared": Arm(
        (
            *("method=split", "method.by=clusters", "router=topk", "router.top_k=3"),
            *("model.num_experts=7", "model.num_shared_experts=1", "model.d_ff_expert=32"),
        )
    ),
    "join": Arm(("method=join", "router=topk", "router.top_k=2", "model.num_experts=5")),
    "adapters (PESC), rest frozen": Arm(
        ("method=adapters", "experts=adapters", *MOE, "model.d_ff_expert=64"),
        ("optim.frozen=[embed_VD,blocks.*.attention.*,blocks.*.feed_forward.w_*]",),
    ),
}


def run(folder: Path, done: Path, *arguments: str) -> str:
    """One moetrain command, unless ``done`` exists; its output, which is kept beside its folder."""
    log = folder.with_name(folder.name + ".log")
    if not done.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        command = [sys.executable, "-m", "moetrain", *arguments]
        finished = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        text = f"{' '.join(arguments)}\n{finished.stdout}{finished.stderr}"
        log.write_text(f"{text}\nseconds: {time.monotonic() - began:.1f}\n")
        if finished.returncode:
            raise SystemExit(
                f"{' '.join(command)}\nended with {finished.returncode}: {finished.stderr[-2000:]}"
            )
    return log.read_text()


def train(folder: Path, steps: int, seed: int, *arguments: str) -> None:
    schedule = [f"train.steps={steps}", f"schedule.horizon={steps}", f"checkpoint.every={steps}"]
    schedule += [f"train.eval_every={steps // 4}", f"train.seed={seed}", f"run.dir={folder}"]
    run(folder, folder / "summary.json", "train", *arguments, *RUN, *schedule)


def base(root: Path, seed: int) -> None:
    """The dense model, and its donors."""
    dense = root / f"seed_{seed}" / "base"
    train(dense, BASE_STEPS, seed, *SHAPE)
    for domain in DOMAINS:
        only = f"data.domains=[{domain}]"
        train(dense.with_name(f"donor_{domain}"), DONOR_STEPS, seed, f"init_from={dense}", *TEXT, only)


def arm(root: Path, seed: int, name: str) -> Path:
    """One arm over one seed; returns its run folder."""
    start = root / f"seed_{seed}" / "base"
    folder = root / "arms" / slug(name) / f"seed_{seed}"
    spec, source = ARMS[name], start
    if spec.upcycle is not None:
        source = folder.with_name(f"start_{seed}")
        donors = [str(start.with_name(f"donor_{domain}")) for domain in DOMAINS]
        joined = "method=join" in spec.upcycle
        said = [f"source={donors[0] if joined else start}", f"target={source}", f"train.seed={seed}"]
        said += [f"donors=[{','.join(donors[1:])}]"] if joined else []
        run(source, source / "config.yaml", "upcycle", *said, *spec.upcycle, *TEXT, "proof_tokens=16384")
    scratch = name == "MoE from scratch"
    train(folder, STEPS, seed, *([] if scratch else [f"init_from={source}", *TEXT]), *spec.train)
    return folder


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_")


def first_loss(root: Path, seed: int, name: str) -> float | None:
    """Loss on held-out text before any further training, as moetrain upcycle measured it."""
    log = root / "arms" / slug(name) / f"start_{seed}.log"
    found = re.search(r"([\d.]+) after", log.read_text()) if log.exists() else None
    return float(found[1]) if found else None


def spread(values: Sequence[float], digits: int = 4) -> str:
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def tables(root: Path, runs: dict[str, list[Path]], seeds: Sequence[int]) -> str:
    """Losses and cost, then losses by domain and what each arm gains on the MoE from scratch."""
    last = {name: [last_evaluation(path) for path in paths] for name, paths in runs.items()}
    facts = {
        name: [json.loads((p / "summary.json").read_text()) for p in paths] for name, paths in runs.items()
    }
    scratch = last["MoE from scratch"]
    lines = [
        "| | parameters | active | training TFLOPs | loss at the start | loss at the end "
        "| below the MoE from scratch | seconds a run |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, rows in last.items():
        fact = facts[name]
        starts = [loss for seed in seeds if (loss := first_loss(root, seed, name)) is not None]
        gains = [b["val/loss"] - a["val/loss"] for a, b in zip(rows, scratch, strict=True)]
        teraflops = 3 * fact[0]["flops_per_token"] * fact[0]["tokens"] / 1e12
        cells = [
            name,
            f"{fact[0]['params_total'] / 1e6:.2f} M",
            f"{fact[0]['params_active'] / 1e6:.2f} M",
            f"{teraflops:.2f}",
            spread(starts) if starts else "",
            spread([row["val/loss"] for row in rows]),
            spread(gains) if name != "MoE from scratch" else "",
            f"{max(f['wall_seconds'] for f in fact):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| loss at the end by domain | " + " | ".join(DOMAINS) + " |",
        "|---|" + "---:|" * len(DOMAINS),
    ]
    for name, rows in last.items():
        cells = [domain_cell(rows, scratch, domain) for domain in DOMAINS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def domain_cell(rows: list[dict[str, Any]], scratch: list[dict[str, Any]], domain: str) -> str:
    key = f"val/{domain}/loss"
    here, there = mean(row[key] for row in rows), mean(row[key] for row in scratch)
    return f"{here:.3f} ({here - there:+.3f})" if rows is not scratch else f"{here:.3f}"


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def last_evaluation(folder: Path) -> dict[str, Any]:
    return [row for row in read_metrics(folder) if "val/loss" in row][-1]


def queue(workers: int, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(workers) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/upcycling_study"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    given = parser.parse_args()
    began, root = time.monotonic(), given.folder.absolute()
    queue(given.workers, [partial(base, root, seed) for seed in given.seeds])
    pairs = [(seed, name) for seed in given.seeds for name in given.arms]
    folders = queue(given.workers, [partial(arm, root, seed, name) for seed, name in pairs])
    runs: dict[str, list[Path]] = {name: [] for name in given.arms}
    for (_, name), folder in zip(pairs, folders, strict=True):
        runs[name].append(folder)
    text = tables(root, runs, given.seeds)
    (root / "study.md").write_text(text + "\n")
    comparison_figure(runs, root / "study.png")
    print(f"{text}\n\n{machine()}; {(time.monotonic() - began) / 60:.1f} minutes\n{root / 'study.png'}")


if __name__ == "__main__":
    main()
