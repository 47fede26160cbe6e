"""``moetrain verify``: run the twin on ranks and on one process, compare, print, and leave a certificate."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from moetrain.errors import UserError
from moetrain.parallel.ranks import RankError, RanksTimeoutError, run_ranks
from moetrain.terminal import console, show
from moetrain.train.optim.options import MuonConfig
from moetrain.train.options import Precision
from moetrain.verify.certificate import certificate_path, write_certificate
from moetrain.verify.compare import Check, compare, replicas
from moetrain.verify.measure import (
    MORE_STEPS,
    STEPS,
    Findings,
    measure_and_resume_each,
    measure_each,
    measure_rounded,
    resume_each,
)
from moetrain.verify.options import VerifyConfig
from moetrain.verify.rounding import bound, compare_rounded, roundings
from moetrain.verify.twin import Twin, dp_shard, twin_of

TOLERANCES = {Precision.fp64: 1e-9, Precision.fp32: 1e-5}  # by the twin's precision
_SECONDS = 600.0
_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b")
_TELLING = ("gradient", "weight", "bits", "norm", "loss", "state")  # nearest to a cause first
_AFTER, _LATER = f"{STEPS} steps", f"{STEPS + MORE_STEPS} steps"


def verify(cfg: VerifyConfig, world: int) -> int:
    """The exit code: 0 where every binding check holds, else 1. Raises UserError for what cannot be run.

    ``world``: the ranks of the run to come.
    """
    twin = twin_of(cfg, world, cfg.verify.ranks)
    if twin.world > cfg.verify.ranks:
        raise UserError(
            f"the smallest twin of this layout has {twin.world} ranks, but verify.ranks={cfg.verify.ranks}: "
            f"set verify.ranks={twin.world}"
        )
    certificate_path(cfg, world).unlink(missing_ok=True)  # what follows decides
    show(_opening(cfg, world, twin))
    try:
        checks = prove(twin)
        if cfg.train.precision is Precision.bf16:
            checks += prove_rounded(twin)
    except (RankError, RanksTimeoutError) as error:
        if isinstance(error, RankError) and error.kind == UserError.__name__:
            raise UserError(error.text.strip().rpartition(f"{UserError.__name__}: ")[2]) from None
        show(f"NOT equal to one process: {_one_line(error)}")
        return 1
    console().print(_table(checks))
    broken = [check for check in checks if check.binding and not check.holds]
    worst = {check.scenario: check for check in sorted(broken, key=lambda check: -_TELLING.index(check.kind))}
    for scenario in dict.fromkeys(check.scenario for check in broken):
        show(f"NOT equal to one process: {worst[scenario].problem}")
    if broken:
        return 1
    if cfg.train.precision is Precision.bf16:
        model = twin.cfg.model
        show(f"in bf16, {roundings(model)} roundings in a row allow differences of {bound(model):.0e}")
    path = write_certificate(cfg, world, twin, checks)
    show(f"equal to one process; certificate {path}")
    return 0


def prove(twin: Twin, tolerance: float | None = None) -> list[Check]:
    """Both sides run, each takes the other's checkpoint over, and everything is compared.

    Raises RankError where a rank fails, RanksTimeoutError where one hangs.
    """
    return prove_each([twin], tolerance)[0]


def prove_each(twins: Sequence[Twin], tolerance: float | None = None) -> list[list[Check]]:
    """:func:`prove` of ``twins``, all on as many ranks, by processes that are started once.

    One process measures twins that differ in their layout alone once for all of them. The first that fails
    ends the others too.
    """
    (world,) = {twin.world for twin in twins}
    references: list[Twin] = []
    for twin in twins:
        if twin.reference() not in references:
            references.append(twin.reference())
    own = [references.index(twin.reference()) for twin in twins]

    def alone(fn: Callable[..., list[Findings]], given: list[Twin], folders: list[Path]) -> list[Findings]:
        found: list[Findings] = run_ranks(fn, 1, given, folders, timeout=_SECONDS * len(given), init=False)[0]
        return found

    with tempfile.TemporaryDirectory(prefix="moetrain_verify_") as folder:
        ours = [Path(folder, f"one_{number}") for number in range(len(references))]
        theirs = [Path(folder, f"ranks_{number}") for number in range(len(twins))]
        ones = alone(measure_each, references, ours)
        others = [ours[number] for number in own]
        seconds = _SECONDS * len(twins)
        ranks = run_ranks(measure_and_resume_each, world, twins, theirs, others, timeout=seconds)
        moved_here = alone(resume_each, [references[number] for number in own], theirs)
    return [
        _checks(twin, ones[own[number]], [rank[number] for rank in ranks], moved_here[number], tolerance)
        for number, twin in enumerate(twins)
    ]


def _checks(
    twin: Twin,
    one: Findings,
    ranks: Sequence[tuple[Findings, Findings]],
    moved_here: Findings,
    tolerance: float | None,
) -> list[Check]:
    """``ranks``: what each measured, and what it found after it took the checkpoint of ``one`` over."""
    tolerance = TOLERANCES[twin.cfg.train.precision] if tolerance is None else tolerance
    loose = [_AFTER, _LATER] if isinstance(twin.cfg.optim, MuonConfig) else []
    saved = "checkpoint"
    measured, moved_there = [rank[0] for rank in ranks], [rank[1] for rank in ranks]
    expected = {scenario: found for scenario, found in one.items() if scenario != saved}
    checks = [*compare(expected, measured, tolerance, loose), replicas(measured, _LATER)]
    for name, whole, parts, after in (  # what one process holds of a checkpoint, and what the ranks do
        ("checkpoint of the ranks on one process", moved_here[saved], measured, [moved_here]),
        ("checkpoint of one process on the ranks", one[saved], moved_there, moved_there),
    ):
        checks += compare({name: whole}, [{name: found[saved]} for found in parts], tolerance)
        steps = f"{name}, {MORE_STEPS} more steps"
        found = [{steps: f[_LATER]} for f in after]
        checks += compare({steps: one[_LATER]}, found, tolerance, [steps] if loose else [])
    return checks


def prove_rounded(twin: Twin) -> list[Check]:
    """The same in bf16, as near as its rounding lets two evaluations be (``rounding.py``)."""
    one = run_ranks(measure_rounded, 1, twin, timeout=_SECONDS, init=False)[0]
    ranks = run_ranks(measure_rounded, twin.world, twin, timeout=_SECONDS)
    return compare_rounded(twin.cfg.model, one, ranks)


def _opening(cfg: VerifyConfig, world: int, twin: Twin) -> str:
    p, small = cfg.parallel, twin.cfg.parallel
    return (
        f"layout of {world} ranks: dp_replicate {p.dp_replicate}, dp_shard {dp_shard(p, world)}, ep {p.ep}; "
        f"twin in {twin.cfg.train.precision.value} on {twin.world} ranks: "
        f"dp_replicate {small.dp_replicate}, dp_shard {small.dp_shard}, "
        f"ep {small.ep}, router {twin.cfg.router.name}, {twin.cfg.model.num_experts} experts"
    )


def _table(checks: list[Check]) -> Table:
    """One row a scenario: what was compared, and the largest difference of all."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "scenario", "compared", "largest difference"):
        table.add_column(column, overflow="fold")
    for scenario in dict.fromkeys(check.scenario for check in checks):
        own = [check for check in checks if check.scenario == scenario]
        broken = [check for check in own if not check.holds]
        outcome = "ok" if not broken else "FAILED" if any(check.binding for check in broken) else "reported"
        worst = max(own, key=lambda check: check.worst)
        compared = ", ".join(f"{check.number} {check.what}" for check in own)
        table.add_row(outcome, scenario, compared, f"{worst.worst:.0e}" if worst.worst else "0")
    return table


def _one_line(error: RankError | RanksTimeoutError) -> str:
    if isinstance(error, RanksTimeoutError):
        return str(error)
    lines = error.text.strip().splitlines()  # a traceback, whose message may have several
    told = next((line for line in reversed(lines) if _RAISED.match(line)), lines[-1])
    return f"rank {error.rank} failed with {told}"
