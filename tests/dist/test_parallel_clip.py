"""The gradient norm over meshes, replicas, uneven shards and plain tensors equals one process's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from moetrain.parallel.clip import clip_, global_norm
from moetrain.parallel.ranks import run_ranks

SHAPES = [(7, 5), (1, 3), (11,), (3, 2, 5), (13,), (2, 2)]


def whole_grads(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) * 10 for shape in SHAPES]


def plain(grads: list[Tensor]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return parameters


def laid_out(world: int, grads: list[Tensor]) -> list[nn.Parameter]:
    """Shards on a line (one row for two ranks, too), on a grid, on another dimension, and a plain tensor."""
    line = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
    grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    layouts = [
        (line, [Shard(0)]),
        (line, [Shard(0)]),
        (grid, [Replicate(), Shard(0)]),
        (grid, [Shard(0), Shard(1)]),
        (line, [Replicate()]),
    ]
    parameters = []
    for grad, (mesh, placements) in zip(grads, layouts, strict=False):
        parameters.append(nn.Parameter(distribute_tensor(torch.zeros_like(grad), mesh, placements)))
        parameters[-1].grad = distribute_tensor(grad, mesh, placements)
    return parameters + plain(grads[len(layouts) :])


def measure(rank: int, world: int) -> dict[str, object]:
    parameters = laid_out(world, whole_grads())
    result: dict[str, object] = {
        "two": float(global_norm(parameters)),
        "inf": float(global_norm(parameters, math.inf)),
        "returned": float(clip_(parameters, 1.0)),
        "clipped": float(global_norm(parameters)),
    }
    result["grads"] = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in parameters]
    parameters = laid_out(world, whole_grads())
    if rank == 0:
        parameters[1].grad = None  # its only row lies here
    result["missing"] = float(global_norm(parameters))
    if rank == 1:
        parameters[0].grad.to_local()[0, 0] = math.nan
    before = [
        getattr(p.grad, "to_local", lambda p=p: p.grad)().clone() for p in parameters if p.grad is not None
    ]
    result["nan"] = float(clip_(parameters, 1.0))
    result["nan inf"] = float(global_norm(parameters, math.inf))
    after = [getattr(p.grad, "to_local", lambda p=p: p.grad)() for p in parameters if p.grad is not None]
    result["untouched"] = all(
        torch.equal(a.nan_to_num(5), b.nan_to_num(5)) for a, b in zip(before, after, strict=True)
    )
    return result


@pytest.mark.parametrize("world", [2, 4])
def test_norm_and_clipping_equal_one_process(world):
    grads = whole_grads()
    flat = torch.cat([grad.flatten() for grad in grads])
    expected = float(flat.norm())
    without = float(torch.cat([grad.flatten() for i, grad in enumerate(grads) if i != 1]).norm())
    for result in run_ranks(measure, world):
        assert result["two"] == pytest.approx(expected, rel=1e-12)
        assert result["returned"] == pytest.approx(expected, rel=1e-12)
        assert result["inf"] == float(flat.abs().max())
        assert result["clipped"] == pytest.approx(1.0, rel=1e-12)
        for grad, whole in zip(result["grads"], grads, strict=True):
            torch.testing.assert_close(grad, whole / expected, rtol=1e-12, atol=1e-13)
        assert result["missing"] == pytest.approx(without, rel=1e-12)
        assert math.isnan(result["nan"])
        assert result["nan inf"] == math.inf
        assert result["untouched"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_process_agrees_with_torch(dtype):
    ours, theirs = plain([g.to(dtype) for g in whole_grads()]), plain([g.to(dtype) for g in whole_grads()])
    norm = clip_(ours, 3.0)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 3.0)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert norm.dtype is torch.float64
    assert float(norm) == pytest.approx(float(expected), rel=tolerance)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("shape", [(1_000_003,), (1009, 1013), (3, 521, 677), (1021,), (5, 0), ()])
def test_a_large_norm_in_fp32_is_that_of_fp64(shape):
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    parameter.grad = parameter.detach().clone()
    for norm_type in (2.0, math.inf):
        expected = torch.linalg.vector_norm(parameter.grad.double(), norm_type) if parameter.numel() else 0.0
        assert float(global_norm([parameter], norm_type)) == pytest.approx(float(expected), rel=1e-7)


def test_gradients_below_the_bound_keep_their_bits():
    parameters, grads = plain(whole_grads()), whole_grads()
    clip_(parameters, 1e6)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(parameters, grads, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_touches_nothing(bad):
    grads = whole_grads()
    grads[2][4] = bad
    parameters = plain(grads)
    assert not clip_(parameters, 1.0).isfinite()
    assert all(
        torch.equal(p.grad.nan_to_num(5), g.nan_to_num(5)) for p, g in zip(parameters, grads, strict=True)
    )


def test_no_gradient_has_norm_zero_and_zero_gradients_survive():
    parameters = plain(whole_grads())
    for parameter in parameters:
        parameter.grad = None
    assert float(clip_(parameters, 1.0)) == 0.0
    assert float(global_norm([])) == 0.0
    parameters = plain([torch.zeros(3, 5)])
    clip_(parameters, 1.0)
    assert torch.equal(parameters[0].grad, torch.zeros(3, 5))


def test_another_norm_is_refused():
    with pytest.raises(ValueError, match="must be 2 or inf"):
        global_norm(plain(whole_grads()), 1.0)


def partial(rank: int, world: int) -> str:
    mesh = init_device_mesh("cpu", (world,))
    placements: list[Placement] = [Partial()]
    parameter = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, placements, run_check=False))
    try:
        global_norm([parameter])
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_partial_sum_is_refused():
    assert all("partial sum" in text for text in run_ranks(partial, 2))
