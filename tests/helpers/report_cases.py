"""Run folders as a training leaves them, without one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np


def make_run(
    folder: Path,
    *,
    steps: int = 60,
    planned: int | None = None,
    layers: tuple[int, ...] = (1, 3, 5),
    experts: int = 7,
    seed: int = 0,
    dropped: bool = False,
    finished: bool = True,
    domains: tuple[str, ...] = (),
) -> Path:
    """A run folder with falling losses and loads that spread slowly. ``layers`` () is a dense model."""
    rng = np.random.default_rng(seed)
    for name in ("checkpoints", "samples"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    favour = rng.normal(size=(len(layers), experts))
    metrics, loads = [], []
    for step in range(1, steps + 1):
        loss = 2.2 + 6 * math.exp(-6 * step / steps) + 0.05 * rng.normal()
        row: dict[str, Any] = {"step": step, "tokens": 8192 * step, "train/loss": loss}
        row |= {"train/lr": 1e-3 * min(1, step / 10), "train/grad_norm": 0.5 + 3 / step}
        row |= {"tokens_per_second": 9000 + 300 * rng.normal(), "time": 1.7e9 + step}
        share = np.exp(favour * 0.8 * step / steps)
        share /= share.sum(1, keepdims=True)
        for i, layer in enumerate(layers):
            row[f"moe/{layer}/max_load"] = share[i].max() * experts
            row[f"moe/{layer}/load_cv"] = share[i].std() * experts
            row[f"moe/{layer}/entropy"] = math.log(experts) * (1 - 0.3 * (step / steps) * (i + 1) / 3)
            row[f"moe/{layer}/dead_experts"] = 0
            row[f"moe/{layer}/drop_rate"] = 0.02 * rng.random() if dropped else 0.0
        metrics.append(row)
        if layers and step % max(1, steps // 100) == 0:
            loads.append({"step": step, "layers": list(layers), "load": share.round(5).tolist()})
        if step % max(1, steps // 5) == 0:
            evaluation = {"step": step, "tokens": 8192 * step, "val/loss": loss + 0.1}
            evaluation |= {"val/perplexity": math.exp(loss + 0.1), "val/bits_per_byte": (loss + 0.1) / 2.5}
            evaluation |= {f"val/{d}/bits_per_byte": loss / 2 + i / 10 for i, d in enumerate(domains)}
            metrics.append(evaluation)
    write_lines(folder / "metrics.jsonl", metrics)
    if layers:
        write_lines(folder / "load.jsonl", loads)
    summary = {"finished": finished, "step": steps, "tokens": 8192 * steps, "seconds": 0.9 * steps}
    summary |= {"tokens_per_second": 9102.0, "params_total": 22_600_000, "params_active": 9_400_000}
    summary |= {"flops_per_token": 17_000_000} | ({} if finished else {"reason": "SIGTERM"})
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "seed": seed}))
    config = f"model:\n  num_experts: {experts}\ntrain:\n  steps: {planned or steps}\n  seed: {seed}\n"
    (folder / "config.yaml").write_text(config)
    (folder / "checkpoints" / f"step_{steps:08}").mkdir(exist_ok=True)
    (folder / "samples" / f"step_{steps:08}.txt").write_text("def add(a, b):\n    return a + b\n")
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
