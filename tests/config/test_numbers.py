"""Every numeric key of every command with odd values: accepted, or refused in one line, and at once."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

import pytest
import tiny

from moetrain.cli import main
from moetrain.config.hydra.compose import compose_app, compose_train
from moetrain.config.validate import (
    validate,
    validate_eval,
    validate_export,
    validate_generate,
    validate_verify,
)
from moetrain.convert.options import ExportConfig
from moetrain.errors import UserError
from moetrain.evaluation.options import EvalConfig
from moetrain.moe.routers import ROUTERS
from moetrain.train.options import GenerateConfig, TrainConfig
from moetrain.verify.options import VerifyConfig

WHOLE = [-1, 0, 4_000_000_001, 2**62, 2**63, 10**400]
BROKEN = [-1.0, 1e300, math.nan, math.inf]


def numeric_keys(cfg: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """(dotted key, whether it is a whole number) of everything that is or may be a number."""
    hints = get_type_hints(type(cfg))
    for field in dataclasses.fields(cfg):
        key, value = prefix + field.name, getattr(cfg, field.name)
        kinds = {hints[field.name], *get_args(hints[field.name])}
        if dataclasses.is_dataclass(value):
            yield from numeric_keys(value, f"{key}.")
        elif isinstance(value, (list, tuple)):
            for i, part in enumerate(value):
                if dataclasses.is_dataclass(part):
                    yield from numeric_keys(part, f"{key}.{i}.")
                elif isinstance(part, (int, float)):
                    yield f"{key}.{i}", isinstance(part, int)
        elif kinds & {int, float}:
            yield key, int in kinds


def with_value(node: Any, key: str, value: object) -> Any:
    head, _, rest = key.partition(".")
    if isinstance(node, (list, tuple)):
        parts = list(node)
        parts[int(head)] = with_value(parts[int(head)], rest, value) if rest else value
        return type(node)(parts)
    new = with_value(getattr(node, head), rest, value) if rest else value
    return dataclasses.replace(node, **{head: new})


def refused(cfg: Any, check: Callable[[Any], object]) -> str | None:
    """What the one line says; None where the config is fine. An alarm ends what takes too long."""

    def late(*_: object) -> None:
        raise TimeoutError("still checking after 5 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    try:
        check(cfg)
    except UserError as error:
        return str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None


def try_all(cfg: Any, check: Callable[[Any], object], within: str = "") -> None:
    for key, whole in numeric_keys(cfg):
        if not key.startswith(within):
            continue
        for value in [*WHOLE, *([] if whole else BROKEN)]:
            began = time.process_time()
            line = refused(with_value(cfg, key, value), check)
            told = f"{key}={value if abs(value) < 10**40 else 'huge'}"
            assert time.process_time() - began < 1, told
            if line is None:
                assert math.isfinite(value), told
                assert not whole or abs(value) < 2**63, told
            else:
                assert "\n" not in line, told
                assert len(line) < 500, told


def of_train(cfg: TrainConfig) -> object:
    return validate(cfg, 1)


ROPE = ["model.rope_scaling.factor=2", "model.rope_scaling.original_max_positions=64"]


@pytest.mark.parametrize(
    ("overrides", "within"),
    [
        ([], ""),
        (["optim=muon", "router.top_k=1"], "optim"),
        (["model.rope_scaling.kind=yarn", *ROPE], "model.rope"),
        (["model.rope_scaling.kind=llama3", *ROPE], "model.rope"),
        (["data=hub", "data.path=a/b"], "data"),
    ],
    ids=["default", "muon", "yarn", "llama3", "hub"],
)
def test_train(overrides, within):
    cfg = compose_train(["model=tiny", *overrides])
    validate(cfg, 1)
    try_all(cfg, of_train, within)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_options_of_a_router(name):
    cfg = compose_train(["model=tiny", f"router={name}"])
    validate(cfg, 1)
    for within in ("router", "balance", "model.num_experts", "model.d_model"):
        try_all(cfg, of_train, within)


@pytest.mark.parametrize(
    ("root", "name", "overrides", "check"),
    [
        (VerifyConfig, "verify", ["model=tiny"], validate_verify),
        (GenerateConfig, "generate", ["prompt=a", "checkpoint="], validate_generate),
        (EvalConfig, "eval", ["data.path={here}", "checkpoint="], validate_eval),
        (ExportConfig, "export", ["target=x", "checkpoint="], validate_export),
    ],
    ids=["verify", "generate", "eval", "export"],
)
def test_other_commands(root, name, overrides, check, tmp_path):
    given = [o.format(here=__file__) + (str(tmp_path) if o == "checkpoint=" else "") for o in overrides]
    cfg = compose_app(root, name, given)
    check(cfg)
    try_all(cfg, check)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["train.seed=99999999999999999999999"], "must be 9223372036854775807 or less"),
        (["train.seed=-1"], "train.seed=-1 must be 0 or more"),
        (["optim.lr=1" + "0" * 400], "optim.lr"),
        (["train.seed=1" + "0" * 5000], "train.seed"),
        (["compare.seeds=[0,9223372036854775808]", "compare.arms={a: []}"], "compare.seeds.1="),
        (["model.d_model=4000000001", "model.num_heads=2"], "must be 2147483647 or less"),
        (["model.d_model=2147483647", "model.num_heads=2"], "take 1 heads"),
        (["model.num_layers=10001"], "model.num_layers=10001 must be 10000 or less"),
        (["router.group=" + "9" * 5000], "router.group="),
        (["train.steps=" + "[" * 3000], "train.steps"),
    ],
    ids=["seed", "negative", "float", "digits", "seeds", "width", "divisor", "layers", "group", "nested"],
)  # fmt: skip
def test_the_command_line_refuses_in_one_line(overrides, part, training, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    assert main(["train", "model=tiny", *overrides]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moetrain: error: ")
    assert part in err
    assert err.count("\n") == 1
    assert time.process_time() - began < 5
    assert list(tmp_path.iterdir()) == []


def test_the_largest_seed_trains(training, corpus, tmp_path):
    assert tiny.train(corpus, tmp_path / "run", "train.steps=1", f"train.seed={2**63 - 1}") == 0
