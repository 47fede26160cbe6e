"""Dispatchers timed over a slow link: two nodes of two ranks, a step of one MoE layer, interleaved.

    python benchmarks/comm_link.py [--top-k 8] [--repetitions 20] [--out FILE]      (root, Linux)

Two network namespaces stand for the nodes, joined by a veth pair that ``tc`` (tbf) limits, at both ends, to a
tenth of the speed that one TCP connection reaches on this machine's loopback just before. The ranks are real
processes over gloo. What the observer counts across is set against the interfaces' own counters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from comm_layer import Tally, dispatchers, draw, spread_block
from timing import interleaved, machine, medians, ratio, write_json

NODES, RANKS_PER_NODE = 2, 2
PORT = 29517


def loopback_bytes_per_second(seconds: float = 1.0) -> float:
    """One TCP connection between two processes, the best of three."""
    return max(_loopback(seconds) for _ in range(3))


def _loopback(seconds: float) -> float:
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    sender = multiprocessing.get_context("fork").Process(target=_send, args=(address, seconds))
    sender.start()
    with server, server.accept()[0] as connection:
        buffer, received, start = bytearray(1 << 20), 0, time.perf_counter()
        while count := connection.recv_into(buffer):
            received += count
        elapsed = time.perf_counter() - start
    sender.join()
    return received / elapsed


def _send(address: tuple[str, int], seconds: float) -> None:
    block, end = bytes(1 << 20), time.perf_counter() + seconds
    with socket.create_connection(address) as connection:
        while time.perf_counter() < end:
            connection.sendall(block)


@contextlib.contextmanager
def two_nodes(bytes_per_second: float) -> Iterator[list[tuple[str, str, str]]]:
    """(namespace, interface, address) of each node; both are gone afterwards."""
    nodes = [
        (f"mt{os.getpid()}{end}", f"mt{os.getpid()}{end}", f"10.93.7.{i + 1}") for i, end in enumerate("ab")
    ]
    bits, burst = int(8 * bytes_per_second), max(1 << 18, int(bytes_per_second / 250))
    try:
        for space, _, _ in nodes:
            _run("ip", "netns", "add", space)
        (space_a, a, _), (space_b, b, _) = nodes
        _run("ip", "link", "add", a, "netns", space_a, "type", "veth", "peer", "name", b, "netns", space_b)
        for space, interface, address in nodes:
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "address", "add", f"{address}/24", "dev", interface)
            _run("ip", "-n", space, "link", "set", interface, "up")
            limit = ["rate", f"{bits}bit", "burst", str(burst), "latency", "50ms"]
            _run("tc", "-n", space, "qdisc", "add", "dev", interface, "root", "tbf", *limit)
        yield nodes
    finally:
        for space, _, _ in nodes:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """On every rank: seconds of each step; by dispatcher, what was counted and what the interface sent."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ids_TK = draw("uniform", rank, args.tokens, args.top_k, args.experts)
    tallies, blocks = {}, {}
    for name, cfg in dispatchers(world, RANKS_PER_NODE).items():
        tallies[name] = Tally(RANKS_PER_NODE)
        blocks[name] = spread_block(cfg, ids_TK, args.d_model, args.d_ff, args.experts, tallies[name])
    interface = Path("/sys/class/net", os.environ["GLOO_SOCKET_IFNAME"], "statistics/tx_bytes")
    x_BSD = torch.randn(1, args.tokens, args.d_model)
    sent = dict.fromkeys(blocks, 0)

    def step(name: str, repetition: int) -> None:
        before = int(interface.read_text())
        x = x_BSD.clone().requires_grad_()
        blocks[name].zero_grad(set_to_none=True)
        y_BSD = blocks[name](x)
        y_BSD.sum().backward()
        dist.barrier()  # a step ends when all ranks have ended it
        sent[name] += int(interface.read_text()) - before

    times = interleaved({name: partial(step, name) for name in blocks}, args.repetitions)
    counted = {name: dict(tally.counts) for name, tally in tallies.items()}
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, {"counted": counted, "sent": sent})
    return {"times": times, "ranks": everyone}


def rank_main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    result = measure(args)
    if dist.get_rank() == 0:
        Path(args.result).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def run_on(nodes: list[tuple[str, str, str]], args: argparse.Namespace) -> dict[str, Any]:
    world = NODES * RANKS_PER_NODE
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        try:
            for rank in range(world):
                space, interface, _ = nodes[rank // RANKS_PER_NODE]
                variables = {
                    "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % RANKS_PER_NODE,
                    "LOCAL_WORLD_SIZE": RANKS_PER_NODE, "MASTER_ADDR": nodes[0][2], "MASTER_PORT": PORT,
                    "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": 1,
                }  # fmt: skip
                environment = os.environ | {name: str(value) for name, value in variables.items()}
                command = ["ip", "netns", "exec", space, sys.executable, *sys.argv, "--result", str(result)]
                processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
            deadline = time.monotonic() + args.timeout
            for process in processes:
                if process.wait(max(0.0, deadline - time.monotonic())):
                    raise SystemExit("a rank failed")
            return json.loads(result.read_text())
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def summary(result: dict[str, Any], repetitions: int) -> dict[str, Any]:
    """A step: its time, how often all_to_all's it fits in (paired), MB across as counted and as sent."""
    times, ranks = result["times"], result["ranks"]
    steps = repetitions + 1  # one is a warm-up
    found = {}
    for name, seconds in medians(times).items():
        counted = sum(rank["counted"][name].get("across", 0) for rank in ranks) / steps
        sent = sum(ranks[first]["sent"][name] for first in range(0, len(ranks), RANKS_PER_NODE)) / steps
        quartiles = statistics.quantiles(times[name], n=4)
        found[name] = {
            "ms": 1e3 * seconds, "quartiles_ms": [1e3 * quartiles[0], 1e3 * quartiles[2]],
            "speedup_over_all_to_all": ratio(times, "all_to_all", name),
            "counted_across_mb": counted / 1e6, "interface_mb": sent / 1e6,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--d-ff", type=int, default=32)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--out")
    parser.add_argument("--result", help=argparse.SUPPRESS)  # set for a rank: where it writes
    args = parser.parse_args()
    if args.result:
        rank_main(args)
        return
    if os.geteuid():
        raise SystemExit("network namespaces need root")
    loopback = loopback_bytes_per_second()
    with two_nodes(loopback / 10) as nodes:
        found = summary(run_on(nodes, args), args.repetitions)
    print(f"loopback {loopback / 1e6:.0f} MB/s, link {loopback / 1e7:.0f} MB/s; {machine()}")
    print(f"{'dispatcher':30}  ms a step         quartiles  speed-up  counted MB  interface MB")
    for name, f in found.items():
        low, high = f["quartiles_ms"]
        print(
            f"{name:30} {f['ms']:10.1f} {low:8.1f} {high:8.1f} {f['speedup_over_all_to_all']:9.2f} "
            f"{f['counted_across_mb']:11.2f} {f['interface_mb']:13.2f}"
        )
    result = {"machine": machine(), "arguments": vars(args), "loopback_mb_per_second": loopback / 1e6}
    write_json(args.out, result | {"dispatchers": found})


if __name__ == "__main__":
    main()
