"""Targets: what else lies in a run folder (config.yaml, rows, summary), and values of the command line."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import yaml

from fuzz.forms import json_file, jsonl_file, yaml_file
from fuzz.target import Target, Way, anything, command
from fuzz.trees import MARKUP
from moetrain.config.hydra.compose import compose_train, load_yaml
from moetrain.config.validate import validate
from moetrain.files import parse_yaml
from moetrain.plain import to_yaml
from moetrain.train.log.jsonl import read_metrics
from moetrain.train.run_dir import RunDir

_PARTS = ("model", "router", "experts")  # the groups that decide a model's function
_KEPT_STEPS = 3
_MARK = "override: "  # what follows is one argument of the command line


def _config(arguments: list[str], folder: str | None = None) -> dict[str, Any]:
    """A command's result, and the config that it read beside what the file says."""
    said = command(arguments)
    if folder is not None:
        files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".json", ".safetensors"))
        said += "".join(
            hashlib.sha256(f.read_bytes()).hexdigest() if f.suffix != ".json" else f.read_text()
            for f in files
        )
    return {"said": said, "read": yaml.safe_load(to_yaml(load_yaml("run/config.yaml"))), "file": _document()}


def _document() -> Any:
    try:
        return yaml.safe_load(Path("run/config.yaml").read_bytes())
    except Exception as error:
        return f"no YAML: {error}"


def _init_from() -> dict[str, Any]:
    cfg = compose_train(["init_from=run", "data=local", "data.path=text", "data.tokenizer.kind=bytes"])
    validate(cfg)
    read = yaml.safe_load(to_yaml(cfg))
    return {"said": {part: read[part] for part in _PARTS}, "read": read, "file": _document()}


def _follows(good: Any, found: Any) -> str | None:
    """The same result, or one of a config that says so in words of the schema."""
    if found["said"] == good["said"]:
        return None
    if not isinstance(found["file"], dict):
        return f"differs: taken, but {str(found['file'])[:80]}"
    for part in _PARTS:
        difference = _difference(found["file"].get(part, {}), found["read"][part], part)
        if difference:
            return f"differs: {difference}"
    return None


def _difference(said: Any, read: Any, place: str) -> str | None:
    if isinstance(said, dict) and isinstance(read, dict):
        for key, value in said.items():
            if key not in read:
                return f"{place}.{key} was not read"
            if found := _difference(value, read[key], f"{place}.{key}"):
                return found
        return None
    if isinstance(said, list) and isinstance(read, list) and len(said) == len(read):
        return next((d for a, b in zip(said, read, strict=True) if (d := _difference(a, b, place))), None)
    alike = said == read or str(said).strip().lower() == str(read).lower() or _number(said) == _number(read)
    return None if alike else f"{place} is {str(said)[:40]!r} in the file and was read as {str(read)[:40]!r}"


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return repr(value)


def _report(kind: str, plots: bool) -> str:
    with mock.patch("moetrain.report.page.has_matplotlib", return_value=plots):
        said = command([kind, "run"])
    return said + Path("run/report.html").read_text() if kind == "report" else said


def _two_runs() -> str:
    """A page of two runs, which compares their configs; the other one is the same."""
    shutil.copytree("run", "other")
    with mock.patch("moetrain.report.page.has_matplotlib", return_value=False):
        command(["report", "run", "other", "-o", "page.html"])
    return Path("page.html").read_text()


def _clean_page(good: str, found: str) -> str | None:
    """The page holds no markup of the files, and no word of an exception."""
    if MARKUP in found:
        return "differs: markup of a file in the page"
    if error := re.search(r"could not be drawn: (\w+)[^<]{0,80}", found):
        return f"differs: {error[0]}"
    return None


def _truncated() -> dict[str, Any]:
    """What ``moetrain train`` does with the rows of a run that it goes on with."""
    before = {name: (Path("run") / name).read_bytes() for name in ("metrics.jsonl", "load.jsonl")}
    run_dir = RunDir(Path("run"))
    try:
        run_dir.truncate_after(_KEPT_STEPS)
        run_dir.metrics.append({"step": _KEPT_STEPS + 1, "train/loss": 1.0})
        run_dir.load.append({"step": _KEPT_STEPS + 1, "layers": [0, 1], "load": [[1.0], [1.0]]})
    finally:
        run_dir.close()
    after = {name: (Path("run") / name).read_bytes() for name in before}
    return {"before": before, "after": after, "last": read_metrics(Path("run"))[-1]}


