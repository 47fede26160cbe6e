"""Balanced assignment of tokens to experts: the auction and the exact solver against scipy's.

    python benchmarks/assignment.py [--tokens 4096] [--experts 64] [--repetitions 5] [--out FILE]

Scores are normal and new every time; all solvers see the same ones in one interleaved pass. scipy gets one
column per place. The gap is what a token loses on average against the best assignment, as a share of the
scores' range; the auction promises at most eps.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from timing import interleaved, machine, medians, write_json

from moetrain.moe.solvers import auction, balanced_assignment

EPS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    tokens, experts = args.tokens, args.experts
    if tokens % experts:
        parser.error(f"--tokens={tokens} must be a multiple of --experts={experts}")
    rng = np.random.default_rng(0)
    data = [rng.normal(size=(tokens, experts)) for _ in range(args.repetitions + 1)]
    valid_GL = torch.ones(1, tokens, dtype=torch.bool)
    totals: dict[str, list[float]] = {"scipy": [], "exact": [], "auction": []}

    def by_scipy(i: int) -> None:
        places = np.repeat(data[i], tokens // experts, axis=1)
        totals["scipy"].append(places[linear_sum_assignment(places, maximize=True)].sum())

    def by_cycles(i: int) -> None:
        expert_T = balanced_assignment(data[i]).expert_T
        totals["exact"].append(data[i][np.arange(tokens), expert_T].sum())

    def by_auction(i: int) -> None:
        scores_GLE = torch.from_numpy(data[i])[None].float()
        expert_GL, _ = auction(scores_GLE, valid_GL, EPS * float(np.ptp(data[i])))
        totals["auction"].append(data[i][np.arange(tokens), expert_GL[0].numpy()].sum())

    times = medians(
        interleaved({"scipy": by_scipy, "exact": by_cycles, "auction": by_auction}, args.repetitions)
    )
    result: dict[str, Any] = {"machine": machine(), "tokens": tokens, "experts": experts, "solvers": {}}
    print(f"{result['machine']}\n{tokens} tokens, {experts} experts")
    for name, seconds in times.items():
        lost = [
            (best - total) / tokens / np.ptp(scores)
            for best, total, scores in zip(totals["scipy"], totals[name], data, strict=True)
        ]
        row = {"ms": 1e3 * seconds, "speedup": times["scipy"] / seconds, "gap": statistics.mean(lost)}
        result["solvers"][name] = row
        print(
            f"  {name:8} {row['ms']:9.0f} ms  {row['speedup']:6.1f}x scipy  gap {row['gap']:.5f} of the range"
        )
    write_json(args.out, result)


if __name__ == "__main__":
    main()
