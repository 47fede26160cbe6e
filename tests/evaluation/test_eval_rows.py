"""``moetrain eval`` on rows that train in part, against each row alone; and figures by domain."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from chat_cases import CHATML, chat_data, conversations, read, tokenizer_folder
from data_cases import jsonl
from torch.nn.functional import cross_entropy

from moetrain.cli import main
from moetrain.config.stored import trained_config
from moetrain.convert.open_model import open_model
from moetrain.data import load_tokenizer
from moetrain.data.chat.options import ChatData, PromptCompletionData
from moetrain.data.chat.settings import TrainOn

SEQ = 61


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run on conversations, and files of rows with labels."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"messages": row, "label": "ab"[i % 2]} for i, row in enumerate(conversations(40, seed=1))]
    (folder / "in").mkdir()
    jsonl(folder / "in" / "one.jsonl", rows[:7])
    jsonl(folder / "in" / "two.jsonl", rows[7:18])
    jsonl(folder / "train.jsonl", rows)
    pairs = [{"prompt": f"hello {i}", "completion": " world fox" * (i + 1)} for i in range(5)]
    jsonl(folder / "pairs.jsonl", pairs)
    tokenizer_folder(folder / "tokenizer", CHATML)
    kept = [word for word in tiny.OVERRIDES if not word.startswith(("data", "train.global"))]
    data = ["data=chat", f"data.path={folder}/train.jsonl", f"data.cache_dir={folder}/cache"]
    data += [f"data.seq_len={SEQ}", "data.tokenizer.kind=file", f"data.tokenizer.path={folder}/tokenizer"]
    with tiny.alone():
        batch = f"train.global_batch_tokens={4 * SEQ}"
        assert main(["train", f"run.dir={folder}/run", *kept, *data, batch, "train.steps=2"]) == 0
    return folder


def figures(place, *options, code=0):
    with tiny.alone():
        assert main(["eval", f"checkpoint={place}/run", *options, f"json={place}/figures.json"]) == code
    return json.loads((place / "figures.json").read_text())


def alone(place, tmp_path, rows, **settings):
    """(nats, tokens, bytes) of each row by itself, cut at a window."""
    model = open_model(place / "run", trained_config).build()
    found = []
    for each in read(chat_data(tmp_path, rows, place / "tokenizer", **settings), tmp_path)[1]:
        ids_N, trains_N = torch.from_numpy(each.tokens_N[: SEQ + 1]), each.mask.trains_N[1 : SEQ + 1]
        with torch.no_grad():
            logits_SV = model.logits(model(ids_N[None, :-1]).hidden_BSD[0])
        nll_S = cross_entropy(logits_SV, ids_N[1:], reduction="none")
        found.append((float(nll_S[torch.from_numpy(trains_N)].sum()), int(trains_N.sum())))
    return found


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_figures(found, expected):
    nats, tokens = (sum(column) for column in zip(*expected, strict=True))
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.parametrize("train_on", [pytest.param("assistant", marks=pytest.mark.real), "last"])
def test_files_and_domains_against_each_row_alone(place, tmp_path, train_on, capsys):
    rows = [f"data.path={place}/in", "data.kind=chat", "data.domain_key=label"]
    found = figures(place, *rows, f"data.train_on={train_on}", "batch_size=3")
    by_file, by_domain = {}, {"a": [], "b": []}
    for name in ("one", "two"):
        rows = rows_of(place / "in" / f"{name}.jsonl")
        by_file[name] = alone(place, tmp_path, rows, cls=ChatData, train_on=TrainOn[train_on])
        for row, sums in zip(rows, by_file[name], strict=True):
            by_domain[row["label"]].append(sums)
        assert_figures(found["files"][f"{place}/in/{name}.jsonl"], by_file[name])
    for label, sums in by_domain.items():
        assert_figures(found["domains"][label], sums)
    assert_figures(found["total"], by_file["one"] + by_file["two"])
    used = found["conversations"]
    assert used["documents"] + used["untrained"] == 18
    assert used["trained"] == found["total"]["tokens"]
    assert used["cut"] > 0
    printed = capsys.readouterr().out
    assert f"{used['documents']} conversations in {used['windows']} sequences" in printed
    said = "the run was trained with data.train_on=assistant, and this scores data.train_on=last" in printed
    assert said == (train_on == "last")


def test_completions_against_each_row_alone(place, tmp_path):
    found = figures(place, f"data.path={place}/pairs.jsonl", "data.kind=prompt_completion")
    expected = alone(place, tmp_path, rows_of(place / "pairs.jsonl"), cls=PromptCompletionData)
    assert_figures(found["total"], expected)
    assert "domains" not in found
    size = sum(len(row["completion"]) for row in rows_of(place / "pairs.jsonl"))
    assert found["total"]["bytes"] == size  # the end of a text stands for no bytes


@pytest.mark.real
def test_domains_of_text(place, tmp_path):
    texts = {"a": ["hello world", "x"], "b": [" fox the quick"]}
    rows = [{"text": text, "label": label} for label, each in texts.items() for text in each]
    jsonl(tmp_path / "text.jsonl", rows)
    found = figures(place, f"data.path={tmp_path}/text.jsonl", "data.domain_key=label")
    tokenizer = load_tokenizer(place / "tokenizer")
    for label, each in texts.items():  # the first of a document is not scored, its end is
        assert found["domains"][label]["tokens"] == sum(len(tokenizer.encode(text)) for text in each)
    nats = [sums["loss"] * sums["tokens"] for sums in (*found["domains"].values(), found["total"])]
    assert sum(nats[:2]) == pytest.approx(nats[2])


@pytest.mark.real
def test_a_row_that_cannot_be_used_is_one_line(place, tmp_path, capsys):
    jsonl(tmp_path / "bad.jsonl", [{"messages": []}])
    figures(place, f"data.path={tmp_path}/bad.jsonl", "data.kind=chat", code=2)
    assert "bad.jsonl, row 0: it has no messages" in capsys.readouterr().err
    figures(place, f"data.path={place}/in", "data.kind=chat", "data.seq_len=2", code=2)
    assert "data.path: nothing is left to score (0 conversations" in capsys.readouterr().err
    figures(place, f"data.path={place}/in", "data.kind=chat", "data.overlong=refuse", code=2)
    assert "conversations have more than data.seq_len=61" in capsys.readouterr().err
