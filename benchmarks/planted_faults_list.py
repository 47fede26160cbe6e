"""The faults that ``planted_faults.py`` plants: what each replaces, and the check that must see it."""

from __future__ import annotations

from dataclasses import dataclass

NARROW, MASK = "a product in 32 bits", "a mask left out"
ROW, EXPERT = "rows out of order", "an expert skipped"


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in the kernel's file, or in ``kernels/elsewhere``.

    ``check`` is a file of ``tests/kernels`` and words for pytest's ``-k``, or ``static MODULE N``: compile
    one in N of the module's specimens, and read the addresses.
    """

    kernel: str
    kind: str
    old: str
    new: str
    check: str
    elsewhere: str = ""

    @property
    def file(self) -> str:
        """The path of the changed file in ``kernels/``."""
        return self.elsewhere or self.kernel.replace(".", "/") + ".py"


_GROUPED = "test_kernel_grouped.py test_forward_and_gradients and X37 and not fp16"
_OFFSETS = "test_kernel_offsets.py"
_FORMS = "test_descriptors.py same_bits and X37 and dtype1"
_COMBINE = "test_kernel_combine.py test_sums_have"
_METADATA = "test_kernel_metadata.py twin_s and X37"
_PRODUCTS = "test_block_sparse_products.py test_products_of_experts"
_BESIDE = "test_block_sparse_products.py beside"
_FAR = "test_block_sparse_addresses.py"
_MASKED = "test_block_sparse_masked.py equals_zeros and 17"
_ROUTER = "test_router.py equals_its_twin"
_ROWS = "row = row_tile.to(tl.int64) * BLOCK_M", "row = row_tile * BLOCK_M"
_TOKENS = "row_T = tl.program_id(0).to(tl.int64) * BLOCK_T", "row_T = tl.program_id(0) * BLOCK_T"
_PARTS = "grouped/parts.py"

_UP = [
    (NARROW, *_ROWS, f"{_OFFSETS} up_projection-z"),
    (MASK, "mask=(token >= 0)[:, None] & open_k[None, :]", "mask=(token >= 0)[:, None]", _GROUPED),
    (ROW, "token = tl.load(ids + row)", "token = tl.load(ids + (row ^ 1))", _GROUPED),
    (EXPERT, "deep, wide = depth, hidden", "deep, wide = used(expert - 1, depth), hidden", _GROUPED),
    ("a persistent tile skipped", "at += tl.num_programs(0)", "at += tl.num_programs(0) + 1", _FORMS),
]
_PRODUCT = [
    (NARROW, *_ROWS, f"{_OFFSETS} down_projection-out"),
    (MASK, "left_mask[:, None] & open_k[None, :]", "left_mask[:, None]", _GROUPED, _PARTS),
    (ROW, "row_product(rows, row, row >= 0,", "row_product(rows, row ^ 1, row >= 0,", _GROUPED),
    (EXPERT, "column, width, used(expert, depth)", "column, width, used(expert - 1, depth)", _GROUPED),
    ("a persistent tile skipped", "at += tl.num_programs(0)", "at += tl.num_programs(0) + 1", _FORMS),
    ("another expert's descriptor", "[expert.to(tl.int32), first, column]", "[0, first, column]", _FORMS,
     _PARTS),
]  # fmt: skip
_HIDDEN_GRADIENT = [
    (NARROW, *_ROWS, f"{_OFFSETS} gradient_of_hidden-dz"),
    (MASK, "inside = (column < hidden)[None, :]", "inside = (column >= 0)[None, :]", _GROUPED),
    (ROW, "dout_row = token", "dout_row = token ^ 1", _GROUPED),
    (EXPERT, "if expert < 0:", "if expert < 1:", _GROUPED),
]
_WEIGHT_GRADIENT = [
    (NARROW, "row = first * BLOCK +", "row = (first * BLOCK).to(tl.int32) +",
     f"{_OFFSETS} gradient_of_weights-dz"),
    (MASK, "(k < depth)[:, None] & (token >= 0)[None, :]", "(k < depth)[:, None]", _GROUPED),
    (ROW, "left_row = token", "left_row = token ^ 1", _GROUPED),
    (EXPERT, "blocks = tl.load(block_starts + expert + 1) - start",
     "blocks = (tl.load(block_starts + expert + 1) - start) * tl.minimum(expert, 1)", _GROUPED),
]  # fmt: skip
_COMBINED = [
    (NARROW, "source_row = tl.program_id(0).to(tl.int64)", "source_row = tl.program_id(0)",
     "static combine 3"),
    (MASK, "sums.to(out.dtype.element_ty), mask=column < width)", "sums.to(out.dtype.element_ty))",
     "test_kernel_combine.py beside"),
    (ROW, "by_source + start + i", "by_source + start + count - 1 - i", _COMBINE),
    ("an assignment skipped", "range(count.to(tl.int32))", "range(1, count.to(tl.int32))", _COMBINE),
]  # fmt: skip
_SORTING = [
    (NARROW, "(first + tl.arange(0, ROWS)).to(tl.int64)", "first + tl.arange(0, ROWS)", "static sorting 1"),
    (ROW, "(other_at[None, :] < at[:, None])", "(other_at[None, :] > at[:, None])", _METADATA),
]
_LAID_OUT = [
    (MASK, "tl.load(token_ids + at, mask=inside, other=-1)", "tl.load(token_ids + tl.where(inside, at, 0))",
     _METADATA),
    (EXPERT, "other=0) <= block", "other=0) < block", _METADATA),
]  # fmt: skip
_SDD = [
    (NARROW, "at_m = row * BLOCK_M + in_m", "at_m = (row * BLOCK_M + in_m).to(tl.int32)",
     f"{_FAR} test_sdd_far_apart and rows"),
    (MASK, "here_a = k[None, :] < depth", "here_a = k[None, :] >= 0", _BESIDE),
    (ROW, "a += at_m[:, None] * a_m", "a += (row * BLOCK_M + BLOCK_M - 1 - in_m)[:, None] * a_m",
     f"{_PRODUCTS} and sdd"),
    (EXPERT, "if column < 0:", "if column < column_per:", f"{_PRODUCTS} and sdd"),
]  # fmt: skip
_DSD = [
    (NARROW, "at_k = inner % inner_per * BLOCK_INNER + k",
     "at_k = (inner % inner_per * BLOCK_INNER + k).to(tl.int32)"),
    (MASK, "tile_b = tl.load(there, mask=inside_b, other=0.0)", "tile_b = tl.load(there)"),
    (ROW, "inner = tl.load(across + step // STEPS)",
     "inner = tl.load(across + (first + last - 1 - step) // STEPS)"),
    ("a block skipped", "for step in range(first, last):", "for step in range(first + STEPS, last):"),
]  # fmt: skip
_DSD_CHECKS = [f"{_FAR} test_dsd_far_apart and dense", _BESIDE, *2 * [f"{_PRODUCTS} and dsd"]]
_DDS_CHECKS = ["static block_sparse.dsd 8", _BESIDE, *2 * [f"{_PRODUCTS} and dds"]]
_BLOCK_MASKED = [
    (NARROW, "m = down.to(tl.int64) * TILE_M", "m = down * TILE_M", f"{_FAR} masked and rows"),
    (MASK, "mask=k[None, :] < depth", "mask=k[None, :] >= 0", _MASKED),
    (ROW, "+ m[None, :] * a_m", "+ (m ^ 1)[None, :] * a_m", _MASKED),
    (EXPERT, "tl.where(expert < 0, first,", "tl.where(expert < 1, first,", _MASKED),
]
_KEYS = "tl.where(real_1E, keys(selection_TE), LEAST_KEY)"
_FORWARD = [
    (NARROW, *_TOKENS, "static router 2"),
    (MASK, _KEYS, "keys(selection_TE) + 0", "test_router.py column_without"),
    (ROW, "place_K[None, :] == place, at_T", "place_K[None, :] == TOP_K - 1 - place, at_T",
     f"{_ROUTER} and T37"),
    (EXPERT, _KEYS, _KEYS.replace("real_1E", "real_1E & (column_E > 0)[None, :]"), f"{_ROUTER} and T37"),
]  # fmt: skip
_BACKWARD = [
    (NARROW, *_TOKENS, "static router 1"),
    (MASK, "else softmax(logits_TE, real_1E)", "else softmax(logits_TE, column_E[None, :] >= 0)",
     f"{_ROUTER} and T11"),
    (ROW, "_at(dchosen_TK, place_K, place)", "_at(dchosen_TK, place_K, TOP_K - 1 - place)",
     f"{_ROUTER} and T37"),
    (EXPERT, "tl.store(dlogits + at_TE, dlogits_TE,",
     "tl.store(dlogits + at_TE, tl.where((column_E > 0)[None, :], dlogits_TE, 0.0),", f"{_ROUTER} and T37"),
]  # fmt: skip
_BY_KERNEL: dict[str, list[tuple[str, ...]]] = {
    "grouped.up": [*_UP],
    "grouped.product": [*_PRODUCT],
    "grouped.hidden_gradient": [*_HIDDEN_GRADIENT],
    "grouped.weight_gradient": [*_WEIGHT_GRADIENT],
    "combine": [*_COMBINED],
    "sorting": [*_SORTING],
    "metadata": [*_LAID_OUT],
    "block_sparse.sdd": [*_SDD],
    "block_sparse.dsd": [(*fault, check) for fault, check in zip(_DSD, _DSD_CHECKS, strict=True)],
    "block_sparse.dds": [
        (*fault, check, "block_sparse/dsd.py") for fault, check in zip(_DSD, _DDS_CHECKS, strict=True)
    ],
    "block_sparse.masked": [*_BLOCK_MASKED],
    "router.forward": [*_FORWARD],
    "router.backward": [*_BACKWARD],
}
FAULTS = [Fault(kernel, *fault) for kernel, faults in _BY_KERNEL.items() for fault in faults]
