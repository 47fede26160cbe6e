"""The suite looks after itself: no test file is left out without a word, and names and files stay short."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LONGEST_NAME, LONGEST_FILE = 60, 300  # characters, lines
_IMPORT = re.compile(r"^\s*(?:from|import) (?:\w+\.)*test_\w+", re.MULTILINE)
_TEST = re.compile(r"^\s*(?:async )?def (test_\w+)", re.MULTILINE)


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


def test_no_test_file_imports_another():
    """What two of them share lies in tests/helpers."""
    files = list(TESTS.rglob("*.py"))
    assert len(files) > 100
    found = [(path.name, line) for path in files for line in _IMPORT.findall(path.read_text())]
    assert found == []


def test_names_of_tests_are_short():
    names = [name for path in TESTS.rglob("test_*.py") for name in _TEST.findall(path.read_text())]
    assert len(names) > 1000
    assert [name for name in names if len(name) > LONGEST_NAME] == []


@pytest.mark.parametrize("folder", ["moetrain", "tests"])
def test_files_are_short(folder, pytestconfig):
    files = list((pytestconfig.rootpath / folder).rglob("*.py"))
    assert len(files) > 200
    lines = {path: len(path.read_text().splitlines()) for path in files}
    assert [(str(path), number) for path, number in lines.items() if number > LONGEST_FILE] == []
