"""Launch scripts hand every word on as it is: nothing in a config's value is run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
WORDS = [
    "run.name=$(touch ran)", "run.name=`touch ran`", "run.name=a;touch ran", "run.name=a\ntouch ran",
    "run.name='a' \"b\"", "run.name=a && touch ran", "run.name=*", "run.name=${HOME}", "run.name=a|touch ran",
    "run.name=\\", "run.name=a > ran",
]  # fmt: skip
_ECHO = "#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"


def scripts() -> list[Path]:
    return [path for path in LAUNCH.rglob("*") if path.is_file() and path.suffix in ("", ".sh", ".sbatch")]


def test_no_script_evaluates_text():
    assert len(scripts()) >= 5
    for path in scripts():
        code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert not re.search(r"\beval\b|\bsource\b|\bbash -c|\bsh -c|`|\$\*", "\n".join(code)), path


@pytest.fixture
def echoed(tmp_path: Path) -> dict[str, str]:
    """An environment in which torchrun and python print their words."""
    for name in ("torchrun", "python"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(_ECHO)
        (tmp_path / "bin" / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HEAD": "h", "NNODES": "2"}


@pytest.mark.parametrize(
    "script", ["torchrun/train.sh", "torchrun/nodes.sh", "slurm/train.sbatch", "slurm/sweep.sbatch"]
)
def test_a_script_hands_words_on(script, echoed, tmp_path):
    done = subprocess.run(
        ["bash", str(LAUNCH / script), *WORDS], env=echoed, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[-len(WORDS) :] == WORDS
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", ["a;touch ran", "$(touch ran)", "`touch ran`", "a b 'c'", "a && touch ran"])
def test_submit_prints_words_that_a_shell_reads_back(value, tmp_path, capsys, monkeypatch):
    from moetrain.slurm import submit

    monkeypatch.chdir(tmp_path)
    quoted = value.replace("'", "\\'")
    word = f"train.sample_prompt='{quoted}'"
    scripts = ["--scripts", str(LAUNCH / "slurm"), "--dry-run"]
    assert submit.main([*scripts, f"--partition={value}", "--", word]) == 0, capsys.readouterr().err
    line = capsys.readouterr().out
    assert word in shlex.split(line)
    assert f"--partition={value}" in shlex.split(line)
    (tmp_path / "sbatch").write_text(f"#!{sys.executable}\n" + _ECHO)
    (tmp_path / "sbatch").chmod(0o755)
    there = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    read = subprocess.run(["bash", "-c", line], env=there, capture_output=True, text=True, cwd=tmp_path)
    assert word in json.loads(read.stdout)
    assert not (tmp_path / "ran").exists()
