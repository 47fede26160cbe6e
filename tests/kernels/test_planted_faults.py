"""The faults of ``benchmarks/planted_faults.py`` still fit the kernels; the script shows what sees each."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import planted_faults
from planted_faults_list import FAULTS, Fault

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}: {fault.kind}")
def test_a_fault_s_text_stands_once_and_its_check_is_there(fault: Fault) -> None:
    text = (ROOT / "kernels" / fault.file).read_text()
    assert planted_faults.planted(text, fault) != text
    assert fault.check.startswith("static ") or (ROOT / "tests/kernels" / fault.check.split()[0]).is_file()


def test_text_that_is_not_there_once_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels/grouped/up.py: 'x' stands there 2 times, not once"):
        planted_faults.planted("x x", replace(FAULTS[0], old="x"))
