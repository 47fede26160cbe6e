"""Every cross-field rule: what it refuses, what it says, and the nearest values that it accepts."""

import dataclasses
import inspect
import os
from dataclasses import replace

import pytest
from config_cases import (
    BACKEND,
    DIRICHLET,
    LLAMA3,
    LOCALITY,
    LOOP,
    NAN,
    ON_CPU,
    REFUSED,
    SHAPE,
    YARN,
    change,
    with_options,
)

from moetrain.config import validate as validate_module
from moetrain.config.hydra.compose import compose_train
from moetrain.config.validate import validate, validate_generate
from moetrain.data.options import HubData, MixtureData, MixturePart, SourceKind
from moetrain.errors import UserError
from moetrain.models.options import AttentionBackend
from moetrain.models.rope_options import RopeKind, RopeScaling
from moetrain.moe.balance.settings import LossConfig, LossScope
from moetrain.packages import is_installed
from moetrain.parallel.options import ExpertDispatch
from moetrain.train.log import rules as log_rules
from moetrain.train.log.options import WandbTracker
from moetrain.train.optim.options import MuonConfig
from moetrain.train.options import GenerateConfig
from moetrain.train.rules import check_loop


@pytest.fixture(scope="module")
def base():
    return change(compose_train([]), {**SHAPE, **LOOP})


@pytest.mark.parametrize(
    ("changes", "fragments"), [(r[0], r[1:]) for r in REFUSED], ids=[r[1] for r in REFUSED]
)
def test_refused(base, changes, fragments):
    base = change(base, {"data.tokenizer.vocab_size": 512})
    with pytest.raises(UserError) as caught:
        validate(change(base, changes))
    text = str(caught.value)
    assert [f for f in fragments if f not in text] == [], text
    assert "\n" not in text


ACCEPTED = [
    {},
    {"model.num_experts": 0, "router.top_k": 9},  # dense: the router is not built
    {"model.num_experts": 0, "model.moe_every": 5},
    {"model.num_heads": 7, "model.head_dim": 32},
    {"model.num_kv_heads": 3},
    ON_CPU | {BACKEND: AttentionBackend.blocks},
    {"model.first_dense": 3},
    {"model.moe_every": 4},
    {"model.rope_scaling": YARN},
    {"model.rope_scaling": RopeScaling(RopeKind.linear, 1.0)},
    {"model.rope_scaling": replace(LLAMA3, low_freq_factor=3.9)},
    {"model.num_shared_experts": 2, "model.d_ff_shared": 1, "model.shared_gate": True},
    {"model.vocab_size": 4096, "data.tokenizer.vocab_size": 4096},
    {"router.top_k": 12},
    {"router.top_k": None, "model.num_experts": 1},
    {"router.num_groups": 4, "router.top_groups": 2, "router.top_k": 6},
    {"router.group": "3"},
    {"router.jitter": 0.0},
    {"balance.losses": []},
    {"balance.losses": [LOCALITY, with_options(DIRICHLET, alpha=0.1)]},
    {
        "balance.losses": [LossConfig("chunk_sparsity", options={"chunk_length": 1})],
        "balance.controllers": {"chunk_sparsity": {"max_factor": 1}},
    },
    {"balance.losses": [LossConfig(scope=LossScope.running)], "balance.controllers": {"running_load": {}}},
    {"balance.losses": [dataclasses.replace(DIRICHLET, scope=LossScope.micro)]},
    {"schedule.warmup_steps": 100},
    {"schedule.decay_fraction": 1.0, "schedule.min_ratio": 1.0},
    {"train.global_batch_tokens": 384},
    {"train.eval_every": 0, "checkpoint.every": 0},
    {"train.device": "cpu"},
    {"data.seq_len": 2},
    {"optim": MuonConfig()},
    {"data": HubData(path="a/b", seq_len=64)},
    {
        "data": MixtureData(
            seq_len=64, parts={"a": MixturePart(SourceKind.stdlib), "b": MixturePart(SourceKind.domains)}
        )
    },
    {"run.name": "a/b", "resume": "none"},
    {"compare.arms": {"moe": [], "dense-1.5": []}, "compare.seeds": [0]},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=[str(sorted(a)) for a in ACCEPTED])
def test_accepted(base, changes):
    assert validate(change(base, changes)) == []


