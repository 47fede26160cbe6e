"""Bounded, checked reading of small files: a schema's values, or one line that names file and place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from moetrain.errors import UserError
from moetrain.files import parse_json, parse_yaml, read_bytes, read_json


@dataclass(frozen=True)
class Record:
    size: Annotated[int, Field(ge=0, lt=2**63)]
    names: tuple[str, ...] = ()


def test_a_file_that_fits_becomes_its_schema(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"size": 3, "names": ["x"]}')
    assert read_json(tmp_path / "a.json", Record, 100) == Record(3, ("x",))
    assert parse_yaml("a: 1\nb: [x, 2.5, null]\n", "here") == {"a": 1, "b": ["x", 2.5, None]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"size": "3"}', "here: size: .*integer.*found '3'"),
        ('{"size": true}', "here: size: .*integer"),
        ('{"size": -1}', "here: size: .*found -1"),
        ('{"size": 1' + "0" * 30 + "}", "here: size: .*less than"),
        ('{"size": 1' + "0" * 9000 + "}", "here: Invalid JSON"),
        ('{"names": []}', "here: size: .*required"),
        ('{"size": 1, "names": ["a", 7]}', "here: names.1: .*string"),
        ("[" * 100_000, "here: Invalid JSON: recursion limit"),
        ("\0\0", "here: Invalid JSON"),
        ("[]", "here: "),
    ],
    ids=lambda value: value[:24],
)
def test_json_that_does_not_fit_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse_json(text, Record, "here")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [1]\nb: *a", r"line 2 has an alias \(\*a\)"),
        ("[" * 60, "line 1 is nested deeper than 50 levels"),
        ("[" * 100_000, "maximum nesting depth|nested deeper than 50 levels"),  # libyaml's own bound, or ours
        (f"a: [{'0,' * 20_000}]", "line 1: it holds more than 20000 values"),
        ("a: !!timestamp x", "no valid YAML"),
        ("a: !!python/object/apply:os.getpid []", "no valid YAML"),
        ("a: 2026-99-99", "no valid YAML"),
        ("a: [", "no valid YAML"),
        ("a: \0", "no valid YAML"),
    ],
    ids=lambda value: value[:24],
)
def test_yaml_that_cannot_be_read_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse_yaml(text, "here")
    assert "\n" not in str(caught.value)


def test_yaml_bytes_that_are_no_utf8_are_refused() -> None:
    with pytest.raises(UserError, match="no valid YAML"):
        parse_yaml(b"a: \xff", "here")


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 101)
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    refused: dict[Any, str] = {
        tmp_path / "pipe": "not a regular file",
        tmp_path: "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path / "large": "101 bytes, .* 100 at the most",
        tmp_path / "broken": "No such file",
        tmp_path / ("x" * 5000): "too long",
        Path("nul\0"): "null byte",
    }
    for path, said in refused.items():
        with pytest.raises(UserError, match=said):
            read_bytes(path, 100)
    assert read_bytes(tmp_path / "large", 101) == b"x" * 101
