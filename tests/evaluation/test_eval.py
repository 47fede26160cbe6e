"""``moetrain eval`` on files: against a loop over tokens, whatever lies beside them; and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch

from moetrain.cli import main
from moetrain.config.stored import trained_config
from moetrain.convert.open_model import open_model
from moetrain.evaluation import rules as rules_eval

SEQ = tiny.SEQ


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    tiny.write_corpus(folder)
    with tiny.alone():
        assert tiny.train(folder, folder / "run", "train.steps=4", "router=mixtral") == 0
    return folder / "run"


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "a.txt").write_text("abc def " * 13)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "in" / "é.txt").write_text("j")
    rows = [{"text": "caf\u00e9 " * 5}, {"text": "dab"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def by_loop(run: Path, documents: list[str], seq: int) -> tuple[float, int, int]:
    """(nats, tokens, bytes): one window at a time, each token but a document's first scored once.

    The documents of a file are one stream, cut into windows that share a token; none looks beyond its own.
    """
    model = open_model(run, trained_config).build()
    stream = [(number, token) for number, text in enumerate(documents) for token in [*text.encode(), 256]]
    nats, tokens, size = 0.0, 0, 0
    for start in range(0, len(stream) - 1, seq):
        window = stream[start : start + seq + 1]
        for place in range(1, len(window)):
            document, token = window[place]
            seen = [t for d, t in window[:place] if d == document]
            if not seen:
                continue
            logits = model.logits(model(torch.tensor([seen])).hidden_BSD[0, -1])
            nats -= logits.log_softmax(-1)[token].item()
            tokens, size = tokens + 1, size + (token != 256)
    return nats, tokens, size


def figures(run: Path, *options: str, code: int = 0) -> dict:
    with tiny.alone():
        assert main(["eval", f"checkpoint={run}", *options, f"json={run.parent}/figures.json"]) == code
    return json.loads((run.parent / "figures.json").read_text())


@pytest.mark.parametrize(("seq", "batch"), [(SEQ, 3), (7, 1), (1000, 8)])
def test_each_file_and_all_of_them_against_a_loop(trained, files, seq, batch, capsys):
    options = [] if seq == SEQ else [f"data.seq_len={seq}"]
    found = figures(trained, f"data.path={files}/**/*.*", f"batch_size={batch}", *options)
    texts = {
        "a.txt": ["abc def " * 13],
        "in/é.txt": ["j"],
        "rows.jsonl": ["caf\u00e9 " * 5, "dab"],
        "empty.txt": [],
    }
    assert found["files"].keys() == {str(files / name) for name in texts}
    sums = {name: by_loop(trained, documents, seq) for name, documents in texts.items()}
    sums["all"] = tuple(map(sum, zip(*sums.values(), strict=True)))
    for name, (nats, tokens, size) in sums.items():
        got = found["total"] if name == "all" else found["files"][str(files / name)]
        assert (got["tokens"], got["bytes"]) == (tokens, size)
        if not tokens:
            assert got["loss"] is got["perplexity"] is got["bits_per_byte"] is None
            continue
        assert got["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert got["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        if size:
            assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["seq_len"] == seq
    printed = capsys.readouterr().out
    assert f"{found['total']['loss']:.4f}" in printed
    assert "all" in printed


def test_a_file_scores_the_same_alone_and_in_company(trained, files):
    together = figures(trained, f"data.path={files}/*.*")["files"][f"{files}/rows.jsonl"]
    alone = figures(trained, f"data.path={files}/rows.jsonl")
    assert alone["files"] == {f"{files}/rows.jsonl": pytest.approx(together)}
    assert alone["total"] == pytest.approx(together)


def test_precisions_and_a_single_checkpoint(trained, files):
    newest = tiny.checkpoint(trained, tiny.checkpoints(trained)[-1])
    losses = [
        figures(path, f"data.path={files}/a.txt", *options)["total"]["loss"]
        for path, options in [
            (trained, []),
            (newest, []),
            (trained, ["precision=fp64"]),
            (trained, ["precision=bf16"]),
        ]
    ]
    assert losses[0] == losses[1] != losses[2]
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert losses[3] == pytest.approx(losses[0], rel=3e-2)


def test_a_hf_folder_needs_a_length_and_scores_the_same(trained, files, tmp_path, capsys):
    text = f"data.path={files}/a.txt"
    expected = figures(trained, text)
    with tiny.alone():
        assert main(["export", f"checkpoint={trained}", f"target={tmp_path}/hf"]) == 0
        assert main(["eval", f"checkpoint={tmp_path}/hf", text]) == 2
    assert "give data.seq_len=..." in capsys.readouterr().err
    found = figures(tmp_path / "hf", text, f"data.seq_len={SEQ}")
    assert found["total"] == pytest.approx(expected["total"], rel=1e-5)


WRONG = [
    ([], "give text to score"),
    (["data.path=none/*.txt"], "data.path=none/*.txt matches no file"),
    (["data.path=."], "none of the 1 files holds text"),
    (["data.path=.", "data.seq_len=1"], "data.seq_len=1 must be 2 or more"),
    (["data.path=.", "batch_size=0"], "batch_size=0 must be 1 or more"),
    (["data.path=.", "device=tpu"], "device=tpu is not known"),
    (["data.path=.", "limit=3"], "limit=3 is of tasks"),
    (["data.path=.", "include_path=."], "include_path=. is of tasks"),
    (["data.path=.", "json=."], "json=. is a folder"),
    (["data.path=.", "json=no/x.json"], "there is no folder no"),
    (["data.path=.", "checkpoint=nowhere"], "checkpoint=nowhere does not exist"),
    (["data.path=.", "data.source=local"], "unknown key data.source"),
    (["data.text_key=words"], "give text to score"),
    (["tasks=[x]", "data.text_key=words"], "data.text_key=words is of files"),
    (["tasks=[x]", "data.kind=chat"], "data.kind=chat is of files"),
    (["data.path=.", "data.train_on=last"], "data.train_on=last is not used by data.kind=text"),
    (
        ["data.path=.", "data.kind=chat", "data.prompt_key=p"],
        "data.prompt_key=p is not used by",
    ),
    (["data.path=.", "data.kind=chat", "data.text_key=t"], "data.text_key=t is not used by data.kind=chat"),
    (["data.path=.", "data.kind=chat", "data.template_date=now"], "data.template_date=now is no date"),
    (["data.path=.", "data.kind=chat"], "no chat template"),
    (["data.path=.", "data.kind=prompt_completion"], "blank.txt is plain text; rows of prompt_completion"),
    (["data.path=.", "data.domain_key=label"], "data.domain_key=label: blank.txt is plain text"),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_mistake_is_one_line_and_writes_nothing(trained, options, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "blank.txt").write_text(" ")
    monkeypatch.chdir(tmp_path)
    with tiny.alone():
        assert main(["eval", f"checkpoint={trained}", "json=figures.json", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["blank.txt"]


def test_it_runs_in_one_process(trained, files, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["eval", f"checkpoint={trained}", f"data.path={files}/a.txt"]) == 2
    assert "run it without torchrun" in capsys.readouterr().err


def test_tasks_without_lm_eval_say_how_to_get_it(trained, monkeypatch, capsys):
    monkeypatch.setattr(rules_eval, "is_installed", lambda package: False)
    assert main(["eval", f"checkpoint={trained}", "tasks=[hellaswag]"]) == 2
    error = capsys.readouterr().err
    assert "tasks=[hellaswag] needs the package lm-eval" in error
    assert "pip install 'moetrain[eval]'" in error
