"""``python -m moetrain.slurm.preflight``: one task a node tries what training needs; prints a line of JSON.

The node by itself (``checks.py``), then a sum with each other node, in rounds in which every node has one
partner: over gloo, and over nccl too where there are GPUs. Prints nothing else on standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from moetrain.parallel.environment import adopt_launcher, world_size
from moetrain.parallel.interface import choose_interface
from moetrain.slurm.blame import rounds
from moetrain.slurm.checks import check_node
from moetrain.terminal import show

_ELEMENTS = 1 << 18  # of the summed tensor: one MiB
_PATIENCE = timedelta(seconds=60)  # for all nodes to begin
_LIMIT = timedelta(seconds=20)  # of one sum
_POLL = 0.1  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Always 0: what is wrong is in the line."""
    parser = argparse.ArgumentParser(prog="moetrain.slurm.preflight", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="a folder that all nodes share")
    options = parser.parse_args(argv)
    adopt_launcher()
    rank, world = int(os.environ.get("RANK", "0")), world_size()
    faults = check_node(options.folder)
    unreached = _try_pairs(rank, world, faults) if world > 1 else []
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    line = {
        "node": node,
        "host": socket.gethostname(),
        "rank": rank,
        "faults": faults,
        "unreached": unreached,
    }
    show(json.dumps(line))
    return 0


def _try_pairs(rank: int, world: int, faults: list[str]) -> list[int]:
    """The ranks with which this one made no right sum. A store out of reach is a fault of this node."""
    choose_interface(os.environ["MASTER_ADDR"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(host, port, is_master=rank == 0, timeout=_PATIENCE, wait_for_workers=False)
        present = _present(store, rank, world)
    except (dist.DistError, RuntimeError, OSError) as error:
        faults.append(f"no way to {host}:{port}: {_short(error)}")
        return []
    bad = []
    with contextlib.suppress(dist.DistError, RuntimeError):  # a node that ends in between has no line
        for number, meetings in enumerate(rounds(len(present))):
            for pair in [(present[a], present[b]) for a, b in meetings]:
                if rank in pair and not _sums(PrefixStore(f"{number}/{pair[0]}", store), pair.index(rank)):
                    bad.append(pair[1 - pair.index(rank)])
            _meet(store, f"round {number}", len(present))
    return bad


def _present(store: TCPStore, rank: int, world: int) -> list[int]:
    """The ranks that came to the store in time, as rank 0 saw it."""
    store.set(f"here/{rank}", "1")
    if rank == 0:
        end = time.monotonic() + _PATIENCE.total_seconds()
        names = {other: f"here/{other}" for other in range(world)}
        while not store.check(list(names.values())) and time.monotonic() < end:
            time.sleep(_POLL)
        store.set("present", json.dumps([other for other, name in names.items() if store.check([name])]))
    store.wait(["present"], 2 * _PATIENCE)
    found: list[int] = json.loads(store.get("present"))
    return found


def _meet(store: TCPStore, name: str, members: int) -> None:
    """Wait until all ``members`` have come here; rank 0, which serves the store, comes with the others."""
    if store.add(name, 1) == members:
        store.set(f"{name}/all", "1")
    store.wait([f"{name}/all"], 2 * _LIMIT)


def _sums(store: PrefixStore, member: int) -> bool:
    """Whether this pair's sum came, and was right."""
    cuda = torch.cuda.is_available()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=member, world_size=2, timeout=_LIMIT
        )
        try:
            for device in ("cpu", "cuda") if cuda else ("cpu",):
                ones = torch.full((_ELEMENTS,), float(member + 1), device=device)
                dist.all_reduce(ones)
                if not bool((ones == 3).all()):
                    return False
        finally:
            dist.destroy_process_group()
    except (dist.DistError, RuntimeError, OSError):
        return False
    return True


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
