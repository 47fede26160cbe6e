"""lm-eval on a model of ours: its requests against loops over tokens, and tasks of one's own, offline."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from model_cases import TINY

from moetrain.cli import main
from moetrain.data import ByteTokenizer
from moetrain.models import Decoder
from moetrain.moe.options import ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions
from moetrain.train.task import NextToken

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: eval)")

LENGTH, BATCH, EOS = 13, 3, 256


@dataclass
class Request:
    """What our model reads of lm-eval's Instance."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def lm():
    from moetrain.evaluation.lm import DecoderLM

    torch.manual_seed(0)
    model = Decoder(TINY, TopKOptions(top_k=2), ExpertsConfig(), 257).double()
    return DecoderLM(NextToken(model), ByteTokenizer(), LENGTH, BATCH)


def logprobs(lm, tokens: list[int]) -> list[torch.Tensor]:
    """After each of the tokens, of every next one."""
    model = lm.task.model
    return list(model.logits(model(torch.tensor([tokens])).hidden_BSD[0]).log_softmax(-1))


PAIRS = [
    ("", "abc"),
    ("de", "f"),
    ("the start is long, and lost: ", "end"),
    ("x", "longer than a window"),
    (" ", "y"),
]


def test_loglikelihood_of_a_continuation(lm) -> None:
    found = lm.loglikelihood([Request(pair) for pair in PAIRS], disable_tqdm=True)
    for (context, asked), (total, greedy) in zip(PAIRS, found, strict=True):
        stripped = context.rstrip()
        given, wanted = [*stripped.encode()] or [EOS], [*(context[len(stripped) :] + asked).encode()]
        tokens = (given + wanted)[-LENGTH - 1 :]
        scored = min(len(wanted), len(tokens) - 1)
        table = logprobs(lm, tokens[:-1])[-scored:]
        picked = [row[token].item() for row, token in zip(table, tokens[-scored:], strict=True)]
        assert total == pytest.approx(sum(picked), rel=1e-10)
        assert greedy == all(
            row.max() == row[token] for row, token in zip(table, tokens[-scored:], strict=True)
        )


def test_the_likeliest_continuation_is_greedy(lm) -> None:
    likeliest = int(logprobs(lm, [97])[-1].argmax())
    both = lm._loglikelihood_tokens([(None, [97], [likeliest]), (None, [97], [(likeliest + 1) % 257])])
    assert [greedy for _, greedy in both] == [True, False]


@pytest.mark.parametrize("length", [0, 1, LENGTH, LENGTH + 1, 3 * LENGTH - 4])
def test_rolling_scores_every_token_once_with_full_context(lm, length: int) -> None:
    tokens = [(7 * i) % 26 + 97 for i in range(length)]
    stream, expected = [EOS, *tokens], 0.0
    for start in range(0, length, LENGTH):
        stop = min(start + LENGTH, length)
        first = start if start == 0 else stop - LENGTH  # the last window reaches back as far as it can
        table = logprobs(lm, stream[first:stop])
        expected += sum(table[i - first][tokens[i]].item() for i in range(start, stop))
    (found,) = lm.loglikelihood_rolling([Request((bytes(tokens).decode(),))])
    assert found == pytest.approx(expected, rel=1e-10)


def test_generation_ends_at_a_stop_and_starts_from_what_fits(lm) -> None:
    def write(context: str, **options: Any) -> str:
        return lm.generate_until([Request((context, options))])[0]

    free = write("abc", max_gen_toks=9, until=[])
    assert len(free) > 4
    assert write("abc", max_gen_toks=9, until=free[2]) == free[: free.index(free[2])]
    assert write("abc", max_gen_toks=9, until=["\0never", free[3]]) == free[: free.index(free[3])]
    assert write("z" * 50 + "abcd", max_gen_toks=9) == write("abcd", max_gen_toks=9)
    assert write("", max_gen_toks=2) == ByteTokenizer().decode(
        [first := int(logprobs(lm, [EOS])[-1].argmax()), int(logprobs(lm, [EOS, first])[-1].argmax())]
    )


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
"""
CHOICE = "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
ROLLING = "doc_to_text: ''\ndoc_to_target: '{{question}}'\nmetric_list: [{metric: bits_per_byte}]\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    tiny.write_corpus(folder)
    with tiny.alone():
        assert tiny.train(folder, folder / "run", "train.steps=4") == 0
    return folder / "run"


@pytest.fixture
def tasks(tmp_path) -> Path:
    file = tmp_path / "data.jsonl"
    rows = [{"question": f"a{i}b ", "choices": ["cd", "\u00e9\u00e9\u00e9"], "answer": 0} for i in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, rest in (
        ("choose", "multiple_choice", CHOICE),
        ("roll", "loglikelihood_rolling", ROLLING),
    ):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, file=file) + rest)
    return tmp_path


def test_tasks_of_ones_own_without_a_network(trained, tasks, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tasks / "figures.json"
    with tiny.alone():
        line = [
            "eval",
            f"checkpoint={trained}",
            "tasks=[choose,roll]",
            f"include_path={tasks}",
            f"json={out}",
        ]
        assert main([*line, "limit=3"]) == 0
    found = json.loads(out.read_text())
    assert found["tasks"]["choose"]["acc,none"] == 1.0  # two letters are likelier than six bytes unheard of
    assert 3 < found["tasks"]["roll"]["bits_per_byte,none"] < 12
    assert "choose" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["tasks=[chose]"], "tasks: chose is not known to lm-eval (did you mean choose?)"),
        (["tasks=[choose]", "limit=0"], "limit=0 must be 1 or more"),
        (["tasks=[lost]"], "tasks=[lost]: their data cannot be read"),
    ],
)
def test_a_mistake_about_tasks_is_one_line(trained, tasks, options, said, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tasks / "lost.yaml").write_text(
        TASK.format(name="lost", kind="multiple_choice", file=tasks / "none") + CHOICE
    )
    with tiny.alone():
        assert main(["eval", f"checkpoint={trained}", f"include_path={tasks}", *options]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
