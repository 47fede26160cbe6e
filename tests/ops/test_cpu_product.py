"""The CPU's matrix product: the same numbers whichever library computes it, and a way out without oneDNN."""

from __future__ import annotations

import pytest
import torch

from moetrain.ops.cpu import libraries
from moetrain.ops.cpu import product as cpu_product
from moetrain.ops.cpu.product import add_outer, outer, product

LARGE = (97, 251, 211)  # above the size from which oneDNN is asked
assert LARGE[0] * LARGE[1] * LARGE[2] > cpu_product._MIN_WORK


@pytest.fixture(params=["mkl", "onednn"])
def library(request, monkeypatch):
    """Both choices on every machine, whoever made its processor."""
    monkeypatch.setattr(cpu_product, "faster", lambda: request.param)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [LARGE, (3, 5, 7), (0, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("into", [False, True])
def test_equals_matmul(shape, dtype, into):
    n, k, m = shape
    generator = torch.Generator().manual_seed(n)
    a_nK, b_KN = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((n, k), (k, m)))
    for b in (b_KN, b_KN.t().contiguous().t()):
        out = torch.full((n, m), torch.nan, dtype=dtype) if into else None
        found = product(a_nK.to(dtype), b.to(dtype), out=out)
        assert not into or found.data_ptr() == out.data_ptr()
        expected = a_nK.to(dtype).double() @ b.to(dtype).double()
        bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound * k**0.5)


@pytest.mark.skipif(not libraries.has_onednn(), reason="this build of torch has no oneDNN linear operator")
def test_onednn_is_used_unless_switched_off(monkeypatch):
    monkeypatch.setattr(cpu_product, "faster", lambda: "onednn")
    asked = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: asked.append(args) or mm(*args, **kwargs))
    a_nK, b_KN = torch.randn(*LARGE[:2]), torch.randn(*LARGE[1:])
    by_onednn = product(a_nK, b_KN)
    assert not asked
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert torch.allclose(product(a_nK, b_KN), by_onednn, atol=1e-4)
    assert len(asked) == 1


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "shape", [LARGE, (97, 251, 499), (97, 499, 251), (97, 113, 499), (97, 499, 113), (3, 5, 7), (0, 5, 7)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_outer_is_the_product_with_the_transposed(shape, dtype):
    n, k, m = shape
    generator = torch.Generator().manual_seed(n)
    a_nK, b_nN = (torch.randn(n, s, generator=generator, dtype=torch.float64).to(dtype) for s in (k, m))
    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    out_KN = torch.full((k, m), torch.nan, dtype=wide)
    assert outer(a_nK, b_nN, out_KN) is out_KN
    bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    bounds = {"rtol": bound, "atol": bound * (n + 1) ** 0.5}
    expected = a_nK.double().t() @ b_nN.double()
    torch.testing.assert_close(out_KN.double(), expected, **bounds)
    made = outer(a_nK, b_nN)
    assert made.dtype is dtype
    assert made.is_contiguous()
    torch.testing.assert_close(made.double(), expected, **bounds)
    add_outer(out_KN, a_nK, b_nN)
    torch.testing.assert_close(out_KN.double(), 2 * expected, **bounds)


@pytest.mark.usefixtures("library")
def test_a_long_sum_is_added_by_parts(monkeypatch):
    monkeypatch.setattr(cpu_product, "_ROWS", 128)
    a_nK, b_nN, total_KN = torch.randn(97, 499), torch.randn(97, 251), torch.randn(499, 251)
    expected = total_KN + a_nK.t() @ b_nN
    add_outer(total_KN, a_nK, b_nN)
    torch.testing.assert_close(total_KN, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not libraries.has_onednn(), reason="this build of torch has no oneDNN linear operator")
@pytest.mark.parametrize("columns", [slice(0, 211), slice(100, 311), slice(0, 422, 2)])
def test_onednn_gets_matrices_of_their_own_memory(monkeypatch, columns):
    """Of some columns of a wider one it takes a thousand times as long."""
    a_nK, b_KN = torch.randn(*LARGE[:2]), torch.randn(LARGE[1], 500)[:, columns]
    asked, linear = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *args: asked.append(args[1]) or linear(*args)
    )
    torch.testing.assert_close(libraries.by_onednn(a_nK, b_KN), a_nK @ b_KN, rtol=1e-5, atol=1e-4)
    (weight_NK,) = asked
    assert weight_NK.is_contiguous() or weight_NK.t().is_contiguous()


@pytest.mark.parametrize(("dtype", "columns", "copied"), [
    (torch.bfloat16, 251, True), (torch.bfloat16, 211, False), (torch.float64, 251, False),
])  # fmt: skip
def test_a_much_wider_bf16_gradient_takes_a_copy(monkeypatch, dtype, columns, copied):
    a_nK, b_nN = torch.randn(13, 113).to(dtype), torch.randn(13, columns).to(dtype)
    plain_KN = torch.mm(a_nK.t(), b_nN)
    monkeypatch.setattr(cpu_product, "faster", lambda: "onednn")
    asked, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, *rest, **kw: asked.append(a) or mm(a, *rest, **kw))
    wide = torch.promote_types(dtype, torch.float32)
    found_KN = outer(a_nK, b_nN, torch.full((113, columns), torch.nan, dtype=wide))
    assert torch.equal(found_KN, plain_KN.to(wide))
    assert [a.is_contiguous() for a in asked] in ([[True]] if copied else [[False], []])
