"""Without Triton the tests of kernels are skipped; helpers/interpreted.py has them run without a GPU.

``pytest -m gpu tests/kernels --confcutdir=tests/kernels`` runs the same tests on a GPU, and needs no more
than torch, Triton, PyYAML and pytest.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

_WITHOUT_TRITON = ("test_kernels_import.py", "test_tiles.py")


class _Skipped(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip(str(_missing()), allow_module_level=True)


@cache
def _missing() -> str | None:
    """The reason why no kernel can run here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'moetrain[triton]'"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 9) and numpy >= (2, 4) and not torch.cuda.is_available():
        return "the interpreter of Triton before 3.9 needs numpy before 2.4"
    return None


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if _missing() is None or module_path.name in _WITHOUT_TRITON:
        return None
    return _Skipped.from_parent(parent, path=module_path)


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("cpu", id="interpreted"),
        pytest.param("cuda", id="compiled", marks=pytest.mark.gpu),
    ],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: interpreted on the CPU, and compiled on a GPU, each where this machine has it.

    A process has one of them: Triton chooses when it is imported.
    """
    on_gpu = torch.cuda.is_available()
    if request.param == "cuda" and not on_gpu:
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    if request.param == "cpu" and on_gpu:
        pytest.skip("kernels are compiled where there is a GPU: pytest -m gpu")
    return torch.device(request.param)
