"""The default run's speed beside busy processes, as a share of its speed alone.

    python benchmarks/contention.py [--repetitions 5] [--spins 1000,10000,300000] [--threads 1] [--busy 1]
                                    [--code before=FOLDER] [--steps 14] [--json FILE]

The run is made alone, beside processes that were busy before it, and beside some that start once it trains;
each speed is the median of tokens per second over the steps of one run of ``moetrain train`` (the first left
out), and each share the median of the pairs, one a repetition; runs are interleaved. ``as it is`` is the
command with an environment that says nothing of OpenMP; ``spins N`` sets GOMP_SPINCOUNT; ``--code
NAME=FOLDER`` runs another checkout. ``--busy`` processes do nothing but compute; by default one for each two
cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from timing import machine, ratio, write_json

HERE = Path(__file__).resolve().parent.parent
WARM_UP = 4  # steps that compile kernels and fill the heap
UNSET = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def write_corpus(folder: Path) -> Path:
    draw = random.Random(1)
    words = ["the", "model", "trains", "on", "small", "text", "and", "every", "router", "sends", "tokens"]
    rows = [json.dumps({"text": " ".join(draw.choices(words, k=200))}) for _ in range(400)]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    return folder / "corpus.jsonl"


@contextlib.contextmanager
def busy(count: int, trained: Path | None) -> Iterator[None]:
    """``count`` processes that compute until the end of ``with``, from when the file ``trained`` is there."""
    wait = "" if trained is None else f"while not os.path.exists({str(trained)!r}): time.sleep(0.05)\n"
    code = f"import os, time\n{wait}while True: pass"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def tokens_per_second(
    folder: Path,
    setting: tuple[Path, dict[str, str], list[str]],
    steps: int,
    others: int,
    late: bool,
) -> float:
    """Of one run in a process of its own, beside ``others``, which are ``late`` if the run trains first."""
    code, environment, options = setting
    env = {key: value for key, value in os.environ.items() if key not in UNSET}
    env |= {"PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1", **environment}
    with tempfile.TemporaryDirectory(dir=folder) as root:
        command = [
            *(
                sys.executable,
                "-m",
                "moetrain",
                "train",
                "data=local",
                f"data.path={folder / 'corpus.jsonl'}",
            ),
            *("data.tokenizer.kind=bytes", f"data.cache_dir={folder / 'cache'}", f"train.steps={steps}"),
            *(
                "train.eval_every=1000",
                "train.eval_samples=8",
                "train.sample_tokens=1",
                "checkpoint.every=1000",
            ),
            *(f"run.root={root}", "run.name=a", *options),
        ]
        metrics = Path(root) / "a" / "metrics.jsonl"
        with busy(others, metrics if late else None):
            done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            sys.exit(done.stderr)
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    pairs = zip(trained[WARM_UP:], trained[WARM_UP + 1 :], strict=False)
    return statistics.median((b["tokens"] - a["tokens"]) / (b["time"] - a["time"]) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--spins", default="", help="GOMP_SPINCOUNT values, by commas")
    parser.add_argument("--threads", default="", help="train.threads values, by commas")
    parser.add_argument("--busy", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--code", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings: dict[str, tuple[Path, dict[str, str], list[str]]] = {"as it is": (HERE, {}, [])}
    settings |= {n: (Path(f).resolve(), {}, []) for n, f in (c.split("=", 1) for c in args.code)}
    settings |= {f"spins {n}": (HERE, {"GOMP_SPINCOUNT": n}, []) for n in args.spins.split(",") if n}
    settings |= {f"threads {n}": (HERE, {}, [f"train.threads={n}"]) for n in args.threads.split(",") if n}
    beside = f"beside {args.busy} busy"
    places = {"alone": (0, False), beside: (args.busy, False), f"{beside}, late": (args.busy, True)}
    found: dict[str, dict[str, list[float]]] = {s: {p: [] for p in places} for s in settings}
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        write_corpus(Path(scratch))
        for repetition in range(args.repetitions):
            pairs = [(place, name) for place in places for name in settings]
            for place, name in draw.sample(pairs, len(pairs)):
                speed = tokens_per_second(Path(scratch), settings[name], args.steps, *places[place])
                found[name][place].append(speed)
                print(f"{repetition} {place:20} {name:16} {speed:8.0f}", file=sys.stderr, flush=True)
    print(f"{'tokens/s, medians':20}" + "".join(f"{place:>28}" for place in places))
    for name, by_place in found.items():
        shares = {place: ratio(by_place, place, "alone") for place in places}
        cells = [f"{statistics.median(by_place[p]):18,.0f} ({100 * shares[p]:3.0f} %)" for p in places]
        print(f"{name:20}" + "".join(f"{cell:>28}" for cell in cells))
    if args.json is not None:
        write_json(args.json, {"machine": machine(), "tokens_per_second": found})


if __name__ == "__main__":
    main()
