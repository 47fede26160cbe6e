"""Every shipped yaml: composed against its schema, valid, described in its first line, and read back."""

import dataclasses
import re
from functools import cache

import pytest
from omegaconf import OmegaConf

from moetrain.config.help import group_options
from moetrain.config.hydra.compose import compose_app, compose_train, load_yaml
from moetrain.config.hydra.store import CONFIG_DIR, variants
from moetrain.config.validate import validate, validate_upcycle
from moetrain.convert.options import UpcycleConfig
from moetrain.errors import UserError
from moetrain.flat import TAGS
from moetrain.moe.options import Activation, RouterConfig
from moetrain.plain import plain, to_yaml
from moetrain.train.options import TrainConfig
from moetrain.upcycle import METHODS

GROUPS = group_options()
OPTIONS = [(group, name) for group, names in GROUPS.items() for name in names]
TRAINS = [(group, name) for group, name in OPTIONS if group != "method"]  # which is upcycle's
TUNED = ("gpt_oss_20b", "qwen3_30b_a3b", "smollm2")  # experiments of conversations, which the user gives
FILES = sorted(CONFIG_DIR.rglob("*.yaml"))

# What an option needs beside itself: experts enough for the published routers, a path for data of one's own.
NEEDS = {
    ("router", "deepseek_v3"): ["model.num_experts=256"],
    ("router", "olmoe"): ["model.num_experts=64"],
    ("router", "qwen3"): ["model.num_experts=128"],
    ("balance", "dynmoe"): ["router=dynmoe"],
    ("balance", "dynmoe_deepspeed"): ["router=dynmoe"],
    ("balance", "moec"): ["router=moec"],
    ("balance", "stable"): ["router=stable"],
    ("balance", "vq"): ["router=vq"],
    ("balance", "penalty"): ["router=dselect_k"],
    ("balance", "sam"): ["router=sam"],
    ("balance", "competesmoe"): ["router=competesmoe"],
    ("balance", "s2moe"): ["model=s2moe"],
    ("balance", "competesmoe_v1"): ["router=competesmoe_v1"],
    ("balance", "remoe"): ["router=relu"],
    ("data", "local"): [f"data.path={CONFIG_DIR}/*.yaml"],
    ("data", "hub"): ["data.path=owner/name"],
    ("data", "chat"): [f"data.path={CONFIG_DIR}/*.yaml"],
    ("data", "prompt_completion"): [f"data.path={CONFIG_DIR}/*.yaml"],
    **{("experiment", f"sft_{name}"): [f"data.path={CONFIG_DIR}/*.yaml"] for name in TUNED},
    ("data", "mixture"): ["data.parts.here.kind=stdlib", "data.parts.there.kind=domains"],
}


@cache
def composed(group, name):
    return compose_train([f"{group}={name}", *NEEDS.get((group, name), [])])


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    for name in ("WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("group", "name"), TRAINS, ids=[f"{g}={n}" for g, n in TRAINS])
def test_every_option_composes_is_valid_and_reads_back(group, name, tmp_path):
    cfg = composed(group, name)
    validate(cfg)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(cfg))
    assert load_yaml(file) == cfg
    assert to_yaml(cfg) == OmegaConf.to_yaml(OmegaConf.create(plain(cfg)))


# What YAML, or a reader of it, may take for something else than text; the last ones need no quotes.
WORDS = [
    *("y", "No", "ON", "true", "null", "~", "1", "1_0", "-1", "1e3", "1e-5", ".5", "inf", "nan"),
    *("0x1f", "0o7", "12:30", "2001-01-01", "=", "<<", "", " a ", "a: b", "# a", "[a", "- a"),
    *("a\nb", "\t", "\x1b", "'\"", "x y " * 50, "yEs", "a", "a b", "é", "a'b"),
]


def test_text_is_written_as_omegaconf_writes_it():
    """Configs of before are compared with new ones by the hash of these bytes."""
    for word in WORDS:
        assert to_yaml({word: [word]}) == OmegaConf.to_yaml(OmegaConf.create({word: [word]})), word


def test_numbers_and_empty_values_are_written_as_before():
    values = {"a": [1e-5, 1e22, -0.0, 2**70, True, None], "b": {}, "c": [], "d": [1.5, "relu"]}
    ours = values | {"d": (1.5, Activation.relu)}
    assert to_yaml(ours) == OmegaConf.to_yaml(OmegaConf.create(values))


