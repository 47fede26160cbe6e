"""One kernel compiled ahead of time for a GPU that is not here, and what its binary says.

NVIDIA's registers, local memory and tensor-core instructions are read from the cubin with the ``cuobjdump``
of the Triton package, AMD's from the metadata and the assembly of the code object.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from kernel_addresses import narrow_products, wide_products
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moetrain.kernels.specimen import Specimen
from moetrain.kernels.tiles import Arch

_NVIDIA_PRODUCTS = re.compile(r"\b(UTC[A-Z]*MMA|[HQIO]G?MMA)\b")
_AMD_PRODUCTS = re.compile(r"\b(v_(?:smfmac|mfma|wmma)_\w+)")
_WIDE_PTX = re.compile(r"\b(?:mul|mad)\.(?:wide\.[su]32|lo\.[su]64)\b")
_TMEM = re.compile(r"tcgen05\.alloc.*?,\s*(\d+);")


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has: warps, blocks, 32-bit registers, bytes of shared memory."""

    warps: int
    blocks: int
    registers: int
    shared: int


_KB = 1024
LIMITS = {
    "sm_80": Limits(64, 32, 65536, 164 * _KB),
    "sm_89": Limits(48, 24, 65536, 100 * _KB),
    "sm_90": Limits(64, 32, 65536, 228 * _KB),
    "sm_100": Limits(64, 32, 65536, 228 * _KB),
    "sm_120": Limits(48, 24, 65536, 100 * _KB),
    "gfx942": Limits(32, 32, 4 * 512 * 64, 64 * _KB),  # four SIMDs; vector registers of both kinds
}


@dataclass(frozen=True)
class Built:
    """What was made of a specimen: ``spilled`` is bytes a thread, ``occupancy`` a share of warps.

    ``narrow`` has one line for each 32-bit product that reaches an address, ``wide`` the number of 64-bit
    integer products in the IR, and ``wide_ptx`` that in PTX (0 on AMD, whose assembly has no such word).
    """

    kernel: str
    name: str
    arch: str
    registers: int
    spilled: int
    shared: int
    tensor_cores: dict[str, int]
    occupancy: float
    warps: int
    stages: int
    narrow: list[str]
    wide: int
    wide_ptx: int


def compile_for(specimen: Specimen, arch: Arch) -> Built:
    """Compile, and read the binary. Raises what Triton raises where a kernel does not compile."""
    kernel: Any = specimen.kernel
    signature = {name: specimen.signature.get(name, "constexpr") for name in kernel.arg_names}
    target = GPUTarget(arch.backend, arch.target, arch.warp_size)
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    source = ASTSource(kernel, signature, dict(specimen.constants), _aligned(kernel, specimen.signature))
    made = triton.compile(source, target=target, options=options)
    if arch.backend == "cuda":
        registers, spilled, tensor_cores = _read_cubin(made.asm["cubin"])
        wide_ptx = len(_WIDE_PTX.findall(made.asm["ptx"]))
        tmem = max(map(int, _TMEM.findall(made.asm["ptx"])), default=0)
    else:
        registers, spilled, tensor_cores = _read_amdgcn(made.asm["amdgcn"])
        wide_ptx = tmem = 0
    return Built(
        kernel.__name__, specimen.name, arch.name, registers, spilled, made.metadata.shared, tensor_cores,
        _occupancy(arch, registers, made.metadata.shared, specimen.num_warps, tmem), specimen.num_warps,
        specimen.num_stages, narrow_products(made.asm["ttir"]), wide_products(made.asm["ttir"]), wide_ptx,
    )  # fmt: skip


def _aligned(kernel: Any, signature: Mapping[str, str]) -> dict[tuple[int], list[list[Any]]]:
    """Pointers and integers that are specialized are taken for multiples of 16."""
    changing = {param.name for param in kernel.params if param.do_not_specialize}
    return {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name not in changing and signature.get(name, "").startswith(("*", "i"))
    }


def _read_cubin(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tool, "-res-usage", file.name)
        sass = _run(tool, "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if not found:
        raise ValueError(f"cuobjdump -res-usage named no registers: {usage!r}")
    return int(found[1]), int(found[2]) + int(found[3]), _counted(_NVIDIA_PRODUCTS.findall(sass))


def _read_amdgcn(text: str) -> tuple[int, int, dict[str, int]]:
    """Registers are vector registers of both kinds; scratch and spilled scalars count as spilled."""
    numbers = {
        key: int(re.findall(rf"\.{key}:\s+(\d+)", text)[-1])
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    }
    spilled = 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"])
    spilled = max(spilled, numbers["private_segment_fixed_size"])
    return numbers["vgpr_count"], spilled, _counted(_AMD_PRODUCTS.findall(text))


def _run(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def _counted(words: Iterable[str]) -> dict[str, int]:
    words = list(words)
    return {word: words.count(word) for word in sorted(set(words))}


def _occupancy(arch: Arch, registers: int, shared: int, warps: int, tmem: int) -> float:
    """Warps that a multiprocessor can hold, as a share of its most; a thread gets registers in eights."""
    limits = LIMITS[arch.name]
    held = -(-registers // 8) * 8 * arch.warp_size * warps
    reserved = _KB if arch.backend == "cuda" else 0  # of shared memory, by the driver for each block
    blocks = min(limits.blocks, limits.warps // warps, limits.registers // held)
    blocks = min(blocks, limits.shared // max(1, shared + reserved))
    return min(blocks, 512 // tmem if tmem else blocks) * warps / limits.warps
