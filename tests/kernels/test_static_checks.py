"""The checks of kernels compiled ahead of time: each planted fault is seen in the binary, or in the IR."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import interpreted  # noqa: F401
import kernels_static
import roofline
from kernel_addresses import narrow_products, wide_products

from moetrain.kernels.tiles import ARCHITECTURES, Tile

ROOT = Path(__file__).parents[2]
ROW = {"module": "m", "name": "a", "arch": "sm_80", "products": True, "registers": 100, "spilled": 0}
ROW |= {"shared": 1024, "tensor_cores": {"HMMA": 4}, "narrow": []}


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    """Compiled in one process for the whole file, without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "planted_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    rows: dict[str, Any] = json.loads(done.stdout)
    return {name: row | {"module": "planted", "products": True} for name, row in rows.items()}


def faults(row: dict[str, Any]) -> str:
    return "\n".join(kernels_static.faults(row, ARCHITECTURES[row["arch"]]))


@pytest.mark.parametrize("name", ["right", "right on AMD"])
def test_a_right_kernel_has_no_fault(planted: dict[str, Any], name: str) -> None:
    assert faults(planted[name]) == ""
    assert planted[name]["tensor_cores"]
    assert planted[name]["wide"] >= 3, "rows, expert and depth are multiplied by a stride"
    assert 0 < planted[name]["occupancy"] <= 1


def test_the_products_of_hopper_are_its_own(planted: dict[str, Any]) -> None:
    assert set(planted["right"]["tensor_cores"]) == {"HGMMA"}
    assert planted["right"]["wide_ptx"] > 0


def test_an_index_times_a_stride_in_32_bits_is_seen(planted: dict[str, Any]) -> None:
    assert "x %stride_e in 32 bits" in faults(planted["narrow"])
    assert len(planted["narrow"]["narrow"]) == 2, "of a row, and of an expert"


def test_a_32_bit_product_carried_by_a_loop_is_seen(planted: dict[str, Any]) -> None:
    assert "%depth x %stride_b in 32 bits" in faults(planted["carried"])


def test_missing_tensor_cores_and_spills_are_seen(planted: dict[str, Any]) -> None:
    assert "sm_80 planted no tensor cores: no tensor-core instructions" in faults(planted["no tensor cores"])
    assert "are spilled" in faults(planted["spilled"])


def test_too_much_shared_memory_is_a_fault() -> None:
    assert faults(ROW) == ""
    assert "of shared memory, a block may have 166912" in faults(ROW | {"shared": 166913})
    assert "does not compile: OSError: 7" in faults(ROW | {"error": "OSError: 7"})


@pytest.mark.parametrize(("registers", "regressed"), [(100, False), (118, False), (119, True)])
def test_registers_may_grow_by_a_tenth_and_eight(registers: int, regressed: bool) -> None:
    found = list(kernels_static.regressions([ROW | {"registers": registers}], [ROW]))
    assert bool(found) == regressed
    assert not list(kernels_static.regressions([ROW | {"registers": 255, "name": "new"}], [ROW]))


IR = """
  tt.func public @f(%p: !tt.ptr<f32>, %s: i32, %n: i32) {
    %c64_i32 = arith.constant 64 : i32
    %c768_i32 = arith.constant 768 : i32
    %i = tt.get_program_id x : i32
    BODY
    %a = tt.addptr %p, %x : !tt.ptr<f32>, i32
    tt.return
  }
"""
BODIES = {
    "a block": ("%x = arith.muli %i, %c64_i32 : i32", 0),
    "a width": ("%x = arith.muli %i, %c768_i32 : i32", 1),
    "a shift": ("%x = arith.shli %i, %c64_i32 : i32", 1),
    "no address": ("%y = arith.muli %i, %s : i32\n%x = arith.addi %i, %s : i32", 0),
    "widened late": ("%y = arith.muli %i, %s : i32\n%x = arith.extsi %y : i32 to i64", 1),
    "branch": (
        "%y = arith.muli %i, %s : i32\n%x = scf.if %n -> (i32) {\nscf.yield %i : i32\n} else {\n"
        "scf.yield %y : i32\n}",
        1,
    ),
    "jump": ("%y = arith.muli %i, %s : i32\ncf.br ^bb1(%y : i32)\n^bb1(%x: i32):  // pred: ^bb0", 1),
    "while": (
        "%y = arith.muli %i, %s : i32\n%r:2 = scf.while (%u = %i, %v = %i) : (i32, i32) -> (i32, i32) {\n"
        "scf.condition(%n) %u, %v : i32, i32\n} do {\n^bb0(%w: i32, %z: i32):\n"
        "scf.yield %y, %z : i32, i32\n}\n"
        "%x = arith.addi %r#1, %i : i32",
        1,
    ),
    "loaded": ("%y = arith.muli %i, %s : i32\n%q = tt.splat %y : i32\n%x = tt.load %q : i32", 0),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_product_is_followed_to_an_address(name: str) -> None:
    body, faulty = BODIES[name]
    assert len(narrow_products(IR.replace("BODY", body))) == faulty


def test_64_bit_products_are_counted() -> None:
    assert wide_products(IR.replace("BODY", "%x = arith.muli %s, %n : tensor<64xi64>")) == 1


def test_every_kernel_has_specimens_of_its_own_name() -> None:
    defined = {
        name
        for path in (ROOT / "kernels").rglob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), flags=re.M)
    }
    for arch in ARCHITECTURES.values():
        found = [
            each
            for module in kernels_static.modules()
            for each in kernels_static.specimens(module, arch.name)
        ]
        assert {each.kernel.__name__ for each in found} == defined
        for each in found:
            constants, tensors = set(each.constants), set(each.signature)
            assert constants | tensors == set(each.kernel.arg_names), each.name
            assert not constants & tensors, each.name


def test_modules_are_found_by_their_path() -> None:
    assert kernels_static.modules(["router"]) == ["router.route"]
    assert not [name for name in kernels_static.modules() if "twins" in name]


def test_a_table_has_the_worst_of_each_kernel() -> None:
    row = ROW | {"kernel": "k", "occupancy": 0.5, "flops": 300, "bytes": 100}
    other = row | {"registers": 120, "spilled": 8, "shared": 4096, "flops": 700, "occupancy": 0.25}
    *_, line = kernels_static.summary([row, other, ROW | {"error": "no"}])
    assert line == "| m: k | sm_80 | 2 | 100 to 120 | 8 | 4 | HMMA | 25 to 50 % | 3 to 7 |"


def test_a_bound_is_below_the_peak_and_the_memory() -> None:
    flops, moved = roofline.tile_work(Tile(16, 32, 64, 8, 4, 2), 2, accumulators=2)
    assert (flops, moved) == (2 * 16 * 32 * 64 * 2, (16 + 64) * 64 * 2)
    found = list(roofline.bounds())
    assert {each.arch for each in found} == set(ARCHITECTURES)
    for each in found:
        assert 0 < each.tflops <= roofline.DEVICES[each.arch].tflops * each.padding * each.last_wave * 1.0001
        assert each.tflops <= each.flops / each.memory_ms / 1e9 * 1.0001
