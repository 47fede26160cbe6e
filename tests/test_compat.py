"""Which versions of torch are taken."""

from __future__ import annotations

import pytest
import torch

from moetrain import compat
from moetrain.cli import main
from moetrain.errors import UserError


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.11.0a0+git1234", "2.13.0+cpu", "2.100.1", "3.0.0", torch.__version__]
)
def test_versions_from_the_oldest_on_are_taken(version):
    compat.check_torch(version)


@pytest.mark.parametrize("version", ["1.13.1", "2.2.0", "2.10.0", "2.10.1+cu126"])
def test_an_older_version_is_refused_in_one_line(version):
    with pytest.raises(UserError) as raised:
        compat.check_torch(version)
    told = str(raised.value)
    assert told == f"torch {version} is too old: moetrain needs 2.11 or newer: pip install 'torch>=2.11'"


def test_the_oldest_version_is_that_of_the_requirement(request):
    """pip goes by pyproject.toml, and everything else by the module."""
    requirements = (request.config.rootpath / "pyproject.toml").read_text()
    assert f'"torch>={".".join(map(str, compat.OLDEST))}"' in requirements


def test_doctor_refuses_an_old_version(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err.strip().endswith("pip install 'torch>=2.11'")
