"""Every router, layer and wiring on every layout: ``python tests/dist/matrix.py [--sample N] [--only WORD]``.

``--out FILE`` keeps each verdict as a line; the same command goes on where it ended. A sample is drawn by
``--seed``, evenly over kinds of subject. Prints what is wrong as it comes, and counts at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from parity_cases import CASES, Verdict, judge

from moetrain.parallel.ranks import PRELOAD

PRELOAD.extend(["moetrain.config.stored", "moetrain.train.run", "moetrain.verify.measure"])
Case = tuple[str, str]


def sample(cases: list[Case], number: int, seed: int) -> list[Case]:
    """``number`` of them; each kind of subject as often as its share, at least once if it can be."""
    rng, kinds = random.Random(seed), {}
    for case in cases:
        kinds.setdefault(case[0].partition(" ")[0], []).append(case)
    drawn = [rng.choice(found) for found in kinds.values()][:number]
    rest = [case for case in cases if case not in drawn]
    return drawn + rng.sample(rest, min(number - len(drawn), len(rest)))


def counts(found: dict[Case, Verdict]) -> str:
    """A Markdown table: a row a kind of subject, a column a verdict."""
    verdicts = list(dict.fromkeys(["equal", "refused", *(v.kind for v in found.values())]))
    lines = ["| what | cases | " + " | ".join(verdicts) + " |", "|---|" + "---:|" * (len(verdicts) + 1)]
    for kind in [*dict.fromkeys(subject.partition(" ")[0] for subject, _ in found), ""]:
        own = Counter(v.kind for case, v in found.items() if case[0].startswith(kind))
        cells = " | ".join(str(own[verdict]) for verdict in verdicts)
        lines.append(f"| {kind or 'all'} | {own.total()} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases with this word in subject or layout")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in f"{case[0]} on {case[1]}"]
    if args.sample is not None:
        cases = sample(cases, args.sample, args.seed)
    found: dict[Case, Verdict] = {}
    if args.out is not None and args.out.exists():
        rows = map(json.loads, args.out.read_text().splitlines())
        found = {(row.pop("subject"), row.pop("layout")): Verdict(**row) for row in rows}
    for case in cases:
        if case in found:
            continue
        start = time.monotonic()
        found[case] = verdict = judge(*case)
        took = time.monotonic() - start
        print(f"{verdict.kind:8} {case[0]} on {case[1]} ({took:.0f} s) {verdict.text}"[:400], flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                row = {"subject": case[0], "layout": case[1], **asdict(verdict)}
                file.write(json.dumps(row) + "\n")
    found = {case: verdict for case, verdict in found.items() if case in set(cases)}
    print(counts(found))
    return 0 if all(verdict.good for verdict in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
