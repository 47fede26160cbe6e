"""The kernels folder is ``moetrain.kernels``, needs no Triton, and is not in the way of others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

NO_TRITON = """
import sys
sys.modules["triton"] = None  # every import of it fails, installed or not
import moetrain.kernels, moetrain.moe, kernels
print(next(iter(moetrain.kernels.__path__)))
print(kernels.WHO)
"""


def python(*arguments: str, path: str = "", cwd: Path = ROOT) -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("folder", ["kernels", "configs"])
def test_the_linked_folders_are_no_regular_packages(folder: str) -> None:
    assert (ROOT / "moetrain" / folder).resolve() == (ROOT / folder).resolve()
    assert not (ROOT / folder / "__init__.py").exists()
    # origin is None: no module file of ours answers to that top-level name, even from the root
    where = f"import importlib.util as u; s = u.find_spec({folder!r}); print(s and s.origin)"
    origin = python("-c", where)
    assert origin == "None" or not Path(origin).is_relative_to(ROOT)


@pytest.fixture
def unrelated(tmp_path: Path) -> str:
    """A package called kernels, as an installed one would be: behind the current folder on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHO = 'the unrelated package'\n")
    (tmp_path / "ask_for_kernels.py").write_text("import kernels\nprint(kernels.WHO)\n")
    return str(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import ask_for_kernels"),
        ("-m", "ask_for_kernels"),
        ("-m", "torch.distributed.run", "-m", "ask_for_kernels"),
    ],
    ids=["-c", "-m", "torchrun"],
)
def test_a_package_called_kernels_is_found_from_the_root(arguments: tuple[str, ...], unrelated: str) -> None:
    """However a process is started there: all of these put the current folder first on the path."""
    assert python(*arguments, path=unrelated) == "the unrelated package"


def test_ours_import_without_triton_beside_the_other_package(unrelated: str) -> None:
    ours, other = python("-c", NO_TRITON, path=unrelated).splitlines()
    assert Path(ours).resolve() == (ROOT / "kernels").resolve()
    assert other == "the unrelated package"
