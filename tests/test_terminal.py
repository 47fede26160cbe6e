"""What reaches the terminal: no control character from outside, any encoding, a full or closed output."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from rich.table import Table

from moetrain import terminal
from moetrain.cli import main
from moetrain.errors import UserError
from moetrain.terminal import as_text, console, one_line, printable

TITLE = "\x1b]0;x\x07"  # sets the title of a terminal
UNSAFE = [
    TITLE,
    "\r",
    "\x08",
    "\x9b31m",
    "\x85",
    "\u202e",
    "\u2066",
    "\u2028",
    "\x7f",
    "\udcff",
    "\U000e0041",
]


def typed(text: str) -> str:
    """As Python hands an argument over where the locale's encoding is ASCII."""
    return text.encode().decode("ascii", "surrogateescape")


@pytest.mark.parametrize("unsafe", UNSAFE, ids=ascii)
def test_what_acts_on_a_terminal_is_replaced(unsafe):
    found = printable(f"a{unsafe}b\n\tc")
    assert not set(unsafe) & set(found) & set(UNSAFE) | {c for c in found if c < " "} - {"\n", "\t"}
    assert found.startswith("a")
    assert found.endswith("b\n\tc")
    assert "\ufffd" in found
    assert one_line(f" a\n{unsafe}\tb ").split()[0] == "a"
    assert "\n" not in one_line(f"a\n{unsafe}b")


@pytest.mark.parametrize("text", ["plain", "läuft 日本 \u3000 \xa0 e\u0301 👩\u200d🔬", "\n\t"])
def test_letters_of_all_scripts_stay(text):
    assert printable(text) == text
    assert printable(text, "ascii").isascii()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (typed("日本"), "日本"), (typed("lä") + "ß", "läß"), ("\udcff", "\ufffd"), ("\ud83d!", "\ufffd!"),
    ],
    ids=ascii,
)  # fmt: skip
def test_arguments_of_another_encoding_are_utf_8(given, text):
    assert as_text(given) == text


def test_tables_know_no_markup_and_hold_no_control_characters(capsys):
    table = Table("file", title=f"[red]{TITLE}")
    table.add_row(f"[/x]{TITLE}:smile:")
    console().print(table)
    out = capsys.readouterr().out
    assert "[/x]" in out
    assert ":smile:" in out
    assert "[red]" in out
    assert "\x1b" not in out
    assert "\x07" not in out


def test_a_traceback_is_printable(capsys):
    terminal.set_up()
    error = ValueError(f"in {TITLE}file")
    sys.excepthook(type(error), error, None)
    err = capsys.readouterr().err
    assert "ValueError: in \ufffd]0;x\ufffdfile" in err


@pytest.fixture
def odd_run(trained, tmp_path) -> Path:
    """A finished run in a folder with a name that sets a terminal's title, and is read as markup."""
    run = tmp_path / f"[x]{TITLE}läuft"
    shutil.copytree(trained, run)
    return run


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_commands_print_odd_names_in_any_encoding(encoding, odd_run, training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "texts" / f"[red]{TITLE}日["
    folder.mkdir(parents=True)
    (folder / "x].txt").write_text("hello world")
    for arguments in (
        ["status", str(odd_run)],
        ["report", str(odd_run)],
        ["generate", f"checkpoint='{odd_run}'", "prompt='é \ufeff日'", "max_new_tokens=3"],
        ["eval", f"checkpoint='{odd_run}'", "data.path=texts", f"json={tmp_path}/figures.json"],
        ["router", "list"],
        ["doctor"],
        ["train", "--help"],
        ["status", str(tmp_path / f"none{TITLE}")],
    ):
        raw = io.BytesIO()
        both = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", both)
        monkeypatch.setattr(sys, "stderr", both)
        code = main(arguments)
        text = raw.getvalue().decode(encoding)
        assert code == (2 if "none" in arguments[-1] else 0), text
        assert text
        assert not {c for c in text if c < " "} - {"\n", "\t"}, ascii(text)
        if arguments[0] == "eval":
            assert "[red]" in text
            assert "[/x].txt" in text.replace("\n", "")
    assert (tmp_path / "figures.json").exists()


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


@FULL
@pytest.mark.parametrize("command", ["--version", "status", "eval"])
def test_a_full_output_ends_in_a_line(command, trained, training, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("hello world")
    json = tmp_path / "figures.json"
    rest = {
        "status": [str(trained)],
        "eval": [f"checkpoint={trained}", f"data.path={tmp_path}/a.txt", f"json={json}"],
    }
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([command, *rest.get(command, [])]) == 1
    err = capsys.readouterr().err
    assert err == "moetrain: error: standard output cannot be written: No space left on device\n"
    assert json.exists() == (command == "eval")


@FULL
def test_a_full_output_ends_no_training(training, corpus, tmp_path, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert tiny.train(corpus, tmp_path / "run", "train.steps=2") == 0
    assert tiny.summary(tmp_path / "run")["finished"]


def test_closed_outputs_are_no_files():
    """A descriptor that is closed would become a checkpoint's, and what is printed would go into it."""
    command = f"exec {sys.executable} -m moetrain status none >&- 2>&- <&-"
    assert subprocess.run(command, shell=True, check=False).returncode == 2


@pytest.mark.real
def test_a_prompt_typed_under_an_ascii_locale(corpus, tmp_path):
    run = tmp_path / "läuft"
    options = ["train.steps=1", "train.sample_prompt=日本"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with tiny.started(corpus, run, *options, **locale) as process:
        assert process.wait() == 0, process.output()
    assert "Traceback" not in process.output()
    (sample,) = (run / "samples").iterdir()
    assert sample.read_text(encoding="utf-8").startswith("日本")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_memory_that_is_not_there_is_one_line(error, monkeypatch, capsys):
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("moetrain.commands.doctor.run", fail)
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("moetrain: error: out of memory: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("path", ["~", "~/none"])
def test_a_home_that_nobody_knows_is_one_line(path, monkeypatch, capsys):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}["none"])
    assert main(["export", f"checkpoint='{path}'", "target=x"]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("separator", ["\n", "\r", "\x1c", "\x85", "\u2028"])
def test_an_error_is_one_line_whatever_it_quotes(separator):
    assert str(UserError(f"a{separator}b")) == "a b"
    assert str(UserError(f"x: {UserError(f'a{separator}{separator}b')}")).split() == ["x:", "a", "b"]
