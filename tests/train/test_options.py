"""Every shipped option that is small enough takes two steps; what is large is counted elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny

from moetrain.config.help import group_options

pytestmark = pytest.mark.usefixtures("training")

# What an option needs besides itself.
NEEDS = {
    ("data", "mixture"): ["+data.parts.a={kind: local, path: %s/text/0*.txt, weight: 2}",
                          "+data.parts.b={kind: local, path: %s/text/1*.txt}"],
    ("model", "tiny_dense"): ["balance=none"],
    ("balance", "dynmoe"): ["router=dynmoe"],
    ("balance", "dynmoe_deepspeed"): ["router=dynmoe"],
    ("balance", "moec"): ["router=moec"],
    ("balance", "penalty"): ["router=dselect_k"],
    ("balance", "stable"): ["router=stable"],
    ("balance", "vq"): ["router=vq"],
    ("balance", "sam"): ["router=sam"],
    ("balance", "competesmoe"): ["router=competesmoe"],
    ("balance", "competesmoe_v1"): ["router=competesmoe_v1"],
    ("balance", "s2moe"): ["model=s2moe"],
    ("balance", "remoe"): ["router=relu"],
    ("optim", "adamw_8bit"): ["optim.min_8bit_size=100"],
}  # fmt: skip
PACKAGES = {("optim", "adamw_8bit"): "bitsandbytes"}
# Elsewhere: routers (test_router_training.py); what is too large, needs a network, takes hours, or (wandb)
# starts a process of its own.
ELSEWHERE = {
    ("model", "small"), ("model", "mixtral_8x7b"), ("model", "olmoe_1b_7b"), ("model", "qwen3_30b_a3b"),
    ("model", "qwen3_next_80b_a3b"), ("model", "gpt_oss_20b"),
    ("data", "chat"), ("data", "prompt_completion"),  # test_chat_training.py
    ("data", "stdlib"), ("data", "hub"), ("data", "domains"), ("tracker", "wandb"),
    *((group, name) for group in ("experiment", "method", "router") for name in group_options()[group]),
}  # fmt: skip
SHIPPED = {(group, name) for group, names in group_options().items() for name in names}
SMALL = sorted(SHIPPED - ELSEWHERE)


def two_steps(group: str, name: str, corpus: Path, run: Path) -> list[str]:
    """The overrides of a run of two steps with the option."""
    kept = [o for o in tiny.command(corpus, run)[1:] if not (group == "model" and o.startswith("model."))]
    if (group, name) == ("data", "mixture"):
        kept = [o for o in kept if not o.startswith("data.path=")]
    needs = [need.replace("%s", str(corpus)) for need in NEEDS.get((group, name), [])]
    chosen = [o for o in kept if not o.startswith(f"{group}=")]
    return [*chosen, f"{group}={name}", *needs, "train.steps=2", "train.eval_samples=2"]


@pytest.mark.real
@pytest.mark.parametrize(("group", "name"), SMALL, ids=[f"{group}={name}" for group, name in SMALL])
def test_every_small_option_takes_two_steps(group, name, corpus, tmp_path):
    from moetrain.cli import main

    if package := PACKAGES.get((group, name)):
        pytest.importorskip(package, reason=f"{package} is not installed (extra: {package})")
    run = tmp_path / "run"
    assert main(["train", *two_steps(group, name, corpus, run)]) == 0
    rows = tiny.steps(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["train/grad_norm"] < 100 and 4 < row["train/loss"] < 7 for row in rows)
    assert tiny.checkpoints(run) == [2]
    if group == "tracker":
        assert (run / "tensorboard").exists() == (name == "tensorboard")


def test_what_is_left_out_exists():
    assert ELSEWHERE <= SHIPPED
    assert NEEDS.keys() | PACKAGES.keys() <= set(SMALL)


@pytest.mark.slow  # test_trackers.py writes and reads a wandb run in every run of the tests
def test_wandb_offline_takes_two_steps(corpus, tmp_path):
    run = tmp_path / "run"
    options = two_steps("tracker", "wandb", corpus, run)
    arguments = [sys.executable, "-m", "moetrain", "train", *options]
    with tiny.Process(arguments, tmp_path / "log") as process:
        assert process.wait() == 0, process.output()
    assert len(tiny.steps(run)) == 2
    assert (run / "wandb_run_id").read_text().strip()
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_the_default_corpus_takes_two_steps(tmp_path):
    from moetrain.cli import main

    where = [f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache"]
    assert main(["train", *where, "train.steps=2", "train.eval_samples=2", "train.sample_tokens=2"]) == 0
    assert len(tiny.steps(tmp_path / "run")) == 2
