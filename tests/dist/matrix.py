"""Every router, layer and wiring on every layout: ``python tests/dist/matrix.py [--sample N] [--only WORD]``.

A subject's layouts of one number of ranks are proved together; two ranks come first, then four, then eight.
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
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parity_cases import Verdict

Case = tuple[str, str]


def sample(cases: list[Case], number: int, seed: int) -> list[Case]:
    """``number`` of them; each kind of subject as often as its share, at least once if it can be."""
    rng, kinds = random.Random(seed), {}
    for case in cases:
        kinds.setdefault(case[0].partition(" ")[0], []).append(case)
    drawn = [rng.choice(found) for found in kinds.values()][:number]
    rest = [case for case in cases if case not in drawn]
    return drawn + rng.sample(rest, min(number - len(drawn), len(rest)))


def batches(cases: Iterable[Case], worlds: dict[str, int]) -> list[tuple[str, list[str]]]:
    """(subject, its layouts of one number of ranks), the fewest ranks first. ``worlds``: of each layout."""
    found: dict[tuple[int, str], list[str]] = {}
    for subject, layout in sorted(cases, key=lambda case: worlds[case[1]]):
        found.setdefault((worlds[layout], subject), []).append(layout)
    return [(subject, layouts) for (_, subject), layouts in found.items()]


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
    # A rank runs this file again as it starts, and needs none of this.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
    from parity_cases import CASES, LAYOUTS, Verdict, judge

    from moetrain.parallel.ranks import PRELOAD

    PRELOAD.extend(["moetrain.config.stored", "moetrain.train.run", "moetrain.verify.measure"])
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
    worlds = {layout: world for layout, (world, _) in LAYOUTS.items()}
    for subject, layouts in batches((case for case in cases if case not in found), worlds):
        start = time.monotonic()
        judged = judge(subject, layouts)
        took = (time.monotonic() - start) / len(judged)
        for layout, verdict in judged.items():
            found[subject, layout] = verdict
            print(f"{verdict.kind:8} {subject} on {layout} ({took:.0f} s) {verdict.text}"[:400], flush=True)
            if args.out is not None:
                with args.out.open("a") as file:
                    row = {"subject": subject, "layout": layout, **asdict(verdict)}
                    file.write(json.dumps(row) + "\n")
    found = {case: verdict for case, verdict in found.items() if case in set(cases)}
    print(counts(found))
    return 0 if all(verdict.good for verdict in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
