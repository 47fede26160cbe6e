"""Attention as the decoder calls it against one call of torch's for the whole sequence: forward and backward.

    python benchmarks/attention.py [--dtypes fp32 bf16] [--lengths 384 8192] [--repetitions 30] [--out FILE]

2,048 tokens or one longer sequence; heads 64 wide; both ways in one interleaved pass. "documents": four to a
sequence, of a longer one a document to 200 tokens, as packed training has them; torch's call gets the mask of
all pairs.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import interleaved, machine, medians, ratio, write_json
from torch import Tensor

from moetrain.ops.attention import AUTO, Case, SeenKeys, attend, plan_attention, seen_keys
from moetrain.ops.attention.blocks import block_rows

TOKENS, WIDTH = 2048, 64
HEADS = {"4 heads": (4, 4), "8 heads, 2 of keys": (8, 2)}
LENGTHS = (128, 256, 384, 512, 768, 1024, 2048)
WHOLE, OURS = "whole", "by blocks"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def whole(q_BQSH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, seen: SeenKeys | None) -> Tensor:
    mask = None if seen is None else seen.bias(0, seen.seq, 0, q_BQSH.dtype, q_BQSH.device)
    y_BQSH = F.scaled_dot_product_attention(
        q_BQSH, k_BGSH, v_BGSH, attn_mask=mask, is_causal=mask is None,
        enable_gqa=q_BQSH.shape[1] != k_BGSH.shape[1],
    )  # fmt: skip
    return y_BQSH.transpose(1, 2)


def ours(q_BQSH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, seen: SeenKeys | None) -> Tensor:
    return attend(q_BQSH, k_BGSH, v_BGSH, plan_attention(AUTO, case_of(q_BQSH, k_BGSH, seen)))


def case_of(q_BQSH: Tensor, k_BGSH: Tensor, seen: SeenKeys | None) -> Case:
    batch, heads, seq, width = q_BQSH.shape
    return Case(seen, batch, seq, 0, (heads, k_BGSH.shape[1]), width, q_BQSH.dtype, q_BQSH.device)


def documents(batch: int, seq: int) -> Tensor:
    number = 4 if seq <= TOKENS else seq // 200
    ends = torch.randint(1, seq, (batch, number - 1))
    return (torch.arange(seq) >= ends[..., None]).sum(1)


def measure(
    seq: int, heads: tuple[int, int], masked: bool, dtype: torch.dtype, repetitions: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    batch = max(1, TOKENS // seq)
    q, k, v = (
        torch.randn(batch, seq, n, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (heads[0], heads[1], heads[1])
    )
    grad = torch.randn(batch, seq, heads[0], WIDTH, dtype=dtype)
    docs_BS = documents(batch, seq) if masked else None

    def step(which: str, repetition: int) -> None:
        y = (ours if which == OURS else whole)(q, k, v, seen_keys(seq, 0, None, docs_BS))
        torch.autograd.grad(y, (q, k, v), grad)

    times = interleaved({which: partial(step, which) for which in (WHOLE, OURS)}, repetitions, warm_up=2)
    plan = plan_attention(AUTO, case_of(q, k, seen_keys(seq, 0, None, docs_BS)))
    rows = block_rows(seq, dtype) if plan.backend == "blocks" else None
    return {"rows": rows, "ms": 1e3 * medians(times)[WHOLE], "speedup": ratio(times, WHOLE, OURS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--out")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "repetitions": args.repetitions, "cases": []}
    print(result["machine"])
    for dtype in args.dtypes:
        for heads in HEADS:
            for masked in (False, True):
                print(f"\n{dtype}, {heads}, {'documents' if masked else 'causal'}")
                for seq in args.lengths:
                    found = measure(seq, HEADS[heads], masked, DTYPES[dtype], args.repetitions)
                    case = {"dtype": dtype, "heads": heads, "masked": masked, "sequence": seq}
                    result["cases"].append(case | found)
                    how = (
                        f"{found['speedup']:.2f}x by blocks of {found['rows']}" if found["rows"] else "whole"
                    )
                    print(f"  {seq:5} tokens {found['ms']:8.1f} ms whole  {how}")
    write_json(args.out, result)


if __name__ == "__main__":
    main()
