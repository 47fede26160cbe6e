"""The conversations that are made of Python's own library."""

import json
import sys
import textwrap

import pytest

from moetrain.cli import main
from moetrain.data.chat.messages import check_order, conversation
from moetrain.data.python_questions import questions
from moetrain.data.sources.stdlib import StdlibSource


@pytest.fixture
def _few_files(monkeypatch):
    source = StdlibSource()
    chosen = ("textwrap.py", "json/__init__.py", "_weakrefset.py", "idlelib/run.py")
    few = [file for file in source.files if str(file.relative_to(source.root)) in chosen]
    assert len(few) == len(chosen)
    monkeypatch.setattr(StdlibSource, "files", few)


@pytest.mark.usefixtures("_few_files")
def test_rows_are_turns_about_what_is_public():
    before = set(sys.modules)
    rows = list(questions())
    assert rows == list(questions())
    assert len({row["messages"][1]["content"] for row in rows}) == len(rows)
    for row in rows:
        check_order(conversation(row["messages"], None).roles)
    (dedent,) = (row["messages"] for row in rows if "textwrap.dedent" in row["messages"][0]["content"])
    assert dedent[1]["content"] == " ".join(textwrap.dedent.__doc__.split("\n\n")[0].split())
    assert dedent[3]["content"] == "It is called as `textwrap.dedent(text)`."
    asked = " ".join(row["messages"][0]["content"] for row in rows)
    assert "json.loads" in asked
    assert "_weakrefset" not in asked
    assert "idlelib" not in asked
    assert len(rows) > 40  # most of them about the language
    assert "idlelib.run" not in set(sys.modules) - before


@pytest.mark.usefixtures("_few_files")
def test_the_command_writes_what_data_chat_reads(tmp_path, capsys):
    file = tmp_path / "py.jsonl"
    assert main(["data", "write", "python_questions", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == list(questions())
    assert f"wrote {len(rows)} conversations to {file}" in capsys.readouterr().out
    assert main(["data", "write", "python_questions", str(tmp_path / "no" / "such" / "file")]) == 2
    assert main(["data", "write", "other", "x"]) == 2
    assert "there is only moetrain data fetch domains" in capsys.readouterr().err
