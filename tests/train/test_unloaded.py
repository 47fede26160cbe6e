"""Commands that load a model draw none before."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from moetrain.cli import main
from moetrain.config.stored import trained_config
from moetrain.convert.open_model import open_model

COMMANDS = {
    "generate": ["generate", "checkpoint={run}", "prompt=ab", "max_new_tokens=2"],
    "eval": ["eval", "checkpoint={run}", "data.path={text}"],
    "export": ["export", "checkpoint={run}", "target={out}"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unloaded")
    tiny.write_corpus(folder)
    with tiny.alone():
        assert tiny.train(folder, folder / "run", "train.steps=1", "router=mixtral") == 0
    return folder / "run"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many normal values each draw since then gave."""
    found: list[int] = []
    draw = Tensor.normal_

    def noting(self: Tensor, *args: float, **kwargs: float) -> Tensor:
        found.append(0 if self.is_meta else self.numel())
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "normal_", noting)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_loaded_is_not_drawn(command: str, run: Path, drawn: list[int], tmp_path: Path) -> None:
    """But for routers, which are built with memory."""
    (tmp_path / "text.txt").write_text("a few words")
    names = {"run": run, "text": tmp_path / "text.txt", "out": tmp_path / "out"}
    assert main([part.format(**names) for part in COMMANDS[command]]) == 0
    weights = open_model(run, trained_config).weights.items()
    assert sum(drawn) <= sum(torch.Size(t.shape).numel() for name, t in weights if ".router." in name)


def test_every_value_of_a_built_model_is_loaded(run: Path) -> None:
    stored = open_model(run, trained_config)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN then
    try:
        model = stored.build()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored.read(name)), name
    assert all(bool(value.isfinite().all()) for value in (*model.parameters(), *model.buffers()))
    assert not model.training
