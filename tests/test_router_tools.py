"""``moetrain router``: the list, and the checks: of every router, of broken ones, of the page's example."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.cli import main
from moetrain.moe import ROUTERS, RouterContext, Routing
from moetrain.moe.routers import RouterSpec
from moetrain.moe.routers.topk import TopKOptions, TopKRouter
from moetrain.router_tools import CHECKS, check_router, command

PAGE = Path(__file__).parents[1] / "docs" / "routers.md"


# Of each kind one; the others' properties are in test_invariants.py, and here they are marked slow.
KINDS = {"topk", "expert_choice", "base", "relu", "moepp", "hash", "threshold"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in KINDS)) for n in sorted(ROUTERS)]
)
@pytest.mark.real
def test_every_router_passes_every_check(name):
    assert [outcome for outcome in check_router(name) if outcome.failure is not None] == []


def test_the_list_names_all_of_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["router", "list"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:] if line.strip()}
    assert set(rows) == set(ROUTERS)
    for name, spec in ROUTERS.items():
        assert spec.paper in rows[name]
        assert spec.returns in rows[name]
    assert "threshold_E" in rows["expert_choice"]
    assert re.search(r"\bno\b", rows["expert_choice"])
    assert re.search(r"\bnone +yes\b", rows["hash"])


class Broken(TopKRouter):
    """One promise broken at a time."""

    fault = ""

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        if self.fault == "noise of its own":
            x_TD = x_TD + torch.randn_like(x_TD)
        if self.fault == "sees its neighbours" and len(x_TD):
            x_TD = x_TD + x_TD.mean(0)
        if self.fault == "state":
            self.bias_E += 1e-3
        if self.fault == "needs an even number" and self.num_experts % 2:
            raise RuntimeError("an even number of experts, please")
        if self.fault == "no bias":
            self.bias_E = torch.zeros_like(self.bias_E)
        routing = super().route(x_TD, ctx)
        if self.fault == "no scores":
            return replace(routing, scores_TE=None)
        if self.fault == "more experts":
            self.top_k = 1
        assignment = routing.assignment
        if self.fault == "unsorted":
            flipped = replace(assignment, token_ids_N=assignment.token_ids_N.flip(0))
            return replace(routing, assignment=flipped)
        if self.fault == "infinite gradient":
            rough_T = (0 * self.logits(x_TD).sum(-1)).sqrt()
            rough = replace(assignment, weights_N=assignment.weights_N + rough_T[assignment.token_ids_N])
            return replace(routing, assignment=rough)
        return routing


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        ("noise of its own", 4, "ctx.uniform"),
        ("sees its neighbours", 3, "a coupling"),
        ("state", 5, "bias_E changed in evaluation"),
        ("needs an even number", 0, "E=1, 1 x 1 tokens"),
        ("unsorted", 1, "not sorted by"),
        ("infinite gradient", 6, "is not finite"),
        ("no scores", 8, "has_scores=True, but its Routing has none"),
        ("no bias", 8, "reads_bias=True, but bias_E moves no choices"),
        ("more experts", 8, "top_k=1, but a token takes 2 experts"),
    ],
)
def test_a_broken_router_is_told_what_it_breaks(fault, check, message, monkeypatch, capsys):
    monkeypatch.setattr(Broken, "fault", fault)
    monkeypatch.setitem(ROUTERS, "broken", RouterSpec("broken", Broken, TopKOptions))
    outcomes = []
    monkeypatch.setattr(command, "check_router", lambda name: outcomes.extend(check_router(name)) or outcomes)
    assert main(["router", "check", "broken"]) == 1
    failures = {i: o.failure for i, o in enumerate(outcomes) if o.failure is not None}
    assert message in failures[check]
    said = capsys.readouterr().out
    assert f"router broken: {len(CHECKS) - len(failures)} of {len(CHECKS)} checks hold" in said
    assert said.count("FAILED") == len(failures)


def test_the_example_of_the_page_works(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    example = blocks[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 30
    (tmp_path / "page_router.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert main(["router", "check", "top_p", "plugins=[page_router]"]) == 0
        assert f"{len(CHECKS)} of {len(CHECKS)} checks hold" in capsys.readouterr().out
    finally:
        ROUTERS.pop("top_p", None)
        sys.modules.pop("page_router", None)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("router check tpok", ["tpok", "did you mean topk?", "plugins=[package]"]),
        ("router check", ["one name"]),
        ("router check topk relu", ["one name"]),
        ("router list topk", ["topk"]),
        ("router chek topk", ["chek", "check"]),
        ("router check topk plugins=[no_such_package_here]", ["no_such_package_here", "PYTHONPATH"]),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(command, words, capsys):
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert not [word for word in words if word not in err], err
