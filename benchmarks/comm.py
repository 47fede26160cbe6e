"""What each dispatcher sends in one MoE layer, forward and backward, against the least for that routing.

    python benchmarks/comm.py [--ranks 4] [--ranks-per-node 2] [--tokens 512] [--out FILE]

Bytes are counted at every rank's own calls, inside its node and across nodes; a node is as many consecutive
ranks. Real ranks over gloo on this machine; nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from comm_layer import ROUTINGS, Tally, dispatchers, draw, lower_bound, spread_block
from timing import machine, write_json

from moetrain.parallel.ranks import run_ranks


def count(rank: int, world: int, args: argparse.Namespace) -> dict[str, Any]:
    """This rank's counts: by routing, top_k and dispatcher."""
    found: dict[str, Any] = {}
    for routing, top_k in itertools.product(ROUTINGS, args.top_k):
        ids_TK = draw(routing, rank, args.tokens, top_k, args.experts)
        row_bytes = args.d_model * torch.float32.itemsize
        cell: dict[str, Any] = {"bound": lower_bound(ids_TK, args.experts, args.ranks_per_node, row_bytes)}
        for name, cfg in dispatchers(world, args.ranks_per_node).items():
            tally = Tally(args.ranks_per_node)
            block = spread_block(cfg, ids_TK, args.d_model, args.d_ff, args.experts, tally)
            x_BSD = torch.randn(1, args.tokens, args.d_model, requires_grad=True)
            y_BSD = block(x_BSD)
            forward = dict(tally.counts)
            y_BSD.sum().backward()
            cell[name] = {"forward": forward, "both": dict(tally.counts)}
        found[f"{routing}, top {top_k}"] = cell
    return found


def summed(ranks: list[dict[str, Any]], case: str, name: str) -> dict[str, int]:
    """Bytes of all ranks, forward and backward; collectives and host reads of one."""
    parts = [rank[case][name] if name == "bound" else rank[case][name]["both"] for rank in ranks]
    total = {key: sum(part.get(key, 0) for part in parts) for key in ("across", "inside")}
    return total | {key: parts[0].get(key, 0) for key in ("collectives", "host")}


def show(ranks: list[dict[str, Any]]) -> None:
    print("MB a layer and step, all ranks together; (x: of the least that this routing needs)")
    print(f"{'routing':19} {'dispatcher':30} {'across':>16} {'inside':>16}  collectives  host reads")
    for case in ranks[0]:
        least = summed(ranks, case, "bound")
        for name in ranks[0][case]:
            got = summed(ranks, case, name)
            cells = [
                f"{got[key] / 1e6:8.2f}" + (f" ({got[key] / least[key]:4.2f})" if least[key] else " (   -)")
                for key in ("across", "inside")
            ]
            print(f"{case:19} {name:30} {cells[0]:>16} {cells[1]:>16}", end="")
            print("" if name == "bound" else f"  {got['collectives']:11}  {got['host']:10}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-ff", type=int, default=64)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--out")
    args = parser.parse_args()
    ranks = run_ranks(count, args.ranks, args, timeout=300)
    show(ranks)
    result = {"machine": machine(), "arguments": vars(args), "ranks": ranks}
    write_json(args.out, result)


if __name__ == "__main__":
    main()
