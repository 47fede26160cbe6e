"""Composing, writing and reading configs: types, text, mappings, plugins, hashes, and what is refused."""

import dataclasses
import os
import sys
import textwrap

import pytest

from moetrain.config.editable import editable, freeze, original
from moetrain.config.hydra.compose import (
    compose_arms,
    compose_train,
    load_yaml,
)
from moetrain.data.options import LocalData, MixturePart, SourceKind
from moetrain.errors import UserError
from moetrain.moe.routers import ROUTERS
from moetrain.moe.routers.topk import Score, TopKOptions
from moetrain.plain import to_yaml
from moetrain.train.log.options import WandbTracker
from moetrain.train.options import CompareConfig, GenerateConfig, RunConfig, TrainConfig
from moetrain.verify.certificate import config_hash


@pytest.fixture(scope="module")
def base():
    return compose_train([])


def test_values_arrive_typed_and_frozen():
    cfg = compose_train(
        [
            "router=mixtral",
            "router.top_k=3",
            "optim.betas=[0.8,0.9]",
            "optim.lr=3e-4",
            "data=local",
            "data.path=/x/[ab]*.txt",
            "run.name=1e3",
            "tracker=wandb",
            "tracker.tags=[a,b]",
            "train.threads=null",
            "train.deterministic=true",
            "balance.losses.1.coef=0.5",
            "resume=none",
        ]
    )
    assert cfg.router == TopKOptions(top_k=3, score=Score.softmax_after)
    assert cfg.optim.betas == (0.8, 0.9)
    assert cfg.optim.lr == 3e-4
    assert cfg.data == LocalData(path="/x/[ab]*.txt")
    assert cfg.run.name == "1e3"
    assert cfg.tracker == WandbTracker(tags=["a", "b"])
    assert cfg.train.threads is None
    assert cfg.train.deterministic is True
    assert [x.coef for x in cfg.balance.losses] == [0.01, 0.5]
    assert cfg.resume == "none"
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.train.steps = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.balance.losses[0].coef = 1.0


def test_mappings_take_new_names_without_a_plus():
    cfg = compose_train(
        [
            "data=mixture",
            "data.parts.a={kind: local, path: '/x y', weight: 2}",
            "data.parts.b.kind=stdlib",
            "data.parts.b.weight=0.5",
            "+data.parts.c.kind=hub",
            "data.parts.c.path=a=b/c",
            "compare.arms.one=['train.steps=3']",
            "compare.arms.two=[]",
            "compare.seeds=[7]",
        ]
    )
    assert cfg.data.parts == {
        "a": MixturePart(SourceKind.local, 2.0, "/x y"),
        "b": MixturePart(SourceKind.stdlib, 0.5),
        "c": MixturePart(SourceKind.hub, path="a=b/c"),
    }
    assert cfg.compare == CompareConfig(arms={"one": ["train.steps=3"], "two": []}, seeds=[7])


def test_arms_are_the_users_overrides_and_their_own():
    overrides = [
        "model.d_model=64",
        "train.steps=9",
        "compare.arms={a: [], b: ['train.steps=5', 'balance=none']}",
    ]
    arms = compose_arms(compose_train(overrides), overrides)
    assert list(arms) == ["a", "b"]
    assert [arms[x].train.steps for x in arms] == [9, 5]
    assert [arms[x].model.d_model for x in arms] == [64, 64]
    assert [len(arms[x].balance.losses) for x in arms] == [2, 0]
    assert all(arms[x].compare == CompareConfig() for x in arms)


