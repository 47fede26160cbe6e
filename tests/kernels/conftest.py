"""Without Triton the tests of kernels are skipped; helpers/interpreted.py has them run without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

_WITHOUT_TRITON = ("test_kernels_import.py", "test_tiles.py")


class _Skipped(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip("triton is not installed: pip install 'moetrain[triton]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if importlib.util.find_spec("triton") is not None or module_path.name in _WITHOUT_TRITON:
        return None
    return _Skipped.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the GPU if there is one, else the CPU, interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
