"""The registries of losses and controllers: what they refuse, options, and the tables that the docs show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Optional

import pytest
import torch
from torch import Tensor

from moetrain.config.help import app_help
from moetrain.moe import build_router
from moetrain.moe.balance import (
    CONTROLLERS,
    LOSSES,
    Controller,
    LossTerm,
    all_factors,
    build_controllers,
    chosen_controllers,
    controller_table,
    loss_table,
    register_controller,
    register_loss,
)
from moetrain.moe.balance.options import NoOptions, read_options

DOCS = Path(__file__).parents[3] / "docs" / "balance.md"
RUNNING = [LossTerm("switch", 1.0, "running")]


@pytest.fixture
def registries() -> Iterator[None]:
    kept = [(registry, dict(registry)) for registry in (LOSSES, CONTROLLERS)]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)


class Colour(Enum):
    red = "red"


@dataclass(frozen=True)
class Several:
    rate: float = 0.5
    count: int = 3
    colour: Colour = Colour.red
    name: str = "x"
    on: bool = False
    most: Optional[int] = None


def test_the_docs_show_what_is_registered() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert loss_table() in text
    assert controller_table() in text
    page = app_help("train")
    assert all(name in page for name in (*LOSSES, *CONTROLLERS))


def test_options_are_read_by_their_types() -> None:
    given = {"rate": 2, "count": 5, "colour": "red", "name": "y", "on": True, "most": 7}
    assert read_options(Several, given) == Several(2.0, 5, Colour.red, "y", True, 7)
    assert type(read_options(Several, given).rate) is float
    assert read_options(Several, {"most": None}) == Several()
    assert read_options(NoOptions, {}) == NoOptions()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"rat": 1}, "rat is not an option; known: colour, count, most, name, on, rate (did you mean rate?)"),
        ({"rate": "a"}, "rate is a number, not 'a'"),
        ({"rate": True}, "rate is a number, not True"),
        ({"rate": None}, "rate cannot be null"),
        ({"count": 1.5}, "count is a whole number, not 1.5"),
        ({"colour": "blue"}, "colour is red, not 'blue'"),
        ({"on": 1}, "on is true or false, not 1"),
        ({"name": 1}, "name is text, not 1"),
        ({"most": "a"}, "most is a whole number or null, not 'a'"),
    ],
)
def test_options_of_other_kinds_are_refused(given: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        read_options(Several, given)


@pytest.mark.usefixtures("registries")
def test_names_are_taken_once_and_scopes_are_known() -> None:
    with pytest.raises(ValueError, match="loss 'switch' is registered already"):
        register_loss("switch")(lambda routing, seen: torch.zeros(()))
    with pytest.raises(ValueError, match="controller 'bias' is registered already"):
        register_controller("bias", NoOptions)(lambda options, routers: Controller())
    with pytest.raises(ValueError, match="scope='batch' of loss 'mine' is not known; known: micro, sequence"):
        register_loss("mine", scopes=("batch",))


def test_a_controller_is_on_where_a_loss_needs_it() -> None:
    assert [spec.name for spec, _ in chosen_controllers({}, RUNNING)] == ["running_load"]
    assert chosen_controllers({}, [LossTerm("switch", 1.0, "micro"), LossTerm("z", 1.0, "running")]) == []
    routers = {3: build_router("topk", d_model=5, num_experts=7)}
    (made,) = build_controllers({"running_load": {"decay": 0.5}}, RUNNING, routers)
    assert {name: tensor.shape for name, tensor in made.tensors().items()} == {"running_load.3": (7,)}
    assert build_controllers({"bias": {}}, [], {}) == []


@pytest.mark.usefixtures("registries")
def test_two_controllers_multiply_and_may_not_share_a_name() -> None:
    class Fixed(Controller):
        def factors(self) -> dict[str, dict[int, float]]:
            return {"switch": {1: 3.0, 2: 0.5}}

        def tensors(self) -> dict[str, Tensor]:
            return {"running_load.3": torch.zeros(2)}

    class Other(Controller):
        def factors(self) -> dict[str, dict[int, float]]:
            return {"switch": {2: 5.0}, "z": {2: 7.0}}

    assert all_factors([Fixed(), Other()]) == {"switch": {1: 3.0, 2: 2.5}, "z": {2: 7.0}}
    register_controller("fixed", NoOptions)(lambda options, routers: Fixed())
    routers = {3: build_router("topk", d_model=5, num_experts=7)}
    with pytest.raises(ValueError, match=r"two of them save a tensor as running_load\.3"):
        build_controllers({"fixed": {}}, RUNNING, routers)
