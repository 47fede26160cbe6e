"""The table of what may change on resume, the comparison by it, and options that would change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from moetrain.cli import main
from moetrain.config.hydra.compose import compose_train
from moetrain.config.hydra.store import variants
from moetrain.config.init_from import spec_overrides
from moetrain.flat import flat
from moetrain.models.hf.family import ModelSpec
from moetrain.models.options import AttentionBackend
from moetrain.train.changes import RULES, Change, compare, differences, rule_of, table
from moetrain.train.identity import function_of
from moetrain.train.options import TrainConfig
from moetrain.verify.twin import twin_of

DOCS = Path(__file__).parents[2] / "docs" / "resume.md"


def keys_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Every key below a config class, over all options of each group."""
    for name, hint in get_type_hints(cls).items():
        key = prefix + name
        options = variants().get(key, {}).values() if not prefix else ()
        below = [c for c in (hint, *options) if dataclasses.is_dataclass(c)]
        yield from (k for c in below for k in keys_of(c, f"{key}.")) if below else [key]


def test_every_key_has_a_rule():
    keys = set(keys_of(TrainConfig))
    assert {"optim.momentum", "data.domain_key", "router.jitter", "model.rope_scaling.kind"} <= keys
    assert sorted(key for key in keys if rule_of(key) is None) == []
    assert rule_of("train.new_key") is None  # each key of this section is decided by itself


def test_every_rule_is_of_a_key():
    known = {part for key in keys_of(TrainConfig) for part in _sections(key)}
    named = [key for rule in RULES for key in rule.keys]
    assert [key for key in named if key not in known] == []
    assert len(set(named)) == len(named)


def _sections(key: str) -> Iterator[str]:
    parts = key.split(".")
    yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def test_the_attention_backend_is_none_of_the_model():
    """Another one computes the same, and another machine may lack it."""
    before, now = (compose_train([f"model.attention_backend={name}"]) for name in ("auto", "blocks"))
    assert function_of(before) == function_of(now)
    assert compare(before, now, "runs/a") == []
    assert twin_of(now, 1, 1).cfg.model.attention_backend is AttentionBackend.auto
    described = spec_overrides(ModelSpec(now.model, now.router, now.experts))
    assert [line for line in described if line.startswith("model.attention_backend")] == []


def test_the_docs_show_the_table():
    assert table() in DOCS.read_text()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("router.top_k", Change.named),
        ("experts.activation", Change.named),
        ("experts.backend", Change.free),
        ("model.attention_backend", Change.free),
        ("optim.lr", Change.named),
        ("schedule.horizon", Change.named),
        ("train.seed", Change.fixed),
        ("train.steps", Change.free),
        ("train.precision", Change.said),
        ("parallel.ep", Change.free),
        ("data.path", Change.free),
        ("data.seq_len", Change.fixed),
    ],
)
def test_the_longest_section_decides(key, change):
    assert rule_of(key).change is change


BASE = ["router=topk", "balance=switch"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], []),
        (["run.name=x"], [("run.name", "null", "x")]),
        (["router.top_k=1"], [("router.top_k", "null", "1")]),
        (["experts.activation=relu"], [("experts.activation", "swiglu", "relu")]),
        (["optim.betas=[0.5,0.9]"], [("optim.betas", "[0.9,0.95]", "[0.5,0.9]")]),
        (["train.compile=true"], [("train.compile", "false", "true")]),
        (["balance=none"], [("balance.losses", "set", "[]")]),
        (["router=hash"], [("router.name", "topk", "hash")]),
        (["init_from=/nowhere"], [("init_from", "null", "/nowhere")]),
    ],
    ids=lambda part: " ".join(part) if part and isinstance(part[0], str) else "",
)
def test_differences_name_the_shortest_key_that_tells(overrides, expected, monkeypatch):
    monkeypatch.setattr("moetrain.config.hydra.compose.source_overrides", lambda *arguments: [])
    found = differences(compose_train(BASE), compose_train([*BASE, *overrides]))
    assert [(d.key, d.before, d.now) for d in found] == expected


