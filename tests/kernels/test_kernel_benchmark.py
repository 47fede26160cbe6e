"""benchmarks/kernel_speed.py: its references are the twins, its bounds hold, a wrong kernel is above them.

Shapes: T tokens, D model, F hidden, E experts, k experts a token, R rows.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import interpreted
import pytest
import torch

from moetrain.kernels.twins import combine as combine_twin
from moetrain.kernels.twins import grouped as twin

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bounded
import kernel_problem
import kernel_products
import kernel_rows
import kernel_speed
from kernel_units import units
from peers import Shape

SHAPE = Shape(13, 19, 7, 3, 2)
assert interpreted
# The interpreter drops the bits that bf16 has no room for, where a GPU rounds to nearest: twice the error.
TRUNCATED = {torch.float32: 1.0, torch.float16: 1.0, torch.bfloat16: 2.0}
CASES = [
    pytest.param(dtype, load, marks=[] if (dtype, load) == (torch.float16, "zipf") else pytest.mark.real)
    for dtype in TRUNCATED
    for load in kernel_problem.LOADS
]


def problem(
    dtype: torch.dtype, device: torch.device, load: str = "zipf", shape: Shape = SHAPE
) -> kernel_problem.Problem:
    return kernel_problem.draw(shape, load, dtype, device, block=16)


@pytest.mark.parametrize(("dtype", "load"), CASES, ids=str)
def test_no_kernel_is_above_its_bound(dtype: torch.dtype, load: str, device: torch.device) -> None:
    p = problem(dtype, device, load)
    most = TRUNCATED[dtype] if device.type == "cpu" else 1.0
    for unit in units(p):
        found = kernel_speed.errors(unit, p)
        assert all(0 <= error <= most for error in found), (unit.name, found)
        assert kernel_speed.equal_bits(unit, p), unit.name


def test_what_the_kernels_are_compared_with_runs(device: torch.device) -> None:
    """Widths that torch's grouped product takes: none may be a call that nobody answers any more."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # torch's on a GPU takes no fp32
    p = problem(dtype, device, shape=Shape(13, 24, 8, 3, 2))
    for unit in units(p):
        for name, run in unit.others.items():
            assert run(), (unit.name, name)
    unit = kernel_products.feed_forward(p)
    for name in unit.others if device.type == "cpu" else ():  # bounds of fp32 are those of any order of sums
        found, wanted = unit.others[name]()[0], unit.reference()[0]
        assert wanted[p.used_R].ratio(found[p.used_R]) <= 1, name


def test_a_wrong_kernel_is_above_its_bound(device: torch.device) -> None:
    """One row is off by half a unit in the last place, or holds one value that is no number."""
    p = problem(torch.float16, device)
    unit = kernel_products.down_projection(p)
    (right,) = unit.ours()
    row = int(p.used_R.nonzero()[3])
    wrong = right.clone()
    wrong[row] = right[row] * (1 + 2.0**-9)
    assert kernel_speed.errors(replace(unit, ours=lambda: [wrong]), p)[0] > 1
    missing = right.clone()
    missing[row, 0] = torch.nan
    assert kernel_speed.errors(replace(unit, ours=lambda: [missing]), p) == [torch.inf]


def test_bits_that_differ_are_seen(device: torch.device) -> None:
    p = problem(torch.float32, device)
    unit, calls = kernel_products.down_projection(p), []

    def drifting() -> list[torch.Tensor]:
        calls.append(0)
        return [unit.ours()[0] + (len(calls) == kernel_speed.REPEATS) * 2.0**-20]

    assert not kernel_speed.equal_bits(replace(unit, ours=drifting), p)


