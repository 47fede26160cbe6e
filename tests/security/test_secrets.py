"""Secrets of the environment and of the command line: not printed, not saved, not sent."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import tiny

from moetrain.config.hydra.compose import compose_train
from moetrain.errors import UserError
from moetrain.redaction import redacted, secret_names
from moetrain.terminal import LineFormatter, one_line

SECRET = "hunter2-and-more"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_MODE", "offline-mode")


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "db_password",
        "TOKEN",
        "GITHUB_TOKEN_2",
        "MY_SECRET",
    ],
)
def test_variables_that_are_secret_by_name(name, monkeypatch):
    monkeypatch.setenv(name, "value-of-the-variable")
    assert secret_names("x value-of-the-variable y") == [name]
    assert redacted("x value-of-the-variable y") == "x *** y"


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "HOME", "KEYBOARD", "SECRETARY", "SSH_AUTH_SOCK"]
)
def test_variables_that_are_none(name, monkeypatch):
    monkeypatch.setenv(name, "value-of-the-variable")
    assert secret_names("value-of-the-variable") == []


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("https://me:pass@host/x", "https://***@host/x"),
        ("+api_key=abc,d", "+api_key=***,d"),
        ("data.token=abc", "data.token=***"),
        ("--password=abc router=topk", "--password=*** router=topk"),
        ("train.global_batch_tokens=2048", "train.global_batch_tokens=2048"),
        ("data.tokenizer.kind=bytes", "data.tokenizer.kind=bytes"),
        ("see https://host/a@b", "see https://host/a@b"),
        ("a short value", "a short value"),
    ],
)
def test_words_with_a_password(text, kept):
    assert redacted(text) == kept


@pytest.mark.parametrize(
    "value", ["${oc.env:SOME_API_KEY}", SECRET, f"x{SECRET}y", "a${oc.env:SOME_API_KEY}"]
)
@pytest.mark.parametrize("key", ["run.name", "train.sample_prompt", "data.cache_dir"])
def test_a_config_with_a_secret_is_refused_without_printing_it(key, value):
    with pytest.raises(
        UserError, match=f"{key} holds the value of the environment variable SOME_API_KEY"
    ) as e:
        compose_train([f"{key}='{value}'" if "$" not in value else f"{key}={value}"])
    assert SECRET not in str(e.value)


def test_what_is_no_secret_may_come_from_the_environment():
    assert compose_train(["run.name=${oc.env:WANDB_MODE}"]).run.name == "offline-mode"


def test_lines_and_logs_are_printed_without_secrets():
    assert one_line(f"no such file {SECRET}") == "no such file ***"
    record = logging.LogRecord("moetrain", logging.INFO, "", 1, "found %s", (SECRET,), None)
    assert LineFormatter("%(message)s").format(record) == "found ***"


@pytest.mark.usefixtures("training")
def test_a_mistake_with_a_secret_in_it_prints_none(corpus, tmp_path, capsys):
    assert tiny.train(corpus, tmp_path / "run", f"rooter={SECRET}") == 2
    assert tiny.train(corpus, tmp_path / "run", f"tracker={SECRET}") == 2
    printed = capsys.readouterr()
    assert SECRET not in printed.err + printed.out
    assert "***" in printed.err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("training")
def test_a_run_folder_holds_no_secret(corpus, tmp_path, monkeypatch):
    """With one on the command line of the program, and one in the environment."""
    run = tmp_path / "run"
    words = ["moetrain", "train", f"--key={SECRET}", "token=abcd", "https://me:pass@host"]
    monkeypatch.setattr("sys.argv", words)
    assert tiny.train(corpus, run, "train.steps=2", "tracker=tensorboard") == 0
    everything = [path for path in run.rglob("*") if path.is_file()]
    assert len(everything) > 10
    for secret in (SECRET, "abcd", "me:pass"):
        assert [path for path in everything if secret.encode() in path.read_bytes()] == []
    argv = json.loads((run / "environment.json").read_text())["argv"]
    assert argv == ["moetrain", "train", "--key=***", "token=***", "https://***@host"]


def test_no_key_of_a_config_is_taken_for_a_password():
    text = (Path(__file__).parents[2] / "configs" / "train.yaml").read_text()
    assert redacted(text) == text