def _kept(good: Any, found: Any) -> str | None:
    """Each untouched row of the steps so far is there, in order; none of a later step; then the new one."""
    if found["last"] != good["last"]:
        return "differs: the new row is not the last"
    for name, before in found["before"].items():
        original = {line for line in good["before"][name].split(b"\n") if line}
        early = {line for line in original if json.loads(line)["step"] <= _KEPT_STEPS}
        expected = [line for line in (raw.strip(b"\0") for raw in before.split(b"\n")) if line in early]
        kept = [line for line in found["after"][name].split(b"\n") if line in original]
        if kept != expected:
            return f"differs: {name}: {len(kept)} untouched rows kept, not {len(expected)}"
        if b"\0" in found["after"][name]:
            return f"differs: {name}: NUL bytes kept"
    return None


def _override(rng: Random, data: bytes) -> tuple[bytes, str]:
    """One leaf of the config, with the value that the mutated document gives it."""
    text, note = yaml_file(rng, data)
    text = text.replace(b"FUZZ_SECRET", b"HOME")  # who types an argument may read the environment
    try:
        document, whole = parse_yaml(text, "the config"), parse_yaml(data, "the config")
        changed = _changed_leaf(whole, document, "")
    except Exception:
        changed = None
    if changed is None:  # the document is broken
        key = rng.choice(("model.d_model", "model.d_ff", "model.num_layers", "router.top_k", "train.seed"))
        changed = f"{key}={rng.choice((2**31, 10**9 + 7, 10**15, 2**64, -1, '1e9', '[', '{a:', '${x}'))}"
        note = "one value"
    return (_MARK + changed).encode("utf-8", "backslashreplace"), f"{changed[:60]!r} ({note})"


def _changed_leaf(one: Any, other: Any, place: str) -> str | None:
    if isinstance(one, dict) and isinstance(other, dict):
        for key, value in other.items():
            inner = f"{place}.{key}" if place else str(key)
            found = _changed_leaf(one[key], value, inner) if key in one else f"+{inner}={value}"
            if found:
                return found
        return None
    return (
        None
        if one == other
        else f"{place}={other if isinstance(other, str) else json.dumps(other, default=str)}"
    )


def _composed() -> Any:
    text = Path("run/config.yaml").read_text()
    cfg = compose_train([text.removeprefix(_MARK)] if text.startswith(_MARK) else [])
    validate(cfg)
    return to_yaml(cfg)


_CONFIG_WAYS = (
    Way(
        "generate",
        partial(_config, ["generate", "checkpoint=run", "prompt=abc", "max_new_tokens=3", "device=cpu"]),
        _follows,
        3,
    ),
    Way(
        "export",
        partial(_config, ["export", "checkpoint=run", "target=out", "family=moetrain"], "out"),
        _follows,
        2,
    ),
    Way(
        "eval",
        partial(_config, ["eval", "checkpoint=run", "data.path=text/00.txt", "device=cpu", "json=out.json"]),
        _follows,
    ),
    Way("init_from", _init_from, _follows),
    Way("report", partial(_report, "report", False), _clean_page, 2),
    Way("report of two", _two_runs, _clean_page),
    Way("status", partial(_report, "status", False), anything),
)
TABLES = (
    Way("report", partial(_report, "report", False), _clean_page, 3),
    Way("status", partial(_report, "status", False), anything),
)
_ROWS = ("run/metrics.jsonl", "run/load.jsonl")
_FACTS = ("run/summary.json", "run/environment.json", "run/ranks/rank_00000.json")
TARGETS = [
    Target("run_config", ("run", "text"), ("run/config.yaml",), yaml_file, _CONFIG_WAYS, share=3),
    Target("metrics_resume", ("run",), _ROWS, jsonl_file, (Way("resume", _truncated, _kept),), share=2),
    Target("report_rows", ("run",), _ROWS, jsonl_file, TABLES, share=2),
    Target("report_facts", ("run",), _FACTS, json_file, TABLES),
    Target(
        "report_plots",
        ("run",),
        _ROWS,
        jsonl_file,
        (Way("report", partial(_report, "report", True), _clean_page),),
    ),
    Target("overrides", ("run",), ("run/config.yaml",), _override, (Way("compose", _composed, anything),)),
]
