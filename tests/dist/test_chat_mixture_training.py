"""A run on a mixture of conversations, completions and text: its losses, resumed, cut otherwise, on ranks."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from chat_cases import CHATML, conversations, tokenizer_folder
from data_cases import documents, jsonl, text_folder
from lives import Lives

from moetrain.cli import main
from moetrain.config.hydra.compose import compose_train
from moetrain.data import IGNORE
from moetrain.train.start import build
from moetrain.train.task import batch_arguments

pytestmark = [pytest.mark.usefixtures("training"), pytest.mark.real]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    jsonl(folder / "rows.jsonl", [{"messages": row} for row in conversations(60, seed=1, longest=2)])
    pairs = [{"prompt": f"hello {i}", "completion": " world fox" * (1 + i % 5)} for i in range(43)]
    jsonl(folder / "pairs.jsonl", pairs)
    text_folder(folder, documents(37), "text")
    tokenizer_folder(folder / "tokenizer", CHATML)
    parts = [
        f"+data.parts.talk={{kind: chat, path: {folder}/rows.jsonl, weight: 3, train_on: last}}",
        f"+data.parts.pairs={{kind: prompt_completion, path: {folder}/pairs.jsonl, overlong: drop}}",
        f"+data.parts.text={{kind: local, path: {folder}/text, weight: 2}}",
    ]
    kept = [word for word in tiny.OVERRIDES if not word.startswith(("data", "train.global", "model.num_ex"))]
    data = [f"data.cache_dir={folder}/cache", "data.seq_len=64", "data.tokenizer.kind=file"]
    data += [f"data.tokenizer.path={folder}/tokenizer", "train.precision=fp64", "model.num_experts=6"]
    steps = ["train.steps=4", "checkpoint.every=2", "checkpoint.keep_last=9", "train.eval_every=2"]
    batch = [f"train.global_batch_tokens={8 * 64}", "train.eval_samples=null"]
    return ["data=mixture", *parts, *kept, *data, *steps, *batch, "train.eval_first=true"]


@pytest.fixture(scope="module")
def run(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    with tiny.alone():
        assert main(["train", f"run.dir={folder}", *given]) == 0
    return folder


def assert_close(run, other):
    for rows in (tiny.steps, tiny.evaluations):
        one, two = rows(run), rows(other)
        assert [row.keys() for row in one] == [row.keys() for row in two]
        assert all(a == pytest.approx(b, abs=1e-9) for a, b in zip(one, two, strict=True))


def test_a_step_s_loss_is_the_mean_over_the_tokens_that_train(given):
    built = build(compose_train(given), "cpu")
    batches = built.state.loader.next_step()
    nats = trained = places = 0
    with torch.no_grad():
        for batch in batches:
            output = built.state.task(**batch_arguments(batch, 0, step=0), per_token=True)
            asked_BS = batch.labels_BS != IGNORE
            nats += float(output.nll_BS[asked_BS].sum())
            trained, places = trained + int(asked_BS.sum()), places + asked_BS.numel()
    assert len(batches) == 4
    assert len({batch.num_targets for batch in batches}) > 1  # the mean of means would be another
    result = built.step.run(0, batches)
    assert result.loss == pytest.approx(nats / trained, rel=1e-12)
    assert trained < 0.8 * places


def test_every_part_is_evaluated_from_the_start_on(run):
    first, *_, last = tiny.evaluations(run)
    assert first["step"] == 0
    for part in ("talk", "pairs", "text"):
        assert last[f"val/{part}/loss"] < first[f"val/{part}/loss"]


def test_a_resumed_run_is_the_same(run, given, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(tiny.checkpoint(copy, 4))
    assert main(["train", f"run.dir={copy}", *given]) == 0
    assert tiny.steps(copy) == tiny.steps(run)
    assert tiny.evaluations(copy) == tiny.evaluations(run)
    tiny.assert_same_state(tiny.checkpoint(copy, 4), tiny.checkpoint(run, 4))


def test_another_choice_for_a_part_is_refused(run, given, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    more = ["train.steps=5", "+data.parts.talk.overlong=drop"]
    assert main(["train", f"run.dir={copy}", *given, *more]) == 2
    assert "trained on other data" in capsys.readouterr().err


@pytest.mark.parametrize("micro", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_accumulation_changes_nothing(run, given, tmp_path, micro):
    assert main(["train", f"run.dir={tmp_path}", *given, f"train.micro_batch_size={micro}"]) == 0
    assert_close(run, tmp_path)


def test_ranks_change_nothing(run, given, tmp_path):
    command = ["train", f"run.dir={tmp_path}/run", *given, "parallel.ep=2"]
    with Lives([command] * 2, tmp_path) as lives:
        assert lives.codes() == [0, 0], lives.output(0)
    assert_close(run, tmp_path / "run")