@pytest.mark.parametrize("name", GROUPS["method"])
def test_every_upcycling_method_composes_and_is_valid(name, tmp_path):
    dense = compose_train(["model=tiny_dense", "model.vocab_size=4096"])
    (tmp_path / "config.yaml").write_text(to_yaml(dense))
    (tmp_path / "tokenizer").mkdir()
    made = [f"source={tmp_path}", "target=there", f"method={name}", "model.num_experts=4"]
    cfg = compose_app(UpcycleConfig, "upcycle", made)
    validate_upcycle(cfg)
    method = {"llama_moe_v2": "split"}.get(name, name)
    assert type(cfg.method) is METHODS[method].options
    assert cfg.method.name == method
    assert (cfg.model.d_model, cfg.model.d_ff_expert) == (128, 512)
    own = dataclasses.replace(cfg.model, feed_forward="mine")
    with pytest.raises(UserError, match=r"feed_forward=mine: upcycling makes model\.feed_forward=moe only"):
        validate_upcycle(dataclasses.replace(cfg, model=own))


def test_all_groups_and_files_are_covered():
    assert set(GROUPS) == {
        "model", "router", "balance", "experts", "data", "optim", "schedule", "parallel", "engine", "tracker",
        "experiment", "method",
    }  # fmt: skip
    in_groups = {CONFIG_DIR / group / f"{name}.yaml" for group, name in OPTIONS}
    assert {f for f in FILES if f.parent != CONFIG_DIR} == in_groups
    assert [f.name for f in FILES if f.parent == CONFIG_DIR] == [
        "_run.yaml", "convert.yaml", "eval.yaml", "export.yaml", "generate.yaml", "train.yaml",
        "upcycle.yaml", "verify.yaml",
    ]  # fmt: skip
    for group, classes in variants().items():
        assert set(classes) <= set(GROUPS[group]), f"an option of {group} has no yaml"


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(CONFIG_DIR)) for f in FILES])
def test_the_first_line_says_what_it_is(file):
    lines = file.read_text().splitlines()
    described = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert re.fullmatch(r"# [A-Z0-9].{15,}[.:].*", described)


def test_the_default_is_as_documented():
    cfg = compose_train([])
    assert type(cfg) is TrainConfig
    for field in dataclasses.fields(TrainConfig):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            assert value.__dataclass_params__.frozen, field.name
    assert (cfg.router.name, cfg.data.source, cfg.optim.name) == ("topk", "stdlib", "adamw")
    assert (cfg.engine.name, cfg.tracker.name) == ("native", "jsonl")
    assert [(x.name, x.coef, x.scope.name) for x in cfg.balance.losses] == [
        ("switch", 0.01, "global_batch"),
        ("z", 0.001, "global_batch"),
    ]
    assert isinstance(cfg.router, RouterConfig)
    assert cfg.optim.betas == (0.9, 0.95)
    assert cfg.compare.arms == {}
    assert validate(cfg) == []


@pytest.mark.parametrize("group", sorted(TAGS.keys() - {"method"}))
def test_an_option_named_like_a_class_is_of_that_class(group):
    for name, cls in variants()[group].items():
        part = getattr(composed(group, name), group)
        assert type(part) is cls
        assert getattr(part, TAGS[group]) == name


def test_what_the_presets_mean():
    v3 = composed("router", "deepseek_v3").router
    assert (v3.score.name, v3.top_k, v3.num_groups, v3.top_groups, v3.route_scale) == (
        "sigmoid",
        8,
        8,
        4,
        2.5,
    )
    assert composed("router", "mixtral").router.score.name == "softmax_after"
    assert composed("router", "olmoe").router.renormalize is False
    assert composed("router", "qwen3").router.renormalize is True
    switch = composed("router", "switch").router
    assert (switch.top_k, switch.capacity_factor, switch.eval_capacity_factor) == (1, 1.25, 2.0)
    aux_free = composed("balance", "aux_free").balance
    assert aux_free.controllers == {"bias": {"rate": 0.001}}
    assert [(x.coef, x.scope.name) for x in aux_free.losses] == [(0.0001, "sequence")]
    assert composed("balance", "none").balance.losses == []
    for scope in ("sequence", "micro", "running"):
        assert composed("balance", scope).balance.losses[0].scope.name == scope
    assert composed("experts", "relu2").experts.activation is Activation.relu2
    assert composed("schedule", "wsd").schedule.kind.name == "wsd"


def test_layouts_follow_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    layouts = {name: compose_train([f"parallel={name}"]).parallel for name in GROUPS["parallel"]}
    degrees = {name: (p.dp_replicate, p.dp_shard) for name, p in layouts.items()}
    assert degrees == {
        "auto": (1, None),
        "fsdp": (1, None),
        "ddp": (8, 1),
        "hsdp": (2, None),
        "ep": (1, None),
    }


def test_the_comparison_changes_only_the_model_and_its_balance():
    cfg = compose_train(["experiment=moe_vs_dense"])
    assert cfg.compare.arms == {"moe": [], "dense": ["model=tiny_dense", "balance=none"]}
    assert cfg.compare.seeds == [0, 1, 2]
    dense = compose_train(["experiment=moe_vs_dense", *cfg.compare.arms["dense"]])
    assert dense.model.num_experts == 0
    assert dense.balance.losses == []
    assert dataclasses.replace(dense, model=cfg.model, balance=cfg.balance) == cfg
