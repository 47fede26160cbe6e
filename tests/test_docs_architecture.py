"""docs/architecture.md names files and commands that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetrain.cli import COMMANDS

_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
_PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
_SUFFIXES = (".py", ".md", ".toml", ".yaml")


@pytest.fixture(scope="module")
def root(pytestconfig) -> Path:
    return pytestconfig.rootpath


@pytest.fixture(scope="module")
def page(root) -> tuple[str, str]:
    """(the picture of folders, the rest of the page)."""
    before, picture, after = (root / "docs" / "architecture.md").read_text().split("```\n")
    return picture, before + after


def test_every_path_exists(root, page):
    spans = [span for span in _SPAN.findall(page[1]) if _PATH.fullmatch(span)]
    paths = [span for span in spans if "/" in span or span.endswith(_SUFFIXES)]
    assert len(paths) > 50
    assert [p for p in paths if not any((top / p).exists() for top in (root, root / "moetrain"))] == []


def test_every_link_leads_to_a_page(root, page):
    links = _LINK.findall(page[1])
    assert links
    assert [link for link in links if not (root / "docs" / link).is_file()] == []


def test_the_picture_shows_folders_that_exist(root, page):
    entries = list(_entries(root, page[0]))
    assert len(entries) > 100
    assert [str(path.relative_to(root)) for path in entries if not path.exists()] == []


def test_the_picture_shows_every_folder_of_code(root, page):
    shown = set(_entries(root, page[0]))
    folders = {path.parent for path in (root / "moetrain").rglob("*.py") if "remote" not in path.parts}
    assert sorted(str(path.relative_to(root)) for path in folders - shown) == []


def test_every_command_exists(root, page):
    targets = re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), re.MULTILINE)
    known = {"python": lambda word: (root / word).is_file(), "moetrain": COMMANDS.__contains__}
    known["make"] = targets.__contains__
    commands = [span.split() for span in _SPAN.findall(page[1]) if span.split()[0] in known]
    assert {words[0] for words in commands} == set(known)
    assert [words for words in commands if not known[words[0]](words[1])] == []


def _entries(root: Path, picture: str) -> Iterator[Path]:
    """Each line's folder or file, and the files that its text names, which lie in that folder."""
    folders: list[Path] = []
    for line in picture.splitlines():
        name, *words = line.split()
        depth = (len(line) - len(line.lstrip())) // 2
        path = (folders[depth - 1] if depth else root) / name
        folders[depth:] = [path]
        yield path
        yield from (path / word for word in re.findall(r"\b\w+\.py\b", " ".join(words)))
