"""Without Triton the tests of kernels are skipped; helpers/interpreted.py has them run without a GPU."""

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


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU if there is one, else the CPU, interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
