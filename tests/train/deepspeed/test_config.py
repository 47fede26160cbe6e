"""What a user's own JSON may say to DeepSpeed, and what engine=deepspeed refuses before anything is made."""

from __future__ import annotations

import json

import pytest

import moetrain.train.deepspeed.rules as rules
from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate
from moetrain.errors import UserError
from moetrain.train.deepspeed.config import merged_config, own_config
from moetrain.train.deepspeed.options import DeepSpeedConfig


@pytest.fixture
def merged(tmp_path):
    def merge(content, **engine):
        path = tmp_path / "own.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return merged_config(DeepSpeedConfig(config=str(path), **engine))

    return merge


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_it_sums_and_neither_clips_nor_counts_micro_batches(stage):
    config = own_config(DeepSpeedConfig(zero_stage=stage))
    assert config["zero_optimization"]["stage"] == stage
    assert (config["gradient_allreduce_op"], config["gradient_clipping"]) == ("sum", 0.0)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 1)
    assert not {"optimizer", "scheduler", "bf16", "fp16"} & config.keys()


def test_stage_3_averages_and_keeps_nothing_whole():
    config = own_config(DeepSpeedConfig(zero_stage=3))
    assert (config["gradient_allreduce_op"], config["gradient_clipping"]) == ("mean", 0.0)
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["stage3_param_persistence_threshold"], zero["memory_efficient_linear"]) == (
        3,
        0,
        False,
    )


def test_a_users_own_keys_are_added(merged):
    own = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True},
        "train_batch_size": "auto",
        "bf16": {"enabled": False},
        "flops_profiler": {"enabled": True, "profile_step": 3},
        "wall_clock_breakdown": True,
    }
    config, before = merged(own, zero_stage=2), own_config(DeepSpeedConfig(zero_stage=2))
    zero = before["zero_optimization"] | {"reduce_bucket_size": 1000, "overlap_comm": True}
    more = {key: own[key] for key in ("flops_profiler", "wall_clock_breakdown")}
    assert config == before | {"zero_optimization": zero} | more


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"gradient_clipping": 1.0}, ["gradient_clipping (optim.clip_norm decides that)"]),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage (engine.zero_stage decides that)"]),
        ({"train_batch_size": 8}, ["train_batch_size (train.global_batch_tokens decides that)"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled (train.precision decides that)"]),
        ({"gradient_allreduce_op": "mean"}, ["gradient_allreduce_op (moetrain does not pass it on)"]),
        ({"gradient_clippping": 1.0}, ["gradient_clippping (moetrain does not pass it on)"]),
        (
            {"optimizer": {"type": "Adam"}, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["optimizer.type (optim decides", "zero_optimization.offload_optimizer.device (engine.offload"],
        ),
    ],
)
def test_keys_that_are_decided_elsewhere_are_refused_by_name(own, said, merged):
    with pytest.raises(UserError, match=r"own\.json: take out ") as error:
        merged(own)
    for phrase in said:
        assert phrase in str(error.value)


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": 1'])
def test_a_file_that_is_no_configuration_is_named(content, merged):
    with pytest.raises(UserError, match=r"own\.json"):
        merged(content)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"/no/such\.json"):
        merged_config(DeepSpeedConfig(config="/no/such.json"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.zero_stage=3", "parallel.ep=2"], r"zero_stage=3 is refused.*parallel\.ep=2.*zero_stage=2"),
        (["engine.zero_stage=3", "train.precision=fp64"], r"engine\.zero_stage=3 keeps its master weights"),
        (["engine.zero_stage=3", "optim=muon"], r"optim=muon.*engine\.zero_stage=3 cuts"),
        (["engine.zero_stage=4"], r"engine\.zero_stage=4"),
        (["parallel.dp_replicate=2"], r"parallel\.dp_replicate=2 is of engine=native"),
        (["train.compile=true"], r"train\.compile=true( is of engine=native|: torch 2\.1[12])"),
        (["train.precision=fp64"], r"engine\.zero_stage=1 keeps its master weights in fp32"),
        (["router=stable"], r"router=stable freezes parameters"),
        (["optim=muon"], r"optim=muon needs whole matrices, which engine\.zero_stage=1 cuts"),
        (["engine.zero_stage=0", "engine.offload=true"], r"engine\.offload=true is of engine\.zero_stage=1"),
        (["engine.config=/no/such.json"], r"/no/such\.json"),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_start(overrides, said):
    cfg = compose_train(["engine=deepspeed", *overrides])
    with pytest.raises(UserError, match=said):
        validate(cfg, 2)


@pytest.mark.parametrize("more", [["model=tiny_dense"], ["engine.offload=true"], ["train.precision=bf16"]])
def test_what_stage_3_does(more):
    assert validate(compose_train(["engine=deepspeed", "engine.zero_stage=3", *more]), 2) == []


@pytest.mark.parametrize("more", [["train.precision=fp64"], ["optim=muon"], ["train.precision=bf16"]])
def test_what_stage_0_does_beside(more):
    overrides = ["engine=deepspeed", "engine.zero_stage=0", "parallel.ep=2", *more]
    assert validate(compose_train(overrides), 2) == []


def test_a_missing_package_is_one_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(rules, "is_installed", lambda package: False)
    with pytest.raises(UserError, match=r"not installed: pip install 'moetrain\[deepspeed\]'"):
        validate(compose_train(["engine=deepspeed"]))
