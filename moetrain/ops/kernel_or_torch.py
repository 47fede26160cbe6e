"""Whether a kernel or torch takes a smaller step of an MoE layer: the sums of rows, a router's choice."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from moetrain.ops import self_test
from moetrain.ops.say_once import say_once
from moetrain.ops.triton_support import device_refusal

AUTO = "auto"
_KERNELS = ("triton", "triton_block_sparse")
_tested: dict[tuple[str, torch.device, Hashable], str | None] = {}
C = TypeVar("C", bound=Hashable)


@dataclass(frozen=True)
class Step(Generic[C]):
    """A step that a kernel can take in place of torch's operators.

    name     as it is said.
    refusal  the reason why the kernel does not take a case; None if it does.
    test     what is wrong with the kernel on a device in a case, as a phrase; None if it is right.
    """

    name: str
    refusal: Callable[[C], str | None]
    test: Callable[[torch.device, C], str | None]

    def by_kernel(self, asked: str, device: torch.device, case: C) -> bool:
        """Whether the kernel takes the step; where it does not although it could be asked to, that is said.

        ``asked``: ``experts.backend``. A Triton backend asks for the kernel, ``auto`` does on a GPU, and any
        other asks for torch. Why a device has no kernels at all is said by the experts' ladder, not here. The
        self-test runs once a process.
        """
        if asked not in _KERNELS and (asked != AUTO or device.type == "cpu"):
            return False
        if device_refusal(device) is not None:
            return False
        reason = self.refusal(case) or self._tested(device, case)
        if reason is not None:
            say_once(f"{self.name} with experts.backend={asked}: {reason}; torch computes it")
        return reason is None

    def _tested(self, device: torch.device, case: C) -> str | None:
        key = (self.name, device, case)
        if key not in _tested:
            _tested[key] = self_test.run(lambda: self.test(device, case), device)
        return _tested[key]
