"""What README.md, CONTRIBUTING.md, docs/, the Makefile and pyproject.toml name of the tests exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_PATH = re.compile(r"(?<![\w./-])tests/[\w./*-]*")
_FILE = re.compile(r"(?<![\w./*-])test_\w+\.py")


@pytest.fixture(scope="module")
def root(pytestconfig) -> Path:
    return pytestconfig.rootpath


@pytest.fixture(scope="module")
def pages(root) -> dict[str, str]:
    """The text of each page, by its name."""
    names = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml"]
    found = [*(root / name for name in names), *sorted((root / "docs").glob("*.md"))]
    return {page.name: page.read_text() for page in found}


def test_every_path_below_tests_exists(root, pages):
    named = [(page, path.rstrip(".")) for page, text in pages.items() for path in _PATH.findall(text)]
    assert {page for page, _ in named} >= {"README.md", "CONTRIBUTING.md", "Makefile", "families.md"}
    assert [one for one in named if not any(root.glob(one[1]))] == []


def test_every_test_file_that_is_named_alone_exists(root, pages):
    files = {path.name for path in (root / "tests").rglob("test_*.py")}
    named = [(page, name) for page, text in pages.items() for name in _FILE.findall(text)]
    assert named
    assert [one for one in named if one[1] not in files] == []
