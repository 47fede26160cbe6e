"""The backends of other packages: what they refuse, and what they compute by stand-ins in plain torch.

Where a package is installed, its functions' signatures are compared with the stand-ins' here, and its kernels
run in ``tests/kernels/test_third_party_kernels.py``. Shapes: X source rows, D model, R rows, E experts.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.util import find_spec

import pytest
import third_party_stand_ins
import torch
from operator_cases import operands, rows_of

from moetrain.errors import UserError
from moetrain.moe import MoELayer
from moetrain.ops.activations import is_gated
from moetrain.ops.experts import megablocks_sparse, passed, scattermoe_grouped, table, third_party
from moetrain.ops.experts.case import Case
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.rows import Segments
from moetrain.ops.experts.self_test import failure

CPU = torch.device("cpu")
MODULES = {"megablocks": megablocks_sparse, "scattermoe": scattermoe_grouped}
SIZES = {"megablocks": (128, 256, 128), "scattermoe": (64, 96, 16)}  # d_model, d_ff, block


def case(name: str, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU) -> Case:
    d_model, d_ff, block = SIZES[name]
    return Case(device, dtype, d_model, d_ff, "swiglu", block)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    third_party_stand_ins.install(monkeypatch)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_the_self_test_of_stand_ins(name: str, dtype: torch.dtype, activation: str, keep: bool) -> None:
    d_model, d_ff, block = SIZES[name]
    assert failure(MODULES[name], Case(CPU, dtype, d_model, d_ff, activation, block, keep)) is None


@pytest.mark.usefixtures("stand_ins")
def test_blocks_of_several_tiles() -> None:
    assert failure(megablocks_sparse, Case(CPU, torch.float32, 128, 128, "geglu", 256)) is None


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("activation", "last"), [("swiglu", 0), ("gelu", 7)])
@pytest.mark.parametrize("name", MODULES)
def test_rows_behind_the_last_segment_change_nothing(name: str, activation: str, last: int) -> None:
    """As many rows as counts can need at most, where nobody has looked at them."""
    d_model, d_ff, block = SIZES[name]
    counts, num_source = [3, 0, block + 1, last], block + 2
    rows = rows_of(counts, num_source, block)
    leaves = operands(rows, num_source, d_model, d_ff, torch.float32, is_gated(activation))
    source, weights, up, down = (leaf.detach() for leaf in leaves)
    known = Operands(source, rows.ids_R, weights, up, down, rows.segments, activation)
    used, size = known.num_rows, known.num_rows + 2 * block
    ids_R = torch.full((size,), -1)
    ids_R[:used] = rows.ids_R
    bound_weights_R = torch.zeros(size)
    bound_weights_R[:used] = weights
    segments = Segments(rows.segments.counts_E, block, None)
    bound = Operands(source, ids_R, bound_weights_R, up, down, segments, activation)
    dout_RD = torch.randn(size, d_model) * (ids_R >= 0)[:, None]
    backend = MODULES[name]
    out, kept = backend.forward(known, True)
    want = [out, *backend.backward(dout_RD[:used], known, kept)]
    out, kept = backend.forward(bound, True)
    got = [out, *backend.backward(dout_RD, bound, kept)]
    for ours, theirs in zip(got, want, strict=True):
        by_row = len(ours) == size and len(theirs) == used
        torch.testing.assert_close(ours[:used] if by_row else ours, theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", MODULES)
def test_gradients_lie_as_their_matrices(name: str) -> None:
    """The operator promises so where it is traced."""
    d_model, d_ff, block = SIZES[name]
    rows = rows_of([3, 0, 5], 7, block)
    leaves = operands(rows, 7, d_model, d_ff, torch.float32)
    source, weights, up, down = (leaf.detach() for leaf in leaves)
    of = Operands(source, rows.ids_R, weights, up, down, rows.segments, "swiglu")
    out, kept = MODULES[name].forward(of, True)
    assert kept[0].shape == (of.num_rows, 2 * d_ff)
    _, _, dup, ddown = MODULES[name].backward(out, of, kept)
    assert (dup.stride(), ddown.stride()) == (up.stride(), down.stride())


@pytest.mark.parametrize("path", third_party_stand_ins.STAND_INS)
def test_the_packages_have_these_signatures(path: str) -> None:
    package = path.split(".")[0]
    if find_spec(package) is None or find_spec("triton") is None:
        pytest.skip(f"{package} is not installed")
    real = importlib.import_module(path)
    for function in third_party_stand_ins.STAND_INS[path]:
        theirs = inspect.signature(getattr(real, function.__name__))
        assert str(theirs) == str(inspect.signature(function)), function.__name__


@pytest.mark.parametrize("name", MODULES)
def test_what_they_refuse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal, of = MODULES[name].refusal, case(name)
    monkeypatch.setattr(third_party, "find_spec", lambda module: None)
    assert "is not installed (pip install " in (refusal(of) or "")
    monkeypatch.setattr(third_party, "find_spec", lambda module: module)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "its products are of bf16 and fp16, not float32" in (refusal(case(name, torch.float32)) or "")
    assert "Triton needs a GPU" in (refusal(of) or "")
    assert "GPUs, not xpu" in (refusal(case(name, device=torch.device("xpu"))) or "")
    monkeypatch.setattr("moetrain.ops.triton_support._missing", lambda: None)
    gpu = torch.device("cuda")
    assert refusal(case(name, device=gpu)) is None
    odd = Case(gpu, torch.bfloat16, 264, 128, "swiglu", 128)
    assert "model.d_model=264 is no multiple of" in (refusal(odd) or "")
    odd = Case(gpu, torch.bfloat16, 256, 136, "swiglu", 128)
    assert "model.d_ff_expert=136 is no multiple of" in (refusal(odd) or "")
    if name == "megablocks":
        small = Case(gpu, torch.bfloat16, 256, 128, "swiglu", 64)
        assert refusal(small) == "experts.block=64 is no multiple of 128, the rows of its blocks"
    monkeypatch.setattr("moetrain.ops.triton_support._missing", lambda: "Triton 3.1 is older than 3.4")
    assert refusal(case(name, device=gpu)) == "Triton 3.1 is older than 3.4"


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", MODULES)
def test_the_ladder_tests_them_at_widths_that_they_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("moetrain.ops.triton_support._missing", lambda: None)
    monkeypatch.setattr(table, "_tested", {})
    assert table.why_not(name, Case(CPU, torch.float16, 4096, 14336, "swiglu", 128)) is None


def test_a_small_case_has_widths_of_the_same_kind() -> None:
    large = Case(torch.device("cuda"), torch.bfloat16, 4096, 14336 + 128, "swiglu", 128)
    small = large.small(megablocks_sparse.WIDTH_UNIT)
    assert (small.d_model, small.d_ff) == (384, 384)
    assert large.small(16).d_model == 288


def test_they_are_taken_by_name_only() -> None:
    for device in ("cpu", "cuda"):
        for traced in (False, True):
            assert not set(table.BY_NAME) & set(table.ladder(torch.device(device), traced))
    assert set(MODULES) < set(table.BY_NAME) < set(table.NAMES)


def test_megablocks_has_blocks_of_128_rows() -> None:
    with pytest.raises(ValueError, match=r"but experts\.block=null: set experts\.block=128"):
        MoELayer(128, 128, 3, backend="megablocks")
    MoELayer(128, 128, 3, backend="megablocks", block=256)


def test_what_32_bits_cannot_count() -> None:
    with pytest.raises(
        UserError, match=r"experts\.backend=scattermoe .* rows has 2148532224, more than 2147483647"
    ):
        third_party.require_addressable("scattermoe", rows=torch.empty(2**16, 2**15 + 16, device="meta"))


def test_another_version_is_tested_again() -> None:
    assert set(third_party.DISTRIBUTIONS) == {"stanford-stk", "scattermoe"}
    assert len(passed._packages()) == 1 + len(third_party.DISTRIBUTIONS)
