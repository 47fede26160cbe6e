"""The family that docs/families.md adds, run as it stands there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hf_cases import CASES, assert_same_tensors, convert, export, refused, tensors_of, write_theirs
from safetensors.torch import save_file

from moetrain.cli import main
from moetrain.config.hydra.compose import compose_train
from moetrain.models.hf import FAMILIES
from moetrain.models.hf.family import register_family

PAGE = Path(__file__).parents[3] / "docs" / "families.md"
PLUGINS = "plugins=[acme_family]"
RENAMED = {
    "block_sparse_moe.gate": "moe.router",
    "block_sparse_moe": "moe",
    ".w1.": ".wg.",
    ".w3.": ".wu.",
    ".w2.": ".wd.",
}


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The plug-in on the path, and a folder of its family: a Mixtral under other names."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "acme_family.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "plugin")
    source = write_theirs(CASES["mixtral"].their_model(torch.float32), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "acme_moe", "architectures": ["AcmeForCausalLM"]}
    config["moe_num_experts"] = config.pop("num_local_experts")
    (source / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in tensors_of(source).items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor
    save_file(tensors, source / "model.safetensors")
    yield source
    FAMILIES.pop("acme_moe", None)


def test_a_family_of_ones_own(acme: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "convert", f"source={acme}", f"target={tmp_path}/ours")
    assert "model_type='acme_moe' is not known" in line
    cfg = compose_train([f"init_from={acme}", PLUGINS])
    assert (cfg.model.num_experts, cfg.model.d_ff_expert) == (7, 37)
    ours = convert(acme, tmp_path / "ours", PLUGINS)
    out = export(ours, tmp_path / "out", PLUGINS)
    assert json.loads((out / "config.json").read_text())["model_type"] == "acme_moe"
    assert_same_tensors(acme, out)
    assert main(["export", f"checkpoint={ours}", f"target={tmp_path}/mixtral", "family=mixtral"]) == 0
    with pytest.raises(ValueError, match="registered already"):
        register_family(FAMILIES["acme_moe"].__class__("acme_moe", "", *2 * (lambda it: it,)))
