"""The MoE layer beside its limit on a CPU: the bare products of the same rows, forward plus backward.

    python benchmarks/cpu_limit.py [--shapes A B C] [--random 10] [--dtypes fp32 bf16] [--loads uniform zipf]
                                   [--threads 1] [--repetitions 30] [--wall] [--out FILE]

Three runs see the same new input, and so the same new loads, in each repetition, in random order:

products  six matrix products an expert (two forward, four backward), operands ready in the products' dtype,
          results in memory that is there already; in bf16 rows are rounded up to a multiple of 32
experts   the operator: gather, activation, weighting, and casts of fp32 weights and gradients too
layer     router, plan and the sum of a token's rows too

Time is the processor time of all threads, since other work may be on the machine; ``--wall``: the clock's.
``zipf``: the n-th expert is wanted as n^-1.2. bf16 is autocast over fp32 weights.

Shapes: T tokens, D model, R rows sorted by expert, n of them one expert's, E experts, F hidden, P = 2F.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import as_trainer  # noqa: F401  # before torch
import torch
from peers import SHAPES, Shape
from timing import interleaved, machine, medians, ratio, write_json
from torch import Tensor

from moetrain.moe import MoELayer
from moetrain.moe.context import RouterContext
from moetrain.moe.dispatch import ExpertRows
from moetrain.moe.experts import Experts
from moetrain.moe.routers.topk import TopKOptions, TopKRouter
from moetrain.moe.routing import Routing
from moetrain.ops import expert_mlp
from moetrain.parallel.allocator import keep_freed_memory

BF16_ROWS = 32  # oneDNN compiles a bf16 kernel for every number of rows, which takes longer than this padding
SKEW = 1.2
GUMBEL_STD = 1.28  # the best k of log p plus such noise are draws from p


class SkewedRouter(TopKRouter):
    """Softmax top-k whose experts are not equally wanted."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.d_model, shape.experts, TopKOptions(top_k=shape.top_k))
        torch.nn.init.normal_(self.weight_ED, std=GUMBEL_STD * shape.d_model**-0.5)
        self.wanted_E = -SKEW * torch.arange(1.0, shape.experts + 1).log()

    def logits(self, x_TD: Tensor) -> Tensor:
        return super().logits(x_TD) + self.wanted_E


def layer_of(shape: Shape, load: str) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(shape.d_model, shape.d_ff, shape.experts, router_options={"top_k": shape.top_k})
    if load == "zipf":
        layer.router = SkewedRouter(shape)
    return layer


@dataclass(frozen=True)
class Case:
    """A repetition: the input, the output's gradient, and the rows that the layer's router gives them."""

    x_BSD: Tensor
    dy_BSD: Tensor
    chunk: ExpertRows


