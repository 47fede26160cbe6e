"""``moetrain verify``: a whole trainer passes, a broken one fails and says where, and training knows it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
from lives import Lives

from moetrain.cli import main

SMALL = ["parallel.ep=2", "model.num_layers=1"]
FAULTS = {
    "experts_averaged_twice": r"2 of 11 gradients differ, .* in blocks.*experts",
    "router_gradient_not_reduced": r"1 of 11 gradients differ, .* in blocks.*router\.weight_ED",
    "norm_misses_the_experts": "padded, accumulated: 1 of 2 norms differ, .* in L2",
    "an_expert_skipped_on_save": r"checkpoint of the ranks on one process: 1 of 45 tensors .*w_down_EFD",
    "aux_loss_divided_by_world_size": r"loss switch_global_batch alone: . of 11 gradients differ",
    "splits_swapped": "rank . failed with RuntimeError",
    "bias_not_synchronised": r"3 steps: .* weights, states differ, .*bias_E",
}


@pytest.fixture
def said(tmp_path, monkeypatch, capfd):
    """(exit code, output) of a command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> tuple[int, str]:
        code = main(list(arguments))
        return code, " ".join(capfd.readouterr().out.split())

    return run


def test_a_layout_that_is_right_gets_its_certificate(said, tmp_path):
    code, text = said("verify", "parallel.ep=2", "balance=aux_free", "optim=muon")
    assert code == 0, text
    (path,) = (tmp_path / "runs" / "certificates").iterdir()
    assert text.endswith(f"equal to one process; certificate runs/certificates/{path.name}")
    content = json.loads(path.read_text())
    assert content["layout"] == {"world": 2, "dp_replicate": 1, "dp_shard": 2, "ep": 2}
    assert content["config_hash"] == path.stem
    kinds = {check["kind"] for check in content["checks"]}
    assert kinds == {"loss", "norm", "gradient", "weight", "state", "bits"}


@pytest.mark.real
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp64"), (1, "fp32"), (2, "fp32"), (3, "fp32")])
def test_deepspeed_is_proved_in_the_precision_it_computes_in(stage, precision, said):
    pytest.importorskip("deepspeed")
    spread = [] if stage < 3 else ["parallel.ep=1"]  # stage 3 cuts every weight over all ranks
    code, text = said("verify", *SMALL, "engine=deepspeed", f"engine.zero_stage={stage}", *spread)
    assert code == 0, text
    assert f"twin in {precision} on 2 ranks" in text


@pytest.mark.real
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_deepspeed_trains_products_of_spread_experts(stage, said):
    pytest.importorskip("deepspeed")
    targets = "model.lora.targets=['*.attention.w_*','*.experts.*=2','*.router.*=1']"
    lora = ["model.lora.rank=3", targets, "optim.frozen=['*','!*.lora_*']"]
    eps = "optim.eps=1e-6"  # AdamW's steps by gradients near its usual one are rounding, in fp32
    code, text = said("verify", *SMALL, "engine=deepspeed", f"engine.zero_stage={stage}", *lora, eps)
    assert code == 0, text


@pytest.mark.real
def test_bf16_is_compared_too(said):
    code, text = said("verify", *SMALL, "train.precision=bf16")
    assert code == 0, text
    assert text.count("losses, 2 norms, 7") == 4, text
    assert "in bf16, 36 roundings in a row allow differences of" in text


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=[pytest.mark.real] * (number % 2)) for number, fault in enumerate(FAULTS)],
)
def test_a_broken_trainer_is_told_where(fault, said, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", fault)
    code, text = said(
        "verify", *SMALL, "balance=switch", "balance.controllers.bias.rate=0.01", "plugins=[faults]"
    )
    assert code == 1
    assert re.search(f"NOT equal to one process: .*{FAULTS[fault]}", text), text
    assert "Traceback" not in text
    assert not (tmp_path / "runs" / "certificates").exists()


@pytest.mark.real
def test_training_says_whether_its_layout_was_proved(said, corpus, tmp_path):
    """Whatever else changes, the proof is of the structure; and nothing is said on one process."""
    same = ["parallel.ep=2", "model.num_experts=4", "optim.lr=0.02"]
    arguments = tiny.command(corpus, tmp_path / "run", *same, "train.steps=1", "run.root=runs")

    def trained() -> str:
        with Lives([arguments] * 2, tmp_path) as lives:
            assert lives.codes() == [0, 0], lives.output(0)
            return " ".join(lives.output(0).split())

    assert "this layout has no parity certificate; moetrain verify verify.world=2" in trained()
    code, text = said("verify", *arguments[1:])
    assert code == 0, text
    shutil.rmtree(tmp_path / "run")
    assert "this layout was proved equal to one process: runs/certificates/" in trained()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel.ep=3"], "parallel.ep=3 does not divide model.num_experts=8"),
        (["parallel.ep=2", "verify.world=3"], "parallel.ep=2 borrows ranks of parallel.dp_shard"),
        (["parallel.ep=2", "parallel.dp_replicate=3", "verify.ranks=5"], "has 6 ranks, but verify.ranks=5"),
        (["verify.rank=5"], "unknown key verify.rank"),
        (["-m"], "verify has no sweeps"),
    ],
)
def test_what_cannot_be_proved_is_one_line(said, capfd, arguments, message):
    assert main(["verify", *arguments]) == 2
    found = capfd.readouterr()
    assert found.err.startswith("moetrain: error: ")
    assert found.err.count("\n") == 1
    assert message in found.err


def test_verify_starts_its_own_ranks(said, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["verify"]) == 2
    assert "verify starts its own ranks, but WORLD_SIZE=2" in capfd.readouterr().err
