"""The suite looks after itself: no test file is left out without a word."""

from __future__ import annotations

import fnmatch
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_pytest_enters_every_folder_of_tests(pytestconfig):
    """Its own norecursedirs holds ``dist``: tests/dist went uncollected for as long as nobody looked."""
    files = [path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")]
    folders = {folder for file in files for folder in file.parts[:-1]}
    assert {"moe", "dist", "launch", "kernels"} <= folders
    patterns = pytestconfig.getini("norecursedirs")
    assert [f for f in folders if any(fnmatch.fnmatch(f, p) for p in patterns)] == []


def test_no_two_test_files_share_a_name():
    """Without packages a second file of a name is not imported, and the first is taken for it."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_test_file_is_ignored_by_git():
    files = [str(path) for path in TESTS.rglob("*.py")]
    try:
        found = subprocess.run(["git", "check-ignore", *files], cwd=TESTS, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if found.returncode == 128:
        pytest.skip("not a git checkout")
    assert found.stdout == ""
