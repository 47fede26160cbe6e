"""Tensor descriptors and persistent launches: the same bits as by pointers, one program a tile.

Shapes: X source rows, D model, E experts, F hidden, P = 2F or F, R block-aligned rows.
"""

from __future__ import annotations

from dataclasses import replace

import interpreted  # noqa: F401  before any kernel
import kernel_cases
import pytest
import torch
from kernel_cases import Case
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moetrain.kernels import descriptors, metadata, tiles
from moetrain.kernels.activations import GATED, PLAIN, is_gated
from moetrain.kernels.grouped import parts
from moetrain.kernels.grouped.product import product
from moetrain.kernels.grouped.up import up

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the forms are chosen for the interpreter")
BLOCK = 16
# Widths that descriptors take, none of them a multiple of the tile's 16.
CASES = [
    *((case, 24, 40) for case in kernel_cases.EDGES),
    (kernel_cases.random_case(3, 60, 11), 40, 24),
    (kernel_cases.random_case(4, 60, 37), 8, 56),
]


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The operands that descriptors were made of."""
    found: list[Tensor] = []
    make = descriptors.described

    def counted(
        operand: Tensor, block: tuple[int, ...], dtype: torch.dtype, start: int = 0
    ) -> TensorDescriptor | None:
        made = make(operand, block, dtype, start)
        found.extend([operand] if made is not None else [])
        return made

    for name in ("parts", "product"):
        monkeypatch.setattr(f"moetrain.kernels.grouped.{name}.described", counted)
    return found


def outputs(case: Case, depth: int, hidden: int, name: str, dtype: torch.dtype) -> list[Tensor]:
    """Of the up and down projection and of the input's gradient; not a number where they do not write."""
    token_ids_N, weights_N, counts_E = kernel_cases.assignment(case, torch.device("cpu"))
    meta, weights_R = metadata.lay_out(token_ids_N, weights_N, counts_E, BLOCK, case.num_source)
    columns = hidden * (2 if is_gated(name) else 1)
    g = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    experts, rows = len(case.counts), meta.ids_R.shape[0]
    source, w_up = draw(case.num_source, depth), draw(experts, depth, columns)
    h, dz, w_down = draw(rows, hidden), draw(rows, columns), draw(experts, hidden, depth)
    found = [torch.full((rows, n), torch.nan, dtype=dtype) for n in (columns, hidden, depth, depth)]
    up(source, meta, weights_R, w_up, name, found[0], found[1])
    product(h, meta, w_down, found[2])
    product(dz, meta, w_up.transpose(1, 2), found[3])
    return found


def launched_as(monkeypatch: pytest.MonkeyPatch, persistent: bool, by_descriptors: bool) -> None:
    arch = replace(tiles.INTERPRETER, persistent=persistent, descriptors=by_descriptors)
    monkeypatch.setattr(tiles, "INTERPRETER", arch)