def test_every_rule_refuses_something(base):
    """Each check that ``validate`` makes raises for at least one of the cases above."""
    own_tests = {"attention_accepts_its_options", "layers_accept_their_options", "check_tracker"}
    warnings = {"router_is_causal", "repair_looks_ahead", "rounding_looks_ahead", "ends_with_its_schedule"}
    warnings |= {"products_train_alone", "router_has_its_task"}
    others = {"check_eval", "check_generate", "feed_forward_is_own", "check_engine"}
    rules = {name for name, value in vars(validate_module).items() if inspect.isfunction(value)}
    rules = {name for name in rules if not name.startswith(("_", "validate"))}
    silent = rules - own_tests - warnings - others - {"smallest_world"}
    assert {"check_model", "check_layout", "task_of"} <= silent
    for changes, *_ in REFUSED:
        with pytest.raises(UserError) as caught:
            validate(change(base, changes))
        silent -= {entry.name for entry in caught.traceback}
    assert silent == set()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_nearest_global_batches_are_valid(base, world):
    wrong = change(base, {"train.global_batch_tokens": 2000})
    with pytest.raises(UserError, match="the nearest that are: ") as caught:
        validate(wrong, world)
    below, above = map(int, str(caught.value).rpartition(": ")[2].split(" or "))
    assert below < 2000 < above == below + 384 * world
    for tokens in (below, above):
        validate(change(base, {"train.global_batch_tokens": tokens}), world)


def test_layouts_of_several_ranks(base):
    base = change(base, {"train.global_batch_tokens": 384 * 4})
    validate(change(base, {"parallel.dp_replicate": 2}), 4)
    validate(change(base, {"parallel.dp_replicate": 2, "parallel.dp_shard": 2}), 4)
    with pytest.raises(UserError, match="is 4, but this run has 2 ranks"):
        validate(change(base, {"parallel.dp_replicate": 2, "parallel.dp_shard": 2}), 2)
    with pytest.raises(UserError, match="dp_replicate=3 does not divide the 4 ranks"):
        validate(change(base, {"parallel.dp_replicate": 3}), 4)


@pytest.mark.parametrize(("steps", "said"), [(99, "stops before"), (101, "goes on after")])
def test_steps_that_do_not_end_with_the_schedule_are_a_warning(base, steps, said):
    (warning,) = validate(change(base, {"train.steps": steps}))
    assert f"train.steps={steps}" in warning
    assert "schedule.horizon=100" in warning
    assert said in warning


def test_compile_wants_a_torch_that_compiles_rightly(base, monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.12.1")
    check_loop(base.train)
    with pytest.raises(
        UserError, match=r"train.compile=true: torch 2.12.1 compiles gradients wrongly: install 2.13"
    ):
        check_loop(change(base, {"train.compile": True}).train)


def test_compile_wants_a_compiler(base, monkeypatch, tmp_path):
    cfg = change(base, {"train.compile": True})
    monkeypatch.setattr("torch.__version__", "2.13.0")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"train.compile=true needs a C\+\+ compiler"):
        validate(cfg)
    for name, env in (("g++", None), ("my-cxx", "my-cxx -O2")):
        tool = tmp_path / name
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
        if env:
            monkeypatch.setenv("CXX", env)
        validate(cfg)
        tool.unlink()
    with pytest.raises(UserError, match="my-cxx"):
        validate(cfg)


def test_a_tracker_that_is_not_installed(base, monkeypatch, tmp_path):
    monkeypatch.setattr(log_rules, "is_installed", lambda package: False)
    with pytest.raises(UserError, match=r"tracker=wandb needs .* pip install 'moetrain\[wandb\]'"):
        validate(change(base, {"tracker": WandbTracker()}))
    monkeypatch.undo()
    (tmp_path / "surely_a_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_installed("surely_a_folder")
    assert not is_installed("surely_not_there")
    assert is_installed("pytest")


def test_cuda_without_a_gpu(base):
    import torch

    cfg = change(base, {"train.device": "cuda"})
    if torch.cuda.is_available():
        assert validate(cfg) == []
    else:
        with pytest.raises(UserError, match=r"train\.device=cuda, but torch .* sees no CUDA device"):
            validate(cfg)


GENERATE = [
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"temperature": -0.1}, "temperature=-0.1"),
    ({"temperature": NAN}, "temperature=nan"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_p": 0.0}, "top_p=0.0 must lie in (0, 1]"),
    ({"top_p": 1.1}, "top_p=1.1"),
    ({"device": "gpu"}, "device=gpu"),
    ({"prompt": None}, "exactly one of"),
    ({"prompt_file": "x"}, "exactly one of"),
    ({"prompt": None, "prompt_file": "/no/such"}, "prompt_file=/no/such"),
    ({"checkpoint": "/no/such"}, "checkpoint=/no/such"),
]


