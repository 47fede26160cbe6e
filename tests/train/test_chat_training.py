"""A run on conversations: resumed, refused where their sequences would be others, and exported."""

from __future__ import annotations

import shutil

import pytest
import tiny
from chat_cases import CHATML, conversations, tokenizer_folder
from data_cases import jsonl

from moetrain.cli import main
from moetrain.data.chat.files import read_template_files

pytestmark = [pytest.mark.usefixtures("training"), pytest.mark.real]
GIVEN = CHATML + "{# as given #}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The overrides of a run on conversations, with a template that is not the tokenizer's."""
    folder = tmp_path_factory.mktemp("chat")
    jsonl(folder / "rows.jsonl", [{"messages": row} for row in conversations(60, seed=1, longest=2)])
    tokenizer_folder(folder / "tokenizer", CHATML)
    (folder / "given.jinja").write_text(GIVEN)
    model = [word for word in tiny.OVERRIDES if not word.startswith("data")]
    given = [f"data.path={folder}/rows.jsonl", f"data.cache_dir={folder}/cache", "data.seq_len=64"]
    given += ["data.tokenizer.kind=file", f"data.tokenizer.path={folder}/tokenizer", "router=mixtral"]
    batch = [f"train.global_batch_tokens={tiny.BATCH * 64}", f"data.chat_template={folder}/given.jinja"]
    return ["data=chat", *given, *model, *batch, "train.steps=6", "checkpoint.every=3", "train.eval_every=3"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    with tiny.alone():
        assert main(["train", f"run.dir={folder}", *data]) == 0
    return folder


def test_a_resumed_run_is_the_same(run, data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(tiny.checkpoint(copy, 6))
    assert main(["train", f"run.dir={copy}", *data]) == 0
    assert tiny.steps(copy) == tiny.steps(run)
    assert tiny.evaluations(copy) == tiny.evaluations(run)
    tiny.assert_same_state(tiny.checkpoint(copy, 6), tiny.checkpoint(run, 6))


@pytest.mark.parametrize("other", ["data.overlong=drop", "data.train_on=last"])
def test_other_sequences_are_refused(run, data, tmp_path, other, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert main(["train", f"run.dir={copy}", *data, "train.steps=7", other]) == 2
    assert "trained on other data" in capsys.readouterr().err


def test_an_export_has_the_template_and_transformers_uses_it(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert main(["export", f"checkpoint={run}", f"target={tmp_path / 'out'}"]) == 0
    assert read_template_files(tmp_path / "out").templates == {"default": GIVEN}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
