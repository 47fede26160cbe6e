"""The ladder of experts' backends: who computes, what is said, and what the self-test finds."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moetrain.moe.dispatch.plan import layout
from moetrain.moe.options import Backend
from moetrain.ops.activations import ACTIVATIONS
from moetrain.ops.cpu import per_expert
from moetrain.ops.experts import grouped, passed, table
from moetrain.ops.experts.case import TILE, Case
from moetrain.ops.experts.operands import Operands
from moetrain.ops.experts.rows import Segments
from moetrain.ops.experts.self_test import failure

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def case(dtype: torch.dtype = torch.float32, activation: str = "swiglu", d_model: int = 40) -> Case:
    return Case(CPU, dtype, d_model, 24, activation)


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was tested, and nothing was said."""
    monkeypatch.setattr(table, "_tested", {})
    monkeypatch.setattr(importlib.import_module("moetrain.ops.say_once"), "_said", set())


class Faulty:
    """A backend with one fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    refusal, kept_rows = staticmethod(per_expert.refusal), staticmethod(per_expert.kept_rows)
    ON_DEVICE, WIDTH_UNIT = False, TILE

    def forward(self, operands: Operands, keep: bool) -> tuple[Tensor, list[Tensor]]:
        ids, up = operands.ids_R, operands.w_up_EDP
        if self.fault == "a row of another token":
            ids = torch.where(ids == ids[2], ids[3], ids)
        if self.fault == "an expert is skipped":
            up = up.clone()
            up[-2] = 0
        out, kept = per_expert.forward(replace(operands, ids_R=ids, w_up_EDP=up), keep)
        if self.fault == "no padding mask":
            out[ids < 0] = 1
        if self.fault == "it raises":
            raise RuntimeError("no kernel image\nfor this device")
        return out, kept

    def backward(self, dout: Tensor, operands: Operands, kept: Sequence[Tensor] | None) -> Sequence[Tensor]:
        dx, dweights, dup, ddown = per_expert.backward(dout, operands, kept)
        if self.fault == "the weight's gradient is missing":
            dweights.zero_()
        if self.fault == "garbage where an expert has no rows":
            ddown[1] = 1
        if self.fault == "not a number":
            dup[0, 0, 0] = float("nan")
        return dx, dweights, dup, ddown


FAULTS = {
    "a row of another token": "output is off",
    "an expert is skipped": "output is off",
    "no padding mask": "output is off",
    "it raises": "self-test failed: RuntimeError: no kernel image",
    "the weight's gradient is missing": "gradient of the routing weights is off by 1",
    "garbage where an expert has no rows": "w_down gradient is off",
    "not a number": "w_up gradient is off by nan",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, dtype: torch.dtype) -> None:
    found = failure(Faulty(fault), case(dtype))  # type: ignore[arg-type]
    assert FAULTS[fault] in (found or "nothing")
    assert "\n" not in (found or "nothing")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_backends_pass(dtype: torch.dtype, activation: str) -> None:
    for width in (40, 41):
        assert failure(per_expert, case(dtype, activation, width)) is None
    if dtype is not torch.float64:
        assert failure(grouped, case(dtype, activation)) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biases_and_products_are_tested_too(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    both = replace(case(dtype), bias=True, added=True)
    for asked in (replace(both, bias=False), both):
        assert failure(per_expert, asked) is None
        assert dtype is torch.float64 or failure(grouped, asked) is None
    monkeypatch.setattr(per_expert, "add_backward", lambda *arguments: None)
    assert "is off" in (failure(per_expert, both) or "nothing")
    monkeypatch.undo()
    monkeypatch.setattr("moetrain.ops.experts.pairs.fill_gradients", lambda *arguments: None)
    assert "gradient of the up product's a is off" in (failure(per_expert, both) or "nothing")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_takes_its_own_and_says_nothing(dtype: torch.dtype, recwarn: pytest.WarningsRecorder) -> None:
    assert table.choose("auto", case(dtype)) == "cpu"
    assert not recwarn.list


def test_a_rung_that_is_wrong_is_passed_over_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.BACKENDS, "cpu", Faulty("an expert is skipped"))  # type: ignore[arg-type]
    line = r"^experts backend auto: cpu: its output is off by \S+ of the largest .*; taking loop$"
    with pytest.warns(UserWarning, match=line) as said:
        assert [table.choose("auto", case()) for _ in range(3)] == ["loop"] * 3
    assert len(said) == 1


def test_a_name_begins_at_its_own_rung() -> None:
    assert table.choose("torch", case()) == "torch"
    assert table.choose("loop", case()) == "loop"
    with pytest.warns(
        UserWarning, match="experts backend torch: torch's grouped_mm does not take .*; taking cpu"
    ):
        assert table.choose("torch", case(torch.float64)) == "cpu"


def test_a_self_test_runs_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[ModuleType, Case]] = []
    monkeypatch.setattr(table, "failure", lambda *arguments: calls.append(arguments))
    for width in (40, 56, 4104):  # alike to tiles of 16
        table.choose("auto", case(d_model=width))
    assert len(calls) == 1
    table.choose("auto", case(d_model=41))
    table.choose("auto", case(torch.bfloat16))
    assert len(calls) == 3


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Case]:
    """A GPU that is not there, and the cases that were tested on it."""
    tested: list[Case] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(passed, "_device", lambda device: None if device.type == "cpu" else "a GPU 9.0")
    monkeypatch.setattr(table, "failure", lambda backend, case: tested.append(case))
    return tested


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process."""
    monkeypatch.setattr(table, "_tested", {})


