"""The kernels of the packages behind ``experts.backend``, where installed: interpreted, or on a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import interpreted  # noqa: F401  before any kernel
import pytest
import torch

from moetrain.ops.experts import table
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.self_test import failure

PACKAGES = {"megablocks": "stk", "scattermoe": "scattermoe"}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("name", PACKAGES)
def test_the_packages_pass_the_self_test(
    name: str, activation: str, keep: bool, device: torch.device
) -> None:
    """In fp16: the interpreter has no bf16 without a cast, which these kernels do not make."""
    if find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    case = Case(device, torch.float16, 256, 128, activation, 128, keep)
    assert table.BACKENDS[name].refusal(case) is None
    assert failure(table.BACKENDS[name], case) is None