class Runs:
    """The three runs of one layer, shape and dtype; ``cases`` are drawn before any is timed."""

    def __init__(self, shape: Shape, dtype: torch.dtype, load: str, repetitions: int) -> None:
        self.shape, self.dtype = shape, dtype
        self.layer = layer_of(shape, load)
        torch.manual_seed(1)
        self.cases = [self._case() for _ in range(repetitions)]
        self.counts = [list(case.chunk.rows.segments.on_host) for case in self.cases]
        most = max(sum(self._widths(counts)) for counts in self.counts)
        d, f, p = shape.d_model, shape.d_ff, 2 * shape.d_ff
        widths = {"x": d, "z": p, "h": f, "out": d, "dout": d, "dh": f, "dz": p, "dx": d}
        self.rows = {name: torch.randn(most, width).to(dtype) for name, width in widths.items()}
        experts = self.networks()
        self.up_EDP = experts.w_gate_up_EDCF.detach().flatten(2).to(dtype)
        self.down_EFD = experts.w_down_EFD.detach().to(dtype)
        self.dup_EDP, self.ddown_EFD = torch.empty_like(self.up_EDP), torch.empty_like(self.down_EFD)

    def networks(self) -> Experts:
        assert isinstance(self.layer.experts, Experts)
        return self.layer.experts

    def _case(self) -> Case:
        s = self.shape
        x_BSD, dy_BSD = torch.randn(2, s.tokens // 2, s.d_model), torch.randn(2, s.tokens // 2, s.d_model)
        with torch.no_grad():
            ctx = RouterContext.default(2, s.tokens // 2, x_BSD.device)
            routing: Routing = self.layer.router(x_BSD.view(-1, s.d_model), ctx)
            work = self.layer.dispatcher.dispatch(x_BSD.view(-1, s.d_model), routing.assignment)
            (chunk,) = work.arrivals()
        return Case(x_BSD, dy_BSD, chunk)

    def _widths(self, counts: list[int]) -> list[int]:
        block = BF16_ROWS if self.dtype is torch.bfloat16 else 1
        return [-(-rows // block) * block for rows in counts]

    def _segments(self, repetition: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        start = 0
        for expert, rows in enumerate(self._widths(self.counts[repetition])):
            if rows:
                yield expert, {name: whole[start : start + rows] for name, whole in self.rows.items()}
            start += rows

    def products(self, repetition: int) -> None:
        for e, r in self._segments(repetition):
            torch.mm(r["x"], self.up_EDP[e], out=r["z"])
            torch.mm(r["h"], self.down_EFD[e], out=r["out"])
        for e, r in self._segments(repetition):
            torch.mm(r["dout"], self.down_EFD[e].t(), out=r["dh"])
            torch.mm(r["h"].t(), r["dout"], out=self.ddown_EFD[e])
            torch.mm(r["x"].t(), r["dz"], out=self.dup_EDP[e])
            torch.mm(r["dz"], self.up_EDP[e].t(), out=r["dx"])

    def experts(self, repetition: int) -> None:
        case, experts = self.cases[repetition], self.networks()
        x_TD = case.x_BSD.view(-1, self.shape.d_model).detach().requires_grad_()
        weights_R = case.chunk.weights_R.detach().requires_grad_()
        out_RD = expert_mlp(
            x_TD, case.chunk.rows, weights_R, experts.w_gate_up_EDCF.flatten(2), experts.w_down_EFD,
            experts.activation, experts.backend, self.dtype,
        )  # fmt: skip
        out_RD.backward(out_RD.detach())
        experts.zero_grad(set_to_none=True)

    def whole(self, repetition: int) -> None:
        case = self.cases[repetition]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            y_BSD, _ = self.layer(case.x_BSD.detach().requires_grad_())
        y_BSD.backward(case.dy_BSD.to(y_BSD.dtype))
        self.layer.zero_grad(set_to_none=True)


def measure(
    shape: Shape, dtype: torch.dtype, load: str, repetitions: int, warm_up: int, wall: bool
) -> dict[str, Any]:
    runs = Runs(shape, dtype, load, warm_up + repetitions)
    named: dict[str, Callable[[int], None]]
    named = {"products": runs.products, "experts": runs.experts, "layer": runs.whole}
    times = interleaved(named, repetitions, warm_up, time.perf_counter if wall else time.process_time)
    shares = {
        name: sorted(a / b for a, b in zip(times["products"], times[name], strict=True)) for name in named
    }
    skews = [max(counts) * len(counts) / sum(counts) for counts in runs.counts]
    return {
        "ms": {name: 1e3 * seconds for name, seconds in medians(times).items()},
        "percent": {name: 100 * ratio(times, "products", name) for name in ("experts", "layer")},
        "quartiles of experts": [100 * x for x in statistics.quantiles(shares["experts"])],
        "largest load over the mean": statistics.mean(skews),
    }


def random_shapes(number: int, most: float = 6e10) -> dict[str, Shape]:
    """Sizes that a model might have, drawn by a fixed seed, of at most ``most`` multiplications."""
    draw = random.Random(15)
    found: dict[str, Shape] = {}
    while len(found) < number:
        experts = draw.choice((4, 8, 12, 16, 24, 32, 48, 64))
        shape = Shape(
            tokens=draw.randrange(512, 4097, 2),
            d_model=64 * draw.randint(2, 16),
            d_ff=64 * draw.randint(2, 32),
            experts=experts,
            top_k=min(draw.randint(1, 8), experts // 2),
        )
        if most / 10 < 9 * shape.tokens * shape.top_k * shape.d_model * shape.d_ff < most:
            found[f"random {len(found)}"] = shape
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--random", type=int, default=0, help="the number of random shapes")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--loads", nargs="+", default=["uniform"], choices=["uniform", "zipf"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the trainer does
    result: dict[str, Any] = {"machine": machine(), "repetitions": args.repetitions, "shapes": {}}
    print(result["machine"])
    shapes = {name: SHAPES[name] for name in args.shapes} | random_shapes(args.random)
    for name, shape in shapes.items():
        for dtype in args.dtypes:
            for load in args.loads:
                precision = torch.bfloat16 if dtype == "bf16" else torch.float32
                f = measure(shape, precision, load, args.repetitions, args.warm_up, args.wall)
                result["shapes"][f"{name} {dtype} {load}"] = {"shape": str(shape), **f}
                print(
                    f"{name:9} {dtype} {load:7} products {f['ms']['products']:7.1f} ms  of which experts "
                    f"{f['percent']['experts']:4.0f} % ({f['quartiles of experts'][0]:.0f}-"
                    f"{f['quartiles of experts'][2]:.0f})  layer {f['percent']['layer']:4.0f} %  "
                    f"skew {f['largest load over the mean']:.1f}  {shape if name not in SHAPES else ''}",
                    flush=True,
                )
                write_json(args.out, result)


if __name__ == "__main__":
    main()
