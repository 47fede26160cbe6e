"""Where there is no GPU, Triton's kernels are interpreted: imported before anything that imports Triton.

What Triton's own language is written in is interpreted only if the variable is set by then, and
torch._dynamo imports it too, so a folder's conftest.py would be too late.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
