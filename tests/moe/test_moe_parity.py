"""The layer against a Python loop in fp64: outputs, every gradient and the routing itself, over all cases."""

from __future__ import annotations

import importlib

import moe_cases
import pytest
import torch
from moe_cases import CASES, NAMES, Case
from torch import Tensor

from moetrain.moe import Routing


def assert_same_routing(routing: Routing, case: Case, tolerance: float) -> None:
    _, kept = moe_cases.expected(case)
    routing.check()
    pairs = zip(
        routing.assignment.token_ids_N.tolist(), routing.assignment.expert_ids_N().tolist(), strict=True
    )
    assert list(pairs) == [(c.token, c.expert) for c in kept]
    for weight, choice in zip(routing.assignment.weights_N.tolist(), kept, strict=True):
        assert weight == pytest.approx(float(choice.weight.detach()), rel=tolerance, abs=tolerance)


def assert_close(got: dict[str, Tensor], case: Case, tolerance: float) -> None:
    """The largest error against the tensor's own scale (its largest entry)."""
    want, _ = moe_cases.expected(case)
    assert got.keys() == want.keys()
    for name, right in want.items():
        assert got[name].shape == right.shape
        if right.numel():
            error = (got[name].double() - right).abs().max()
            # a gradient that is exactly zero (one weight of 1) has no scale of its own
            scale = right.abs().max().clamp(min=1e-3)
            assert error <= tolerance * scale, f"{name}: error {error:.3g} at scale {scale:.3g}"


def test_the_cases_are_many_and_distinct() -> None:
    assert len(set(NAMES)) == len(CASES) >= 60
    assert len({case.shape for case in CASES}) >= 60


def test_the_cases_hold_what_their_names_say() -> None:
    counts = {}
    for case in CASES:
        _, kept = moe_cases.expected(case)
        experts = [choice.expert for choice in kept]
        counts[case.name] = [experts.count(e) for e in range(case.shape[4])]
    assert counts["all-on-one"] == [0, 21]
    assert counts["all-on-first"] == [14, 0, 0]
    assert counts["all-on-two"] == [0, 22, 0, 0, 22]
    assert sum(counts["empty-experts"]) == 2
    assert counts["padding-everything"] == [0, 0]
    for order in ("position", "probability", "random"):
        assert sum(counts[f"capacity-{order}-0.3"]) < 21  # something is dropped
        assert sum(counts[f"capacity-{order}-50.0"]) == 21  # nothing is
    assert any(0 in c and sum(c) for c in counts.values())
    assert any(len(c) == 1 for c in counts.values())


@pytest.mark.parametrize("backend", ["loop", "cpu", "torch"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.filterwarnings("ignore:experts backend torch")
def test_fp64_equals_the_oracle(case: Case, backend: str) -> None:
    got, routing = moe_cases.actual(case, torch.float64, backend)
    assert_same_routing(routing, case, 1e-12)
    assert_close(got, case, 1e-10)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_fp32_cpu_equals_the_oracle(case: Case) -> None:
    got, routing = moe_cases.actual(case, torch.float32, "cpu")
    assert_same_routing(routing, case, 1e-5)
    assert_close(got, case, 1e-5)


@pytest.mark.parametrize("case", [c.aligned() for c in CASES], ids=NAMES)
def test_fp32_grouped_path_equals_the_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], torch.nn.functional.grouped_mm

    def counted(*args: object, **kwargs: object) -> Tensor:
        calls.append(args)
        return real(*args, **kwargs)

    moe_cases.actual(case, torch.float32, "torch")  # with its self-test
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    got, routing = moe_cases.actual(case, torch.float32, "torch")
    # two products forward and four backward; the grouped product takes no empty operand
    assert len(calls) == (6 if routing.assignment.token_ids_N.numel() else 0)
    assert_same_routing(routing, case, 1e-5)
    assert_close(got, case, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "width", "reason"), [(torch.float64, 8, "float64"), (torch.float32, 7, "multiples of 16 bytes")]
)
def test_the_torch_backend_says_once_that_it_is_not_grouped(
    dtype: torch.dtype,
    width: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(importlib.import_module("moetrain.ops.say_once"), "_said", set())
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")  # so that using it would be an error
    case = Case("per-expert", (2, 3, width, 12, 5))
    for _ in range(2):
        moe_cases.actual(case, dtype, "torch")
    said = [str(w.message) for w in recwarn.list if "experts backend torch" in str(w.message)]
    assert len(said) == 1
    assert reason in said[0]


def test_the_grouped_path_runs_torchs_own_kernel() -> None:
    case = Case("profiled", (2, 3, 20, 28, 5))
    moe_cases.actual(case, torch.float32, "torch")  # with its self-test
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        moe_cases.actual(case, torch.float32, "torch")
    assert sum(event.name == "aten::_grouped_mm" for event in profile.events()) == 6
