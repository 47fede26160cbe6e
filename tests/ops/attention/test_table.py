"""Which backend takes a call of attention: what fits, what ``auto`` prefers, and what a self-test finds."""

from dataclasses import replace

import pytest
import torch
from attention_cases import CPU, attended, case_of, inputs, seen_of, written_out
from torch import Tensor

from moetrain.ops.attention import (
    BACKENDS,
    Case,
    SeenKeys,
    attend,
    plan_attention,
    refusal,
    seen_keys,
    table,
    varlen,
)
from moetrain.ops.attention import self_test as self_test_module
from moetrain.ops.attention.case import Plan

CUDA = torch.device("cuda", 0)
MASKED = SeenKeys(4096, window=100)
DOCUMENTS = SeenKeys(9, 0, None, torch.zeros(2, 9))


@pytest.fixture(autouse=True)
def _untested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_tested", {})


def case(
    seen: SeenKeys | None,
    seq: int,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    cached: int = 0,
) -> Case:
    return Case(seen, 2, seq, cached, (6, 2), 16, dtype, device)


@pytest.fixture(autouse=True)
def varlen_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of torch without it choose among what is left."""
    monkeypatch.setattr(varlen, "_function", lambda: attend)


def chosen(monkeypatch: pytest.MonkeyPatch, case: Case, broken: tuple[str, ...] = ()) -> str:
    """``auto``'s choice, if the self-tests say that only ``broken`` fail."""
    monkeypatch.setattr(table, "_self_test", lambda name, case: "broken" if name in broken else None)
    return table._chosen(case)


@pytest.mark.parametrize(
    ("seen", "seq", "dtype", "backend"),
    [
        (None, 8192, torch.float32, "sdpa"),
        (None, 600, torch.float32, "blocks"),
        (None, 2, torch.bfloat16, "blocks"),
        (None, 8192, torch.bfloat16, "blocks"),
        (None, 383, torch.float32, "sdpa"),
        (MASKED, 383, torch.float32, "sdpa"),
        (MASKED, 384, torch.float32, "blocks"),
        (MASKED, 383, torch.bfloat16, "blocks"),
        (MASKED, 8192, torch.float64, "blocks"),
    ],
)
def test_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, seen: SeenKeys | None, seq: int, dtype: torch.dtype, backend: str
) -> None:
    assert chosen(monkeypatch, case(seen, seq, CPU, dtype)) == backend


def test_bf16_on_a_cpu_with_a_cache_is_as_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for seq, backend in ((1, "sdpa"), (383, "sdpa"), (384, "blocks")):
        assert chosen(monkeypatch, case(MASKED, seq, CPU, torch.bfloat16, cached=11)) == backend


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = torch.bfloat16
    assert chosen(monkeypatch, case(None, 4096, CUDA, bf16)) == "sdpa"
    assert chosen(monkeypatch, case(MASKED, 4096, CUDA, bf16)) == "flex"
    assert chosen(monkeypatch, case(MASKED, 4096, CUDA)) == "flex"
    assert chosen(monkeypatch, case(MASKED, 4096, CUDA, torch.float64)) == "sdpa"
    assert chosen(monkeypatch, case(MASKED, 4096, CUDA, bf16, cached=7)) == "sdpa"
    assert chosen(monkeypatch, case(MASKED, 4096, torch.device("meta"), bf16)) == "sdpa"
    with pytest.warns(UserWarning, match="attention backend flex: broken; another one is taken"):
        assert chosen(monkeypatch, case(MASKED, 4096, CUDA, bf16), broken=("flex",)) == "varlen"
    assert chosen(monkeypatch, case(MASKED, 4096, CUDA), broken=("flex",)) == "sdpa"


@pytest.mark.parametrize(
    ("backend", "case", "words"),
    [
        ("blocks", case(MASKED, 4096, CUDA), "kernels are those of a CPU, not of cuda"),
        ("flex", case(MASKED, 4096), "on a cpu device .* no backward kernel"),
        ("flex", case(MASKED, 4096, CUDA, torch.float64), "no kernel for float64"),
        ("flex", case(MASKED, 4096, CUDA, cached=3), "no cached keys"),
        ("varlen", case(MASKED, 4096), "its kernel is CUDA's, and the device is cpu"),
        ("varlen", case(MASKED, 4096, CUDA), "bf16 or fp16, not float32"),
        (
            "varlen",
            case(DOCUMENTS, 9, CUDA, torch.bfloat16),
            "number of documents",
        ),
        (
            "none",
            case(None, 4096),
            "unknown attention backend 'none'; known: auto, sdpa, blocks, flex, varlen",
        ),
    ],
)
def test_what_does_not_fit_is_refused(backend: str, case: Case, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_attention(backend, case)


class Wrong:
    """Attention that does not see the query's own token."""

    def refusal(self, case: Case) -> None:
        return None

    worthwhile = refusal

    def prepare(self, case: Case) -> Plan:
        return Plan("wrong", case.seen)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, sinks: Tensor | None) -> Tensor:
        return self_test_module.written_out(q, k.roll(1, 2), v.roll(1, 2), plan.seen)


def test_a_self_test_finds_a_wrong_backend_and_auto_another(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Wrong()
    monkeypatch.setattr(wrong, "worthwhile", lambda case: True, raising=False)
    monkeypatch.setitem(BACKENDS, "blocks", wrong)
    tensors, seen = inputs(521, 2), seen_of("documents", 521)
    with pytest.warns(UserWarning, match="attention backend blocks: its output is off by"):
        found = attended(tensors, seen)
    torch.testing.assert_close(found, written_out(tensors, seen), rtol=1e-12, atol=1e-12)
    assert "is off by" in str(refusal("blocks", case_of(tensors, seen)))


def test_a_self_test_reports_what_is_raised_and_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def attend(*args: object) -> Tensor:
        calls.append(args)
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(BACKENDS["blocks"], "attend", attend)
    for _ in range(2):
        reason = refusal("blocks", case(MASKED, 4096))
        assert reason == "its self-test failed: RuntimeError: no compiler"
    assert len(calls) == 1


def test_a_self_test_is_free_of_what_holds_around_it() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert refusal("blocks", case(MASKED, 4096)) is None


def test_ids_on_an_accelerator_are_not_looked_at() -> None:
    ids_BS = torch.zeros(2, 9, dtype=torch.int64, device="meta")  # a look would raise
    seen = seen_keys(9, 0, None, ids_BS)
    assert seen is not None
    assert seen.doc_ids_BS is ids_BS
    assert seen.blocks(4) == [(0, 4, 0), (4, 8, 0), (8, 9, 0)]
    assert seen_keys(9, 0, None, ids_BS, documents=1) is None
    assert replace(seen, window=3).blocks(4) == [(0, 4, 0), (4, 8, 2), (8, 9, 6)]