GPU_CASE = Case(torch.device("cuda"), torch.bfloat16, 64, 64, "swiglu")


def test_a_gpu_that_has_passed_is_not_tested_again(gpu: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    for number, changed in enumerate((None, "_packages", "_sources", "_device"), 1):
        if changed is not None:
            monkeypatch.setattr(passed, changed, lambda *_: "another")
        for _ in range(2):
            later(monkeypatch)
            assert table.choose("torch", GPU_CASE) == "torch"
        assert len(gpu) == number, changed


def test_a_failure_is_tested_again(monkeypatch: pytest.MonkeyPatch, gpu: list[Case], tmp_path: Path) -> None:
    tested = []
    monkeypatch.setattr(table, "failure", lambda backend, case: tested.append(case) or "its output is off")
    for _ in range(2):
        later(monkeypatch)
        assert table.choose("torch", GPU_CASE) == "loop"
    assert len(tested) == 4  # torch and cpu, in two processes
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_used(
    gpu: list[Case], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for tests in (1, 2):
        later(monkeypatch)
        assert table.choose("torch", GPU_CASE) == "torch"
        assert len(gpu) == tests


def test_other_devices_have_a_ladder_too() -> None:
    assert table.ladder(torch.device("cuda")) == ("triton", "torch", "cpu", "loop")
    assert table.ladder(CPU) == ("cpu", "loop")


def test_a_pretended_device_is_not_tested() -> None:
    pretended = Case(torch.device("lazy"), torch.bfloat16, 64, 64, "swiglu")
    assert table.choose("auto", pretended) == "torch"


def test_rows_by_bound_are_those_by_counts() -> None:
    """Nothing waits for counts where they are not needed; what is behind the last segment is padding."""
    counts, block = [5, 0, 8, 1], 4
    sources = torch.cat([torch.arange(c) for c in counts])
    known, slots = layout(sources, torch.tensor(counts), counts, 9, block)
    bound, same_slots = layout(sources, torch.tensor(counts), None, 9, block)
    used = len(known.ids_R)
    assert len(bound.ids_R) == bound.segments.bound(14) == (2 + 4) * block
    assert torch.equal(bound.ids_R[:used], known.ids_R)
    assert (bound.ids_R[used:] == -1).all()
    for ours, theirs in (
        (slots, same_slots),
        (bound.by_source_N, known.by_source_N),
        (bound.ends_X, known.ends_X),
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("experts", [1, 3, 4])
@pytest.mark.parametrize("block", [1, 2, 5])
def test_the_bound_is_the_most_that_any_counts_need(experts: int, block: int) -> None:
    for assignments in range(12):
        counts = (c for c in product(range(assignments + 1), repeat=experts) if sum(c) == assignments)
        most = max(sum(Segments(torch.tensor(c), block, c).aligned) for c in counts)
        assert Segments(torch.zeros(experts), block, None).bound(assignments) == most


def test_the_options_are_the_table() -> None:
    assert {backend.name for backend in Backend} == set(table.NAMES)