def test_the_reference_is_the_twin(device: torch.device) -> None:
    """Values of both in fp64, forward and every gradient, without rounding on the way."""
    p = problem(torch.float32, device)
    used = p.used_R
    x_RD = twin.gather(p.source_XD.double(), p.rows.ids_R)
    leaves = [t.double().requires_grad_() for t in (x_RD, p.weights_R, p.w_up_EDP, p.w_down_EFD)]
    experts_B = p.meta.block_expert_B
    out, z = twin.forward(leaves[0], experts_B, *leaves[1:], kernel_problem.ACTIVATION)
    grads = torch.autograd.grad(out, leaves, p.dout_RD.double())
    forward = kernel_products.feed_forward(p).reference()
    whole = kernel_products.feed_forward_and_backward(p).reference()
    for want, got in ((out, forward[0]), (z, forward[1]), (out, whole[0]), (grads[0], whole[1])):
        torch.testing.assert_close(got.value[used], want.detach()[used], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole[2].value[used], grads[1][used], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([w.value for w in whole[3:]], list(grads[2:]), rtol=1e-12, atol=1e-12)
    rows = kernel_problem.random_rows(p, SHAPE.d_model, 12).double()
    (sums,) = kernel_rows.sums(p).reference()
    want = combine_twin.combine(rows, p.rows.by_source_N, p.rows.ends_X)
    torch.testing.assert_close(sums.value, want, rtol=1e-12, atol=1e-12)


def test_a_bound_grows_with_what_is_summed() -> None:
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(7, 53, generator=g), torch.randn(53, 11, generator=g)
    product = bounded.Bounded.exact(a) @ bounded.Bounded.exact(b)
    assert 0 < product.ratio(a @ b) <= 1
    assert product.ratio((a @ b) + 1e-3) > 1
    half = bounded.Bounded.exact(a[:, :26]) @ bounded.Bounded.exact(b[:26])
    assert (half.error < product.error).all()
    assert product.rounded(torch.bfloat16).ratio((a @ b).bfloat16()) <= 1


def test_loads_are_drawn_as_they_are_named() -> None:
    g = torch.Generator().manual_seed(5)
    shape = Shape(997, 1, 1, 13, 3)
    for load, low, high in (("uniform", 1.0, 1.5), ("zipf", 5.0, 40.0)):
        ids_TK = kernel_problem.chosen(shape, load, g)
        counts = torch.bincount(ids_TK.flatten(), minlength=13)
        assert low <= counts.max() / counts.min() < high
        assert all(len(set(row)) == 3 for row in ids_TK.tolist())


def test_a_job_yields_figures_of_every_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU: its clock is replaced, all else runs."""
    monkeypatch.setitem(kernel_speed.PUBLISHED, "A", Shape(7, 16, 8, 3, 2))
    monkeypatch.setattr(kernel_speed, "CHECKED_TOKENS", 5)
    monkeypatch.setattr(
        kernel_speed, "timed", lambda runs, n, flush: {name: [2.0, 4.0, 6.0] for name in runs}
    )
    monkeypatch.setattr(kernel_speed, "repetitions_within", lambda *unused: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *unused: None)
    monkeypatch.setattr("moetrain.ops.experts.blocks.usual_block", lambda *unused: 16)
    (job,) = kernel_speed.jobs(["A"], ["zipf"], ["fp32"], whole=True)
    rows = kernel_speed.run_job(job, 3, torch.zeros(1, dtype=torch.int8))
    assert [row["unit"] for row in rows] == ["forward", "forward + backward"]
    assert all(row["ways"]["moetrain"]["ms"] == 4 and row["equal_bits"] for row in rows)
    assert rows[0]["ways"]["moetrain"]["tflops"] == 6 * 14 * 16 * 8 / 4e9
    assert not kernel_speed.faults(rows)
    assert len(kernel_speed.faults([rows[0] | {"errors": [1.5]}, rows[1] | {"equal_bits": False}])) == 2


def test_without_a_gpu_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernel_speed.py", "--shapes", "A", "--dtypes", "bf16"])
    assert kernel_speed.main() == 2
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dry-run"])
    assert kernel_speed.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 problems"