@pytest.mark.parametrize(("changes", "said"), GENERATE, ids=[g[1] for g in GENERATE])
def test_generate_refused(changes, said):
    cfg = GenerateConfig(checkpoint=os.path.dirname(__file__), prompt="x", top_p=1.0, temperature=0.0)
    validate_generate(cfg)
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace("]", r"\]")):
        validate_generate(change(cfg, changes))


HIERARCHICAL = {"parallel.ep": 4, "parallel.dispatcher": ExpertDispatch.hierarchical}
DISPATCH = [
    ({"parallel.overlap": 0}, "parallel.overlap=0 must be 1 or more"),
    ({"parallel.overlap": 2}, "parallel.overlap=2 needs parallel.ep above 1: set parallel.overlap=1"),
    ({"parallel.overlap": 2, **HIERARCHICAL}, "is of parallel.dispatcher=all_to_all, not of hierarchical"),
    ({"parallel.ep": 4, "parallel.overlap": 4}, "parallel.overlap=4", "=12 / parallel.ep=4 leaves 3 a rank"),
    ({"parallel.node_sums": False}, "is of parallel.dispatcher=hierarchical, not of all_to_all"),
    ({"parallel.ranks_per_node": 0, **HIERARCHICAL}, "parallel.ranks_per_node=0 must be 1 or more"),
    ({"parallel.ranks_per_node": 3, **HIERARCHICAL}, "parallel.ranks_per_node=3 and parallel.ep=4: one must"),
    (HIERARCHICAL, "parallel.ranks_per_node=3 (LOCAL_WORLD_SIZE) and parallel.ep=4"),
]


@pytest.mark.parametrize(("changes", "said"), [(d[0], d[1:]) for d in DISPATCH], ids=[d[1] for d in DISPATCH])
def test_dispatch_refused(base, changes, said, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError) as caught:
        validate(change(base, {"train.global_batch_tokens": 384 * 4, **changes}), 4)
    assert all(text in str(caught.value) for text in said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [
    {"parallel.ep": 4, "parallel.overlap": 3},
    {"parallel.ranks_per_node": 2, "parallel.node_sums": False, **HIERARCHICAL},
    {"parallel.ranks_per_node": 4, **HIERARCHICAL},
    {"parallel.ranks_per_node": 4, **HIERARCHICAL, "parallel.ep": 2},
    {"parallel.ranks_per_node": 3, **HIERARCHICAL, "parallel.ep": 1},
])  # fmt: skip
def test_dispatch_accepted(base, changes):
    validate(change(base, {"train.global_batch_tokens": 384 * 4, **changes}), 4)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_default_trains_on_more_ranks_without_another_option(world, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    validate(compose_train([]), world)


def test_a_share_that_is_no_whole_sequence_is_refused():
    with pytest.raises(UserError, match=r"train.global_batch_tokens=2048 is no multiple"):
        validate(compose_train([]), 3)


def test_the_config_knows_it_and_warns_of_what_looks_ahead() -> None:
    for rule in ("next_expert", "local", "fill_in", "local_fill_in"):
        own = ["router.local_devices=2", "router.local_sequences=1"] if "local" in rule else []
        cfg = compose_train([f"router.repair={rule}", "router.capacity_factor=1.0", *own])
        assert cfg.router.repair.name == rule
        said = " ".join(validate(cfg))
        assert ("looks ahead" in said) == (rule != "local")
        assert ("train/loss can be too low" in said) == (rule != "local")
        limits = ["router.capacity_factor=1.0", "router.eval_capacity_factor=1.0"]
        both = compose_train([f"router.repair={rule}", *limits, *own])
        assert ("train/loss and val/loss can" in " ".join(validate(both))) == (rule != "local")
    assert "looks ahead" not in " ".join(validate(compose_train(["router.capacity_factor=1.0"])))


def test_rounding_is_warned_of_and_refused_beside_a_capacity() -> None:
    small = ["router.rounding=nearest", "router.rounding_tile=128", "data.seq_len=64"]
    (said,) = (line for line in validate(compose_train(small)) if "rounding" in line)
    assert "router.rounding=nearest looks ahead" in said
    assert "gets 16 tokens of a routing group on average, fewer than router.rounding_tile=128" in said
    (said,) = (
        line for line in validate(compose_train([*small, "router.rounding_tile=16"])) if "round" in line
    )
    assert "on average" not in said
    for more, message in (
        ("router.capacity_factor=1.0", "both decide how many tokens an expert takes"),
        ("router.group=all", "not of router.group=all"),
        ("router=hash", "router=hash returns none: set router.rounding=none"),
    ):
        with pytest.raises(UserError, match=message):
            validate(compose_train([*small, more]))
