"""The choice of a CPU's library: by a measurement that is made once, one answer for all processes."""

from __future__ import annotations

import threading

import pytest
import torch

from moetrain.errors import UserError
from moetrain.ops.cpu import libraries
from moetrain.ops.cpu.libraries import MKL, ONEDNN

both = pytest.mark.skipif(
    not (libraries.has_onednn() and torch.backends.mkl.is_available()),
    reason="this build of torch has one library only",
)


@pytest.fixture
def choose(monkeypatch, tmp_path):
    """A choice as in a new process, with ``measured`` in place of the clock; how often it was asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def chosen(measured=None):
        def measure():
            asked.append(measured)
            return measured

        if measured is not None:
            monkeypatch.setattr(libraries, "measured", measure)
        return libraries.faster.__wrapped__(), len(asked)

    return chosen


@both
def test_the_first_measurement_is_kept(choose, monkeypatch, tmp_path):
    monkeypatch.setattr(libraries, "_CPUINFO", tmp_path / "none")  # of a maker who would have oneDNN
    assert choose(ONEDNN) == (ONEDNN, 1)
    assert choose(MKL) == (ONEDNN, 1)
    (file,) = (tmp_path / "moetrain" / "products").iterdir()
    file.write_text("damaged")
    assert choose(MKL) == (MKL, 2)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@both
@pytest.mark.parametrize("fact", ["ONEDNN_MAX_CPU_ISA", "processor", "torch"])
def test_another_machine_or_version_is_measured_anew(choose, monkeypatch, tmp_path, fact):
    assert choose(MKL) == (MKL, 1)
    if fact == "processor":
        (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : another\n")
        monkeypatch.setattr(libraries, "_CPUINFO", tmp_path / "cpuinfo")
    elif fact == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    else:
        monkeypatch.setenv(fact, "AVX2")
    assert choose(ONEDNN) == (ONEDNN, 2)


@both
def test_processes_that_measure_at_once_agree(choose, monkeypatch):
    at_once = threading.Barrier(2)
    answers = iter([MKL, ONEDNN])

    def measure():
        answer = next(answers)
        at_once.wait(10)
        return answer

    monkeypatch.setattr(libraries, "measured", measure)
    found = []
    threads = [threading.Thread(target=lambda: found.append(choose()[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert len(set(found)) == 1


@both
@pytest.mark.parametrize(("maker", "expected"), [("GenuineIntel", MKL), ("AuthenticAMD", ONEDNN)])
def test_where_nothing_can_be_kept_the_maker_decides(choose, monkeypatch, tmp_path, maker, expected):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {maker}\n")
    monkeypatch.setattr(libraries, "_CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "moetrain").write_text("no folder")
    assert choose(MKL if expected == ONEDNN else ONEDNN)[0] == expected

    def no_folder():
        raise UserError("no home folder")

    monkeypatch.setattr(libraries, "cache_root", no_folder)
    assert choose()[0] == expected


@both
def test_the_measurement_itself(monkeypatch):
    assert libraries.measured() in (MKL, ONEDNN)
    for slow, expected in ((torch.mm, ONEDNN), (libraries.by_onednn, MKL)):
        monkeypatch.setattr(
            libraries, "_seconds", lambda product, a, b, slow=slow: 2.0 if product is slow else 1.0
        )
        assert libraries.measured() == expected
    monkeypatch.setattr(libraries, "_seconds", lambda product, a, b: 1.0 if product is torch.mm else 1.01)
    assert libraries.measured() == ONEDNN


def test_one_library_is_no_choice(choose, monkeypatch):
    monkeypatch.setattr(libraries, "has_onednn", lambda: False)
    assert choose(ONEDNN) == (MKL, 0)
    monkeypatch.setattr(libraries, "has_onednn", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert choose(MKL) == (ONEDNN, 0)