def check(
    case: Case, depth: int, hidden: int, name: str, dtype: torch.dtype, persistent: bool,
    described: list[Tensor], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The form by descriptors, persistent or not, against that by pointers."""
    launched_as(monkeypatch, False, False)
    want = outputs(case, depth, hidden, name, dtype)
    assert not described
    launched_as(monkeypatch, persistent, True)
    got = outputs(case, depth, hidden, name, dtype)
    assert len(described) == 5, "w_up, h and w_down, dz and w_up"
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.nan_to_num(nan=9e4), other.nan_to_num(nan=9e4))


@pytest.mark.parametrize(
    ("persistent", "dtype"), [(False, torch.float16), (True, torch.float32), (True, torch.bfloat16)]
)
@pytest.mark.parametrize(("case", "depth", "hidden"), CASES, ids=str)
def test_every_form_has_the_same_bits(
    case: Case,
    depth: int,
    hidden: int,
    persistent: bool,
    dtype: torch.dtype,
    described: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "relu2" if dtype is torch.float32 else "swiglu"
    check(case, depth, hidden, name, dtype, persistent, described, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(104))
def test_many_shapes(seed: int, described: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(seed)
    width, narrow, choice = (int(torch.randint(1, most, (), generator=g)) for most in (32, 8, 6))
    sides = (8 * width, 8 * narrow)[:: 1 if seed % 2 else -1]
    dtype = torch.float16 if choice < 3 else torch.float32
    name = (GATED + PLAIN)[seed % 8]
    check(kernel_cases.random_case(seed, 60, 7), *sides, name, dtype, choice % 3 > 0, described, monkeypatch)


def test_what_a_persistent_launch_leaves_unwritten() -> None:
    """Behind the last used block, as the device counts them."""
    case = Case((17, 0, 3), 19)
    for found in outputs(case, 24, 40, "swiglu", torch.float32):
        assert not found[: 3 * BLOCK].isnan().any()
        assert found[3 * BLOCK :].isnan().all()


def test_a_persistent_launch_has_a_program_for_each_processor() -> None:
    token_ids_N, weights_N, counts_E = kernel_cases.assignment(Case((40, 40), 41), torch.device("cpu"))
    meta, _ = metadata.lay_out(token_ids_N, weights_N, counts_E, BLOCK, 41)
    launch = parts.row_launch(tiles.INTERPRETER, torch.float32, BLOCK, 40, 24)
    row_tiles = meta.block_expert_B.shape[0]
    assert launch.programs(meta, 40, is_described=True) == tiles.INTERPRETER.processors
    assert launch.programs(meta, 40, is_described=False) == row_tiles * 3


def test_zeros_stand_for_what_lies_outside(described: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert's last rows and columns are followed by its neighbour's, which are no numbers."""
    token_ids_N, weights_N, counts_E = kernel_cases.assignment(Case((5, 3), 7), torch.device("cpu"))
    meta, weights_R = metadata.lay_out(token_ids_N, weights_N, counts_E, BLOCK, 7)
    w_up = torch.randn(2, 24, 80)
    w_up[1] = torch.nan
    z = torch.zeros(meta.ids_R.shape[0], 80)
    up(torch.randn(7, 24), meta, weights_R, w_up, "swiglu", z, None)
    assert len(described) == 1
    assert not z[:5].isnan().any()
    assert z[BLOCK : BLOCK + 3].isnan().all()


REFUSED = {
    "another type": (torch.zeros(2, 24, 40).half(), (1, 16, 16), "it is torch.float16 and computed with in"),
    "a transposed one": (torch.zeros(2, 24, 40).mT, (1, 16, 16), "elements of a row are 40 apart"),
    "a shifted start": (torch.zeros(41)[1:].view(10, 4), (2, 4), "it starts 4 bytes behind a multiple of 16"),
    "no rows": (torch.zeros(0, 8), (16, 16), "a dimension has 0 elements"),
    "too many rows": (torch.zeros(4).expand(2**31, 4), (16, 16), "a dimension has 2147483648 elements"),
    "an odd width": (torch.zeros(2, 24, 39), (1, 16, 16), "a stride has 156 bytes"),
    "rows that are one": (torch.zeros(8).expand(3, 8), (16, 16), "a stride has 0 bytes"),
    "far rows": (torch.zeros(4).as_strided((1, 4), (2**38, 1)), (16, 16), "a stride has 1099511627776 bytes"),
    "a long block": (torch.zeros(600, 16), (512, 16), "a block of (512, 16) has a side above 256"),
    "a narrow block": (torch.zeros(16, 16), (16, 2), "or a row below 16 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_descriptors_do_not_take(name: str) -> None:
    operand, block, words = REFUSED[name]
    assert words in str(descriptors.refusal(operand, block, torch.float32))
    assert descriptors.described(operand, block, torch.float32) is None


def test_up_columns_that_start_between_two_units(described: list[Tensor]) -> None:
    """12 columns are whole units of 16 bytes, and the 6 of the gate are not: only both products have any."""
    words = "blocks start 24 bytes behind others"
    assert words in str(descriptors.refusal(torch.zeros(2, 24, 12), (1, 16, 16), torch.float32, start=6))
    for found in outputs(Case((5, 3), 7), 24, 6, "swiglu", torch.float32):
        assert not found[: 2 * BLOCK].isnan().any()
    assert [tuple(each.shape[-2:]) for each in described] == [(6, 24), (24, 12), (48, 12)]


def test_what_descriptors_take() -> None:
    for shape, block in (((2, 24, 40), (1, 16, 256)), ((1, 4), (16, 4)), ((3, 8, 4), (1, 16, 16))):
        made = descriptors.described(torch.zeros(shape), block, torch.float32)
        assert made is not None
        assert (made.shape, made.block_shape) == (list(shape), list(block))


def test_an_operand_that_is_refused_is_read_by_pointers(described: list[Tensor]) -> None:
    outputs(Case((5, 3), 7), 19, 23, "swiglu", torch.float32)
    assert not described


@pytest.mark.parametrize("arch", tiles.ARCHITECTURES.values(), ids=lambda arch: arch.name)
def test_only_devices_that_have_them_use_descriptors(arch: tiles.Arch) -> None:
    has = arch.name in ("sm_90", "sm_100")
    for dtype in (torch.bfloat16, torch.float16):
        for rows in tiles.BLOCK_M:
            size = tiles.tile(arch, dtype, rows, 768, 2048, 2)
            assert size.descriptors == has
            assert not size.persistent or has
        assert tiles.tile(arch, dtype, 128, 768, 2048, 2).persistent == has
    assert not tiles.tile(arch, torch.float32, 128, 768, 2048, 2).descriptors, "exact fp32 spills with them"


def test_a_persistent_tile_is_one_of_which_no_second_fits() -> None:
    """Four stages of 32 x (128 + n products x 32) elements of tf32 are 80, 96, 112 and 128 KB, of 227."""
    hopper = tiles.ARCHITECTURES["sm_90"]
    found = [
        tiles.tile(hopper, torch.float32, 128, 768, 2048, 4, tf32=True, products=n) for n in (1, 2, 3, None)
    ]
    assert {each.block_n for each in found} == {32}
    assert [each.persistent for each in found] == [False, False, False, True]
    assert not tiles.gradient_tile(hopper, torch.bfloat16, 128, 768, 2048).persistent
