"""``python -m tests.fuzz [--world FOLDER] TARGET SEED`` shows one mutation again.

``TARGET FIRST LAST`` and ``all TOTAL [START]`` print a table. FOLDER keeps the valid files for the next time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "helpers"))

from fuzz.catalogue import KNOWN, TARGETS
from fuzz.runner import Runner
from fuzz.table import jobs, table
from fuzz.world import make_world


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--world", type=Path)
    parser.add_argument("target", choices=["all", *TARGETS, *KNOWN], metavar="TARGET")
    parser.add_argument("numbers", type=int, nargs="+")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz_world_") as temporary:
        world = args.world or Path(temporary) / "world"
        if not world.exists():
            make_world(world)
        if args.target == "all":
            todo = list(jobs(*args.numbers))
        else:
            todo = [(args.target, seed) for seed in range(args.numbers[0], args.numbers[-1] + 1)]
        with Runner(world) as runner:
            outcomes = []
            for outcome in runner.run(todo):
                outcomes.append(outcome)
                if not outcome.good or len(todo) == 1:
                    print(outcome.line(), flush=True)
    if len(outcomes) > 1:
        print(table(outcomes))
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
