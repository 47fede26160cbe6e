"""Rows of conversations: the shapes that are read, and one line with file and row for one that is broken."""

import json
import logging
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_cases import CHATML, TEMPLATES, chat_data, read, tokenizer_folder

from moetrain.data import prepare
from moetrain.data.chat.messages import RowError, check_order, conversation
from moetrain.data.chat.options import PromptCompletionData
from moetrain.data.chat.settings import Broken
from moetrain.data.tokenizer import load_tokenizer
from moetrain.errors import UserError

USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}
GOOD = {"messages": [USER, ANSWER]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), CHATML)


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A tokenizer whose template refuses other orders than user, assistant."""
    return tokenizer_folder(tmp_path_factory.mktemp("strict"), TEMPLATES["mistral"])


def row(*messages, **more):
    return json.dumps({"messages": messages, **more}).encode()


def content(value):
    return row({"role": "user", "content": value}, ANSWER)


BROKEN = {
    "no role": (row({"content": "hello"}, ANSWER), "message 0 has no role (it has: content)"),
    "unknown role": (
        row(USER, {"role": "asistant", "content": "x"}),
        "has the role 'asistant'; known: system",
    ),
    "null content": (content(None), "message 0 (user) has no content (null)"),
    "content of numbers": (content(7), "message 0: its content is int, not text"),
    "an image": (content([{"type": "image_url", "image_url": {}}]), "a part of the kind 'image_url'"),
    "odd order": (row(USER, USER, ANSWER), "message 1 (user) follows another user's; data.check_order=false"),
    "late system": (row(USER, ANSWER, {"role": "system", "content": "x"}), "message 2 (system) stands after"),
    "no UTF-8": (row(USER, ANSWER).replace(b"world", b"\xff"), "is not UTF-8"),
    "no JSON": (b'{"messages": [', "cannot be read as json: row 1 (line 2)"),
    "no object": (b"[1]", "row 1 is no object but list"),
    "no messages": (
        b'{"text": "hello"}',
        "it has no 'messages' or 'conversations' (data.messages_key); it has: text",
    ),
    "empty": (row(), "it has no messages (an empty list)"),
    "messages as text": (b'{"messages": "hello"}', "its messages are str, not a list"),
    "1 MB": (content("x" * 2**20), "it has 1,048,616 characters, more than data.max_row_chars=500,000"),
    "no answer": (row(USER), "no message of it trains"),
    "nothing trains": (row(USER, ANSWER | {"train": False}), "no message of it trains"),
    "train of text": (
        row(USER, ANSWER | {"train": "yes"}),
        "message 1: 'train' is 'yes'; it is true or false",
    ),
    "a call without a name": (
        row(USER, {"role": "assistant", "tool_calls": [{}]}),
        "a tool call names no function",
    ),
    "a reserved character": (content("\U0010fff0"), "it holds the character U+10FFF0"),
    "tools as text": (row(USER, ANSWER, tools="[}"), "its tools are text that is no JSON"),
    "deep": (b'{"messages": ' + b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_is_one_line_with_file_and_row(kind, folder, tmp_path):
    bad, words = BROKEN[kind]
    cfg = chat_data(tmp_path, b"\n".join([json.dumps(GOOD).encode(), bad]), folder)
    with pytest.raises(UserError) as caught:
        read(cfg, tmp_path)
    line = str(caught.value)
    assert str(tmp_path / "rows.jsonl") in line
    assert "row 1" in line
    assert words in line
    assert "data.on_broken=skip" in line
    assert "\n" not in line
    assert len(line) < 500


def test_what_a_template_refuses_is_told_by_its_words(strict, tmp_path):
    rows = [GOOD, {"messages": [USER, USER, ANSWER]}]
    with pytest.raises(
        UserError, match="row 1: the chat template refuses it: Roles must alternate user/assistant"
    ):
        read(chat_data(tmp_path, rows, strict, check_order=False), tmp_path)
    broken = tokenizer_folder(tmp_path / "broken", "{{ messages[0].content + messages[0].number }}")
    with pytest.raises(
        UserError, match="row 0: the chat template fails: 'dict object' has no attribute 'number'"
    ):
        read(chat_data(tmp_path, rows, broken), tmp_path)
    wrong = tokenizer_folder(tmp_path / "wrong", "a\n{% for %}")
    with pytest.raises(UserError, match=r"the chat template of tokenizer .*, line 2: "):
        read(chat_data(tmp_path, rows, wrong), tmp_path)
    none = tokenizer_folder(tmp_path / "none")
    with pytest.raises(
        UserError, match=r"has no chat template .* give the file of one, data\.chat_template=FILE"
    ):
        read(chat_data(tmp_path, rows, none), tmp_path)


def test_broken_rows_are_skipped_named_and_counted(folder, tmp_path, caplog):
    lines = [
        json.dumps(GOOD).encode(),
        *(bad for bad, _ in BROKEN.values()),
        row(USER, ANSWER | {"content": "é"}),
    ]
    cfg = chat_data(tmp_path, b"\n".join(lines), folder, on_broken=Broken.skip)
    with caplog.at_level(logging.WARNING, "moetrain"):
        documents, _ = read(cfg, tmp_path)
    assert [document.marks.row for document in documents] == [0, len(lines) - 1]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 21  # twenty of them by name, and the sum
    assert "rows.jsonl, row 1: message 0 has no role" in told[0]
    assert told[-1].endswith(f"{len(BROKEN)} of {len(lines)} rows are left out")


def test_nothing_but_broken_rows_is_an_error(folder, tmp_path):
    cfg = chat_data(tmp_path, [{"messages": []}, {"messages": None}], folder, on_broken=Broken.skip)
    with pytest.raises(UserError, match=r"all 2 rows are broken; the first: .*row 0: it has no messages"):
        prepare(cfg)


def test_sharegpt_is_the_same_conversation(folder, tmp_path):
    said = [("system", "be"), ("human", "hello"), ("gpt", "world"), ("human", "é"), ("gpt", "x")]
    roles = ("system", "user", "assistant", "user", "assistant")
    openai = [{"role": role, "content": text} for role, (_, text) in zip(roles, said, strict=True)]
    sharegpt = [{"from": speaker, "value": text} for speaker, text in said]
    rows = [
        {"messages": openai},
        {"conversations": sharegpt},
        {"conversations": sharegpt[1:], "system": "be"},
    ]
    documents, tokens = read(chat_data(tmp_path, rows, folder), tmp_path)
    assert (
        len({document.text for document in documents})
        == len({document.marks[:3] for document in documents})
        == 1
    )
    assert len({tuple(each.mask.trains_N) for each in tokens}) == 1
    call = {"name": "f", "arguments": {"x": 1}}
    parts = [{"from": "function_call", "value": json.dumps(call)}]
    assert conversation(parts, None).messages[0]["tool_calls"] == [{"type": "function", "function": call}]
    with pytest.raises(RowError, match="message 0 is from 'alien'; known: assistant, bard"):
        conversation([{"from": "alien", "value": "x"}], None)


def test_content_is_text_or_parts_of_text(folder, tmp_path):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    rows = [GOOD, {"messages": [USER | {"content": parts}, ANSWER]}]
    first, second = read(chat_data(tmp_path, rows, folder), tmp_path)[0]
    assert first == second._replace(marks=second.marks._replace(row=0))


def test_a_call_may_have_no_content():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    given = conversation([USER, {"role": "assistant", "content": None, "tool_calls": [call]}], None)
    assert given.messages[1]["content"] == ""
    assert given.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


def test_parquet_holds_the_same_rows(folder, tmp_path):
    call = {"type": "function", "function": {"name": "look", "arguments": json.dumps({"x": 1})}}
    rows = [
        GOOD,
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "1"},
                ANSWER,
            ]
        },
    ]
    cfg = chat_data(tmp_path, rows, folder)
    expected = read(cfg, tmp_path)[0]
    (tmp_path / "rows.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist([each | {"other": 7} for each in rows]), tmp_path / "rows.parquet")
    found = read(replace(cfg, path=str(tmp_path / "rows.parquet")), tmp_path)[0]
    assert [document.text for document in found] == [document.text for document in expected]
    assert [document.marks[:2] for document in found] == [document.marks[:2] for document in expected]


def test_a_parquet_row_that_is_no_utf8_is_named(folder, tmp_path):
    values = [b"hello", b"\xff\xfe"]
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.binary()}))
    column = [[{"role": "user", "content": text}, {"role": "assistant", "content": b"x"}] for text in values]
    table = pa.table({"messages": pa.array(column, kind)})
    table = table.cast(
        pa.schema({"messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))}),
        safe=False,
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    cfg = replace(chat_data(tmp_path, [GOOD], folder), path=str(tmp_path / "rows.parquet"))
    with pytest.raises(UserError, match=r"rows\.parquet, row 1: not UTF-8 text"):
        read(cfg, tmp_path)


@pytest.mark.parametrize(
    ("roles", "fault"),
    [
        ("assistant user assistant", r"message 0 \(assistant\) answers no user"),
        ("system assistant", r"message 1 \(assistant\) answers no user"),
        ("user assistant assistant", r"message 2 \(assistant\) follows another assistant's"),
        ("user tool assistant", r"message 1 \(tool\) follows no assistant's turn"),
        ("system developer user assistant tool tool assistant user", None),
    ],
    ids=["begins", "after system", "twice", "tool", "good"],
)
def test_the_order_of_turns(roles, fault):
    if fault is None:
        check_order(roles.split())
    else:
        with pytest.raises(RowError, match=fault):
            check_order(roles.split())


def test_prompts_and_completions_of_text(folder, tmp_path):
    rows = [{"prompt": "hello", "completion": " world </s> é"}, {"prompt": "", "completion": "x"}]
    cfg = chat_data(tmp_path, rows, folder, cls=PromptCompletionData)
    documents, tokens = read(cfg, tmp_path)
    assert [document.text for document in documents] == ["hello world </s> é</s>", "x</s>"]
    eos = 1
    assert [each.tokens_N.tolist().count(eos) for each in tokens] == [1, 1]
    trained = [each.tokens_N[each.mask.trains_N] for each in tokens]
    assert load_tokenizer(folder).decode(trained[0][:-1]) == " world </s> é"
    assert trained[0][-1] == eos
    assert tokens[1].mask.trains_N.tolist() == [False, True]  # nothing stands before its first
    for fault, words in (
        ({"prompt": "x"}, r"row 0: it has no 'completion' \(data\.completion_key\); it has: prompt"),
        ({"prompt": None, "completion": "x"}, "row 0: its 'prompt' is null"),
        ({"prompt": "x", "completion": ""}, "row 0: its 'completion' is empty"),
        ({"prompt": [], "completion": ""}, "row 0: its prompt and completion are list and str"),
    ):
        with pytest.raises(UserError, match=words):
            read(chat_data(tmp_path, [fault], folder, cls=PromptCompletionData), tmp_path)


def test_completions_of_messages_train(folder, tmp_path):
    more = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "x"}]
    rows = [{"prompt": [USER, ANSWER, *more[:1]], "completion": more[1:]}]
    (document,), _ = read(chat_data(tmp_path, rows, folder, cls=PromptCompletionData), tmp_path)
    (same,), _ = read(
        chat_data(tmp_path, [{"messages": [USER, ANSWER | {"train": 0}, *more]}], folder), tmp_path
    )
    assert document == same
    assert [document.text[slice(*span)] for span in document.marks.trained] == ["x<|im_end|>\n"]