@pytest.mark.parametrize(
    ("old", "new", "fragments"),
    [
        ("d_model: ", "d_modl: 3\n  d_model: ", ["unknown key model.d_modl", "did you mean model.d_model?"]),
        ("  warmup_steps: ", "  warmup_steps: many", ["schedule.warmup_steps", "a whole number"]),
        ("precision: fp32", "precision: fp16", ["train.precision", "fp32, bf16, fp64"]),
        ("name: topk", "name: elsewhere", ["router.name=elsewhere", "topk", "plugins"]),
        ("source: stdlib", "source: web", ["data.source=web", "local"]),
        ("router:\n", "route:\n", ["router is missing"]),
        ("model:\n", "model: [\n", ["line", "not YAML"]),
        ("kind: bpe", "kind: ${nothing}", ["data.tokenizer.kind", "nothing"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused(base, tmp_path, old, new, fragments):
    file = tmp_path / "config.yaml"
    text = to_yaml(base)
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load_yaml(file)
    said = str(caught.value)
    assert [f for f in ["config.yaml", *fragments] if f not in said] == [], said


def test_files_that_are_no_config_are_refused(tmp_path):
    file = tmp_path / "config.yaml"
    with pytest.raises(UserError, match=r"cannot read .*config\.yaml"):
        load_yaml(file)
    for content in (
        b"",
        b"- a\n- b\n",
        b"\xff\xfe\x00",
        b"just words",
        b"{",
        b"!!python/object/apply:os.system [ls]",
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"config\.yaml"):
            load_yaml(file)


def test_a_missing_value_in_a_file_is_named(base, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(base).replace("source: stdlib", "source: local", 1))
    with pytest.raises(UserError, match=r"config\.yaml: data\.path has no value"):
        load_yaml(file)


def test_the_hash_is_of_what_is_trained(base):
    same = [
        dataclasses.replace(base, run=RunConfig(name="x")),
        dataclasses.replace(base, resume="none"),
        dataclasses.replace(base, tracker=WandbTracker()),
        dataclasses.replace(base, compare=CompareConfig(arms={"a": []})),
    ]
    assert {config_hash(c) for c in same} == {config_hash(base)}
    other = [
        dataclasses.replace(base, train=dataclasses.replace(base.train, seed=1)),
        dataclasses.replace(base, optim=dataclasses.replace(base.optim, lr=2.5e-4)),
        dataclasses.replace(base, router=dataclasses.replace(base.router, jitter=0.25)),
    ]
    assert len({config_hash(c) for c in [base, *other]}) == 4


def test_a_primary_config_of_ones_own(base, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(base).replace("seed: 0", "seed: 5", 1))
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\nmodel: {d_model: 64}\n")
    printed = compose_train([], "config", str(tmp_path))
    assert printed == dataclasses.replace(base, train=dataclasses.replace(base.train, seed=5))
    assert compose_train(["train.seed=6"], "config", str(tmp_path)).train.seed == 6
    assert compose_train([], "mine", str(tmp_path)).model.d_model == 64
    with pytest.raises(UserError, match=r"model\.d_model is a whole number, not .wide."):
        compose_train(["model.d_model=wide"], "config", str(tmp_path))


PLUGIN = """
    from dataclasses import dataclass
    from moetrain.moe.options import RouterConfig
    from moetrain.moe.routers import register
    from moetrain.moe.routers.topk import TopKRouter, TopKOptions

    @dataclass(frozen=True)
    class MyOptions(TopKOptions):
        name: str = "mine"
        sharpness: float = 2.0

    @register("mine", MyOptions)
    class MyRouter(TopKRouter):
        pass
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "my_router_plugin.py").write_text(textwrap.dedent(PLUGIN))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_router_plugin"
    ROUTERS.pop("mine", None)
    sys.modules.pop("my_router_plugin", None)


def test_a_router_of_a_plugin_is_an_option(plugin, tmp_path):
    with pytest.raises(UserError, match=r"router=mine: no such option"):
        compose_train(["router=mine"])
    cfg = compose_train([f"plugins=[{plugin}]", "router=mine", "router.sharpness=3", "router.top_k=1"])
    assert (cfg.router.name, cfg.router.sharpness, cfg.router.top_k) == ("mine", 3.0, 1)
    assert type(cfg.router) is ROUTERS["mine"].options
    with pytest.raises(UserError, match=r"router\.sharpnes .*did you mean router\.sharpness"):
        compose_train([f"plugins=[{plugin}]", "router=mine", "router.sharpnes=3"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(cfg))
    assert load_yaml(file) == cfg


def test_a_file_cannot_import_a_plugin(plugin, base, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(base).replace("plugins: []", f"plugins: [{plugin}]"))
    with pytest.raises(UserError, match=rf"plugins=\[{plugin}\] stands in a config file"):
        compose_train([], "config", str(tmp_path))
    assert load_yaml(tmp_path / "config.yaml").plugins == [plugin]
    assert plugin not in sys.modules


def test_a_plugin_that_fails_by_itself_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "my_broken_plugin.py").write_text("import surely_not_installed_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed_anywhere"):
        compose_train(["plugins=[my_broken_plugin]"])


def test_mirrors_keep_fields_order_defaults_and_classes():
    for cls in (TrainConfig, GenerateConfig, LocalData, WandbTracker, TopKOptions):
        mirror = editable(cls)
        assert mirror is editable(cls)
        assert original(mirror) is cls
        assert [f.name for f in dataclasses.fields(mirror)] == [f.name for f in dataclasses.fields(cls)]
        assert not mirror.__dataclass_params__.frozen
        assert freeze(mirror()) == cls()


def test_composing_changes_nothing_outside(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ), list(sys.argv)
    compose_train(["train.seed=3"])
    with pytest.raises(UserError):
        compose_train(["modle=tiny"])
    assert (dict(os.environ), list(sys.argv)) == before
    assert os.listdir(tmp_path) == []
    assert compose_train([]) == base


def test_an_added_key_that_python_reserves_is_one_line():
    with pytest.raises(UserError, match="a key that no config has: __class__"):
        compose_train(["+compare.__class__=[0, 1]"])


@pytest.mark.parametrize("key", ["compare", "data.tokenizer", "train", "checkpoint"])
def test_a_group_that_an_interpolation_replaces_is_one_line(key):
    with pytest.raises(UserError, match=rf"{key} is a group of keys, and was given str"):
        compose_train([f"{key}=${{oc.env:PATH}}"])


def test_the_name_of_an_option_too_long_for_a_file_is_one_line():
    with pytest.raises(UserError, match="router"):
        compose_train([f"router={'x' * 5000}"])


def test_a_long_value_is_shortened_in_the_line():
    with pytest.raises(UserError, match=r"optim.eps is a number, not \[1") as caught:
        compose_train([f"optim.eps=[{'1,' * 2000}1]"])
    assert len(str(caught.value)) < 6000  # the argument itself is there once