@pytest.mark.parametrize("spelling", ["m/", "./m", "{here}/m"])
def test_one_path_spelled_in_two_ways_is_no_change(spelling, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = compose_train(BASE)
    before = dataclasses.replace(cfg, init_from="m")
    now = dataclasses.replace(cfg, init_from=spelling.format(here=tmp_path))
    assert differences(before, now) == []


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a'b", "a\\", "\\'", "C:\\${x}", "a,b", "null", "1e3"])
def test_text_of_a_described_model_arrives_as_it_is(text):
    """A downloaded folder's text is neither an interpolation nor another value of Hydra's grammar."""
    cfg = compose_train(["router=hash"])
    spec = ModelSpec(cfg.model, dataclasses.replace(cfg.router, frequencies=text), cfg.experts)
    assert compose_train(spec_overrides(spec)).router == spec.router


EMPTY = {
    "train": ["data.cache_dir", "run.root", "run.name", "init_from", "resume", "data.tokenizer.path"],
    "train data=local": ["data.path"],
    "generate prompt=x": ["checkpoint"],
    "eval data.path=x": ["checkpoint"],
    "eval checkpoint=x": ["data.path", "include_path"],
    "convert source=x": ["target"],
    "convert source=x target=y": ["tokenizer"],
    "convert target=x": ["source"],
    "export checkpoint=x": ["target"],
    "upcycle target=x": ["source"],
    "train -m train.seed=1,2": ["data.cache_dir"],
}


@pytest.mark.parametrize(("line", "key"), [(line, key) for line, keys in EMPTY.items() for key in keys])
def test_an_empty_value_is_no_path(line, key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*line.split(), f"{key}="]) == 2
    said = capsys.readouterr().err
    assert f"{key} is empty: give it a value, or leave it out" in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompt_begins_a_document():
    assert compose_train(["train.sample_prompt="]).train.sample_prompt == ""


@pytest.mark.parametrize(
    "line",
    [
        "train hydra.run.dir=x",
        "train hydra.job.chdir=true",
        "train ++hydra.sweep.dir=x",
        "train hydra/launcher=basic",
        "train -m train.seed=1,2 hydra.run.dir=x",
        "train -m train.seed=1,2 hydra.sweep.dir=x",
        "train -m train.seed=1,2 hydra.job.chdir=true",
        "train -m train.seed=1,2 hydra.output_subdir=x",
        "verify hydra.run.dir=x",
        "export checkpoint=x target=y hydra.job.name=x",
    ],
)
def test_options_of_hydra_without_effect_are_refused(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    option = next(word for word in line.split() if "hydra" in word)
    assert f"{option}: Hydra's own option has no effect on a s" in said
    assert ("run.dir, or run.root/run.name" in said) == any(part in option for part in ("dir", "chdir"))
    assert list(tmp_path.iterdir()) == []


def test_options_of_hydra_with_effect_are_taken(tmp_path, monkeypatch, capsys):
    """A search path in a single run; the sweeper's keys in a sweep, where a wrong one is Hydra's to name."""
    (tmp_path / "mine" / "schedule").mkdir(parents=True)
    (tmp_path / "mine" / "schedule" / "own.yaml").write_text("defaults: [cosine]\nwarmup_steps: 7\n")
    path = f"hydra.searchpath=[file://{tmp_path}/mine]"
    assert compose_train([path, "schedule=own"]).schedule.warmup_steps == 7
    monkeypatch.chdir(tmp_path)
    assert main(["train", "-m", "train.seed=1,2", "hydra.sweeper.nothing=1"]) == 2
    assert "has no effect" not in capsys.readouterr().err


def test_a_value_of_a_yaml_file_is_flat_too():
    plain: dict[str, Any] = {"model": {"a": None, "b": [1, 2]}, "losses": [{"c": 1.5}], "empty": {}}
    expected = {"model.a": None, "model.b": [1, 2], "losses.0.c": 1.5, "empty": []}
    assert flat(plain) == expected
