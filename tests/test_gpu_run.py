"""benchmarks/gpu: the reader on a folder made by hand, what the scripts import, and the command in small."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "gpu"))
import environment
import summary

ROOT = Path(__file__).parents[1]
GPU = ROOT / "benchmarks" / "gpu"
# What a machine with torch and Triton need not have. torch itself needs the rest.
ABSENT = ("hydra", "omegaconf", "datasets", "pydantic", "yaml", "rich", "tokenizers", "safetensors", "jinja2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GPU / "example", tmp_path / "run"))


def change(path: Path, edit: Callable[[Any], object]) -> None:
    found = json.loads(path.read_text())
    edit(found)
    path.write_text(json.dumps(found))


def words(folder: Path) -> list[str]:
    """The first word of each verdict, with what it is of."""
    return [str(verdict) for verdict in summary.verdicts(folder)]


def test_the_example_says_that_it_is_made_up(folder: Path) -> None:
    assert "made up" in summary.heading(folder)[0]


def test_figures_are_compared_with_their_targets(folder: Path) -> None:
    found = words(folder)
    assert sum(line.startswith("met ") for line in found) == 7
    for part in (
        r"^met .*227 ran, 0 failed, 3 skipped",
        r"^met .*forward, Qwen3.*501 TFLOP/s.*: 510 TFLOP/s on NVIDIA H100",
        r"^missed .*forward \+ backward, Qwen3.*413 TFLOP/s.*: 400 ",
        r"^missed .*faster than grouped_mm: 0\.80 times",
        r"^met .*A pure_bf16: faster than torch grouped_mm: 1\.25",
        r"^WRONG .*differ: A fp32 torch",
        r"^not measured .*A uniform bf16.*did not fit",
        r"^not measured .*no step\.json",
    ):
        assert any(re.search(part, line) for line in found), part


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        ("kernels", lambda f: f["rows"][0].update(errors=[1.01]), r"^WRONG .*errors.*1\.01"),
        ("kernels", lambda f: f["rows"][1].update(errors=[0.1, float("nan")]), r"^WRONG .*errors.*inf"),
        ("kernels", lambda f: f["rows"][1].update(equal_bits=False), r"^WRONG .*1 of 2 differ"),
        ("kernels", lambda f: f.pop("rows"), r"^not measured .*kernels\.json lacks.*rows"),
        ("kernels", lambda f: f["rows"].clear(), r"^not measured .*no row"),
        ("memory", lambda f: f["faults"].append("too much"), r"^WRONG .*too much"),
        ("environment", lambda f: f["gpu"].update(name="A100"), r"^not measured .*501.*510 TFLOP/s on A100"),
    ],
    ids=["error", "no number", "bits", "no rows", "no row", "memory", "another GPU"],
)
def test_what_is_wrong_is_told(folder: Path, file: str, edit: Callable[[Any], object], said: str) -> None:
    change(folder / f"{file}.json", edit)
    assert any(re.search(said, line) for line in words(folder)), words(folder)


def test_files_that_cannot_be_read_are_not_measured(folder: Path) -> None:
    (folder / "layer.json").write_text('{"shapes": ')
    (folder / "memory.json").write_text("[]")
    (folder / "tests.xml").write_text("<testsuites>")
    found = words(folder)
    for part in ("layer.json cannot be read", "memory.json lacks", "no tests.xml"):
        assert any(line.startswith("not measured") and part in line for line in found), part


def test_a_failed_test_is_wrong_and_none_is_not_measured(folder: Path) -> None:
    for attributes, word in (('failures="2" tests="9"', "WRONG"), ('skipped="9" tests="9"', "not measured")):
        (folder / "tests.xml").write_text(f"<testsuites><testsuite {attributes}/></testsuites>")
        assert words(folder)[0].startswith(word)


def test_the_exit_code_is_of_what_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["summary.py", str(folder)])
    assert summary.main() == 1
    change(folder / "determinism.json", lambda found: found["shapes"]["A fp32"].update(torch=[]))
    assert summary.main() == 0  # speeds that were missed are no fault
    monkeypatch.setattr(sys, "argv", ["summary.py", str(folder / "none")])
    assert summary.main() == 2


def test_old_and_missing_versions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.too_old() == [] or "triton" in environment.too_old()[0]
    monkeypatch.setattr(environment, "OLDEST", {"torch": (99, 0), "no_such_package": (1, 2)})
    old, missing = environment.too_old()
    assert old.endswith("is older than 99.0")
    assert missing == "no_such_package is missing: every step needs no_such_package 1.2 or later"
    assert str(environment.why_not(["no_such_module"])).startswith("no_such_module: No module named")


@pytest.mark.real
def test_scripts_import_little_besides_torch() -> None:
    modules = sorted({name for step, names in environment.STEPS.items() if step != "tests" for name in names})
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import environment
assert environment.why_not(["pydantic"])
sys.exit(environment.why_not({modules}))
"""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}:{GPU}", "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=paths)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.real
def test_the_command_runs_in_small_without_a_gpu(tmp_path: Path) -> None:
    command = [str(GPU / "run.sh"), "--dry-run", "--out", str(tmp_path / "out")]
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    steps = [json.loads(line) for line in (tmp_path / "out" / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == ["tests", "kernels", "layer", "determinism", "memory", "step"]
    assert not any(step["code"] for step in steps)
    collected = re.search(r"(\d+)/\d+ tests collected", (tmp_path / "out" / "tests.log").read_text())
    assert collected
    assert int(collected[1]) > 200


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--fast"], "unknown option --fast"), (["--budget", "x"], "--budget is a number of seconds, not 'x'")],
)
def test_options_that_are_wrong_end_in_one_line(arguments: list[str], said: str) -> None:
    ran = subprocess.run([str(GPU / "run.sh"), *arguments], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert said in ran.stderr
