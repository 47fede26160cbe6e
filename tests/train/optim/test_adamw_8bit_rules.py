"""What optim=adamw_8bit refuses, with and without its library."""

from __future__ import annotations

import pytest
from torch import nn

import moetrain.train.optim.rules as rules
from moetrain.config.hydra.compose import compose_app, compose_train
from moetrain.config.validate import validate, validate_verify
from moetrain.errors import UserError
from moetrain.train.optim.build import build_optimizer
from moetrain.train.optim.options import AdamW8bitConfig, Tables
from moetrain.verify.options import VerifyConfig


def test_a_missing_package_is_one_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "is_installed", lambda package: False)
    for refuse in (
        lambda: validate(compose_train(["optim=adamw_8bit"])),
        lambda: build_optimizer(nn.Linear(3, 2), AdamW8bitConfig()),
    ):
        with pytest.raises(UserError, match=r"not installed: pip install 'moetrain\[bitsandbytes\]', or set"):
            refuse()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine=deepspeed"], r"optim=adamw_8bit is of engine=native"),
        (["engine=deepspeed", "engine.zero_stage=0"], r"optim=adamw_8bit is of engine=native"),
        (["train.precision=fp64"], r"train\.precision=fp64 with optim=adamw_8bit, which updates in fp32"),
        (["optim.min_8bit_size=0"], r"optim\.min_8bit_size=0 must be 1 or more"),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_start(
    overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "is_installed", lambda package: True)
    with pytest.raises(UserError, match=said):
        validate(compose_train(["optim=adamw_8bit", *overrides]))


def test_tables_whose_rows_are_looked_up_keep_whole_moments() -> None:
    with pytest.raises(UserError, match=r"optim\.tables=row_adam is of optim=adamw and muon: with"):
        build_optimizer(nn.Linear(3, 2), AdamW8bitConfig(tables=Tables.row_adam))


def test_no_proof_is_given_of_it() -> None:
    cfg = compose_app(VerifyConfig, "verify", ["optim=adamw_8bit"])
    with pytest.raises(UserError, match=r"not verified.*with optim=adamw$"):
        validate_verify(cfg)
