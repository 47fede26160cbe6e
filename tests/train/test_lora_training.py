"""Low-rank products through whole runs: started from a model without, resumed, recomputed, generating."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny

from moetrain.cli import main
from moetrain.config.hydra.compose import compose_train
from moetrain.config.stored import trained_config
from moetrain.config.validate import validate
from moetrain.convert.open_model import open_model
from moetrain.ops.low_rank import is_factor, starts_at_zero

pytestmark = pytest.mark.usefixtures("training")
ALONE = "optim.frozen=['*','!*.lora_*']"
TARGETS = "model.lora.targets=['*.attention.w_*','*.experts.*=3','*.router.*=1']"
LORA = ["model.lora.rank=2", TARGETS, ALONE, "balance=none"]
THREE = ["train.steps=3", "checkpoint.every=1", "checkpoint.keep_last=9", "train.eval_every=3"]


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("base") / "run"
    assert tiny.train(corpus, run, "train.steps=1", "balance=aux_free", "router=sigmoid") == 0
    return run


def test_a_run_from_a_model_trains_the_products_alone(base: Path, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert tiny.train(corpus, run, *LORA, f"init_from={base}", "train.steps=2", "checkpoint.every=2") == 0
    before, after = (open_model(path, trained_config) for path in (base, run))
    assert set(before.weights) < set(after.weights)
    for name in before.weights:  # the router's bias too: no controller moves it
        assert after[name].equal(before[name]), name
    products = [name for name in after.weights if is_factor(name)]
    assert len(products) == 2 * 2 * (4 + 2 + 1)
    assert all(after[name].any() for name in products), "each b has left zero"
    state = [name for name in after.infos if name.startswith("optim.")]
    assert state
    assert all(is_factor(name) for name in state)


def test_a_run_without_frozen_matrices_is_warned_of() -> None:
    lora = ["model.lora.rank=2", "train.steps=700"]
    (warning,) = validate(compose_train(lora))
    assert "optim.frozen=['*','!*.lora_*'] trains the products alone" in warning
    assert not validate(compose_train([*lora, ALONE]))


@pytest.mark.real
@pytest.mark.parametrize("dropout", [0, 0.3], ids=["plain", "dropout"])
def test_resumed_and_recomputed_runs_have_the_same_bits(
    dropout: float, base: Path, corpus: Path, tmp_path: Path
) -> None:
    options = [*LORA, f"init_from={base}", *THREE]
    if dropout:
        options += ["model.lora.targets=['*.attention.w_*','*.experts.*=3']", f"model.lora.dropout={dropout}"]
    run, copy, again = (tmp_path / name for name in ("run", "copy", "again"))
    assert tiny.train(corpus, run, *options) == 0
    shutil.copytree(run, copy)
    for step in (2, 3):
        shutil.rmtree(tiny.checkpoint(copy, step))
    assert tiny.train(corpus, copy, *options) == 0
    assert tiny.train(corpus, again, *options, "train.recompute=true") == 0
    for other in (copy, again):
        assert tiny.steps(other) == tiny.steps(run)
        assert tiny.evaluations(other) == tiny.evaluations(run)
        tensors, others = (tiny.contents(tiny.checkpoint(folder, 3))[0] for folder in (run, other))
        assert not [key for key, tensor in tensors.items() if not tensor.equal(others[key])]
    assert main(["generate", f"checkpoint={run}", "prompt=abc", "max_new_tokens=3"]) == 0


@pytest.mark.real
def test_a_tuned_run_is_tuned_further(base: Path, corpus: Path, tmp_path: Path) -> None:
    """Its description names its products; they go on from where they are."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert tiny.train(corpus, first, *LORA, f"init_from={base}", "train.steps=1") == 0
    assert tiny.train(corpus, second, ALONE, "balance=none", f"init_from={first}", "train.steps=1") == 0
    one, two = (open_model(path, trained_config) for path in (first, second))
    assert two.spec.model.lora == one.spec.model.lora
    moved = [name for name in one.weights if not one[name].equal(two[name])]
    assert moved
    assert all(is_factor(name) for name in moved)
    assert all(one[name].any() for name in one.weights if starts_at_zero(name))


# what upcycling takes, and the first of it training
AROUND = {
    "adapters": ("experts=adapters", "model.d_ff_expert=5"),
    "low_rank": ("experts.kind=low_rank", "model.lora.dropout=0.1"),
}


@pytest.mark.real
@pytest.mark.parametrize("method", AROUND)
def test_from_a_dense_run_to_experts_around_its_networks(method: str, corpus: Path, tmp_path: Path) -> None:
    """PESC's and MixLoRA's: what experts add, router, norms and products move, all else stays to the bit."""
    dense, moe, run = (tmp_path / name for name in ("dense", "moe", "run"))
    assert tiny.train(corpus, dense, "model.num_experts=0", "balance=none", "train.steps=2") == 0
    targets = "model.lora.targets=['*.attention.w_*','*.feed_forward.w_*']"
    parts = (*AROUND[method], "model.num_experts=4", "model.lora.rank=2", targets)
    text = [f"data.path={corpus}/text", f"data.cache_dir={corpus}/cache", f"data.seq_len={tiny.SEQ}"]
    said = [f"source={dense}", f"target={moe}", f"method={method}", *parts, "data=local", *text]
    assert main(["upcycle", *said, "proof_tokens=32"]) == 0
    frozen = "optim.frozen=[embed_VD,'*.attention.w_*','*.feed_forward.w_*']"
    more = [AROUND[method][0], frozen, "train.micro_batch_size=2", "train.global_batch_tokens=64"]
    said = [f"init_from={moe}", "data=local", *text, *more, f"run.dir={run}", "train.deterministic=true"]
    assert main(["train", *said, "train.steps=3", "checkpoint.every=2", "checkpoint.keep_last=9"]) == 0
    before, after = (open_model(path, trained_config) for path in (moe, run))
    for name in (name for name in after.weights if not name.endswith("bias_E")):
        base = "embed" in name or ".attention.w_" in name or "feed_forward.w_" in name
        assert after[name].equal(before[name]) == (base and not is_factor(name)), name
    assert main(["generate", f"checkpoint={run}", "prompt=abc", "max_new_tokens=3"]) == 0
