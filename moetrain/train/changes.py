"""What may change when a run resumes: one table of every key, and the comparison of two configs by it.

``docs/resume.md`` holds the same table. What is not in it is refused as :attr:`Change.named` is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from moetrain.errors import UserError
from moetrain.flat import TAGS, Leaf, flat, lies_in, prefixes, shown
from moetrain.nearest import nearest
from moetrain.train.options import TrainConfig

_LISTED = 4  # keys in one message


class Change(Enum):
    """What becomes of a key whose value differs from the stored one."""

    free = "may change"
    said = "may change, and is said"
    named = "refused, unless `resume_changes` names it"
    fixed = "refused"


@dataclass(frozen=True)
class Rule:
    """``keys`` are keys or whole sections; of two that match a key, the longer one counts."""

    keys: tuple[str, ...]
    change: Change
    why: str


RULES = (
    Rule(
        ("model", "router", "experts", "balance"),
        Change.named,
        "decides the function, or the loss that is minimised",
    ),
    Rule(("model.vocab_size",), Change.free, "null is the tokenizer's; the embedding's shape is compared"),
    Rule(
        (
            *("model.attention_backend", "experts.backend", "experts.block", "experts.keep"),
            *("experts.max_rows_per_rank", "train.recompute", "train.compile"),
        ),
        Change.free,
        "another way to compute the same",
    ),
    Rule(
        ("parallel", "engine", "train.device", "train.threads"),
        Change.free,
        "a checkpoint loads under any layout, on any machine",
    ),
    Rule(("train.task", "train.future"), Change.named, "decides the loss that is minimised"),
    Rule(("optim", "schedule", "train.global_batch_tokens"), Change.named, "decides the steps to come"),
    Rule(
        ("data", "data.cache_dir"),
        Change.free,
        "text and tokenizer may lie elsewhere: they are compared by their content, and others are refused",
    ),
    Rule(("train.seed", "data.seq_len", "data.val_fraction"), Change.fixed, "decides the order of the text"),
    Rule(
        ("data.cross_document_attention", "data.reset_positions"),
        Change.named,
        "decides what a position of a sequence sees",
    ),
    Rule(
        ("train.precision", "train.residual", "train.deterministic", "train.micro_batch_size"),
        Change.said,
        "the same sums, rounded in another way; losses of scope micro follow the micro-batch",
    ),
    Rule(
        ("train.eval_samples", "train.on_nonfinite", "train.spike_factor"),
        Change.said,
        "judges the run in another way from here on",
    ),
    Rule(
        (
            "train.steps",
            "train.eval_every",
            "train.eval_first",
            "train.sample_prompt",
            "train.sample_tokens",
            "checkpoint",
        ),
        Change.free,
        "how far, and what is written on the way",
    ),
    Rule(("replay",), Change.named, "decides which experts tokens take"),
    Rule(
        ("run", "tracker", "alarms", "compare", "replay.record"),
        Change.free,
        "where the run lies, and who is told",
    ),
    Rule(
        ("resume", "resume_changes", "plugins"),
        Change.free,
        "how to resume; what a plugin brings is compared by its own keys",
    ),
    Rule(("init_from", "init_optimizer"), Change.named, "decided how the run began"),
)


@dataclass(frozen=True)
class Difference:
    """``key`` is the shortest one that tells; values are as the command line spells them."""

    key: str
    before: str
    now: str


def rule_of(key: str) -> Rule | None:
    """The rule of the longest section that ``key`` lies in."""
    matching = [(len(name), rule) for rule in RULES for name in rule.keys if lies_in(key, [name])]
    return max(matching, key=lambda pair: pair[0])[1] if matching else None


def differences(before: TrainConfig, now: TrainConfig) -> list[Difference]:
    """The keys whose values differ. Under another option of a group, its name stands for keys of its rule."""
    sides = flat(before), flat(now)
    known = tuple(prefixes(side) for side in sides)
    found: dict[str, Difference] = {}
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        told = _told(key, sides, known)
        values = [
            side.get(told, "set" if told in names else "not set")
            for side, names in zip(sides, known, strict=True)
        ]
        if told not in found and not _alike(told, *values):
            found[told] = Difference(told, shown(values[0]), shown(values[1]))
    return list(found.values())


def compare(before: TrainConfig, now: TrainConfig, where: str, strict: Collection[str] = ()) -> list[str]:
    """What is to be said of a run in ``where`` that goes on under ``now``; UserError for what is refused.

    ``strict``: keys or sections that must not differ, whatever the table says, unless ``resume_changes``
    names them.
    """
    accepted = now.resume_changes
    known = prefixes([*flat(before), *flat(now)])
    for name in accepted:
        if name not in known:
            section = name.rpartition(".")[0]
            near = [key for key in known if key.rpartition(".")[0] == section]
            raise UserError(f"resume_changes names {name}, which is no key{nearest(name, near)}")
    found = [(d, _change(d.key, strict)) for d in differences(before, now)]
    refused = [d for d, change in found if change is Change.fixed]
    if refused:
        keys = ", ".join(d.key for d in refused[:_LISTED])
        raise UserError(
            f"resume: {_listed(where, refused)}: {keys} cannot change, since the order of the text "
            "follows it: give the old value, or choose another run.name or run.dir"
        )
    refused = [d for d, change in found if change is Change.named and not lies_in(d.key, accepted)]
    if refused:
        keys = ",".join(dict.fromkeys([*accepted, *_few([d.key for d in refused])]))
        raise UserError(
            f"resume: {_listed(where, refused)}: give the old value, choose another run.name or run.dir, "
            f"or accept the change with resume_changes=[{keys}]"
        )
    lines = []
    for d, change in found:
        if change is not Change.free:
            by = " (accepted by resume_changes)" if lies_in(d.key, accepted) else ""
            lines.append(f"changed on resume: {d.key} was {d.before}, now {d.now}{by}")
    same = [name for name in accepted if not any(lies_in(d.key, [name]) for d, _ in found)]
    return lines + [f"resume_changes names {name}, which is as it was" for name in same]


def same_path(one: str | None, other: str | None) -> bool:
    """Whether two spellings name one path, links apart."""
    if one is None or other is None:
        return one == other
    return Path(one).expanduser().absolute() == Path(other).expanduser().absolute()


def table() -> str:
    """The table of ``docs/resume.md``."""
    rows = [f"| {', '.join(f'`{key}`' for key in r.keys)} | {r.change.value} | {r.why} |" for r in RULES]
    return "\n".join(["| key or section | on resume | why |", "|---|---|---|", *rows])


def _change(key: str, strict: Collection[str]) -> Change:
    rule = rule_of(key)
    change = Change.named if rule is None else rule.change
    return Change.named if change is not Change.fixed and lies_in(key, strict) else change


def _told(key: str, sides: tuple[dict[str, Leaf], ...], known: tuple[set[str], ...]) -> str:
    """What tells of ``key``: itself, its group's other option, or the shortest section that a side lacks."""
    group = key.partition(".")[0]
    tag = f"{group}.{TAGS.get(group)}"
    shared = all(key in side for side in sides)
    if sides[0].get(tag) != sides[1].get(tag) and (not shared or rule_of(key) is rule_of(tag)):
        return tag
    if shared:
        return key
    parts = key.split(".")
    sections = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    pairs = list(zip(sides, known, strict=True))
    return next(part for part in sections if any(part in side or part not in names for side, names in pairs))


def _alike(key: str, before: Leaf, now: Leaf) -> bool:
    if key == "init_from" and isinstance(before, str) and isinstance(now, str):
        return same_path(before, now)
    return before == now


def _listed(where: str, refused: list[Difference]) -> str:
    some = "; ".join(f"{d.key}={d.before}, and now {d.key}={d.now}" for d in refused[:_LISTED])
    more = f"; and {len(refused) - _LISTED} more" if len(refused) > _LISTED else ""
    return f"the run in {where} has {some}{more}"


def _few(keys: list[str]) -> Iterator[str]:
    """The keys, or their sections where they are many."""
    yield from keys if len(keys) <= _LISTED else dict.fromkeys(key.partition(".")[0] for key in keys)
