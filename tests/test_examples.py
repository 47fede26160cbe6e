"""The scripts of ``examples/`` run and do what they say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moetrain.moe import ROUTERS

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("layer_in_own_model", "own_router", "upcycle_dense")


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; a router that it registers is gone afterwards."""
    known, name = dict(ROUTERS), request.param
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    yield module
    for added in ROUTERS.keys() - known.keys():
        del ROUTERS[added]


@pytest.mark.parametrize("example", ["layer_in_own_model"], indirect=True)
def test_a_layer_learns_in_ones_own_model(example: ModuleType) -> None:
    losses = example.main(steps=40)
    assert losses[0] > 2.0  # by chance: log 13
    assert max(losses[-5:]) < 0.3


@pytest.mark.parametrize("example", ["own_router"], indirect=True)
def test_ones_own_router_passes_check(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main() == []
    assert "every check holds" in capsys.readouterr().out


@pytest.mark.parametrize("example", ["upcycle_dense"], indirect=True)
def test_an_upcycled_model_computes_the_same(example: ModuleType) -> None:
    assert example.main() < 1e-12


def test_every_example_is_short_and_tested() -> None:
    found = {path.stem: path.read_text().count("\n") for path in EXAMPLES.glob("*.py")}
    assert set(found) == set(NAMES)
    assert max(found.values()) < 60
