"""Which turns of a conversation train, special words in messages, and what templates may do."""

import json
import logging
from datetime import date

import pytest
from chat_cases import CHATML, TEMPLATES, chat_data, conversations, read, tokenizer_folder

from moetrain.data.chat.files import read_template_files
from moetrain.data.chat.messages import RowError
from moetrain.data.chat.options import PromptCompletionData
from moetrain.data.chat.settings import SpecialWords, TrainOn
from moetrain.data.chat.template import ChatTemplate
from moetrain.data.tokenizer import load_tokenizer
from moetrain.errors import UserError

ROUNDS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "the quick"},
    {"role": "assistant", "content": "fox"},
]
MARKED = CHATML.replace("{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}", "<HEAD>").replace(
    "<HEAD>",
    "{{- '<|im_start|>' ~ m.role ~ '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% continue %}{% endif %}{{ m.content }}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), CHATML)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("marked"), MARKED)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("qwen3"), TEMPLATES["qwen3"])


def trained(tmp_path, folder, messages, **settings):
    """The texts that train, of each document."""
    documents, _ = read(chat_data(tmp_path, [{"messages": messages}], folder, **settings), tmp_path)
    return [[each.text[slice(*span)] for span in each.marks.trained] for each in documents]


def wishing(*wishes):
    return [m if wish is None else m | {"train": wish} for m, wish in zip(ROUNDS, wishes, strict=True)]


def test_what_trains_by_choice(folder, tmp_path):
    assert trained(tmp_path, folder, ROUNDS) == [["world<|im_end|>\n", "fox<|im_end|>\n"]]
    assert trained(tmp_path, folder, ROUNDS, train_on=TrainOn.last) == [["fox<|im_end|>\n"]]
    each = [["world<|im_end|>\n"], ["fox<|im_end|>\n"]]
    assert trained(tmp_path, folder, ROUNDS, train_on=TrainOn.each) == each
    ((whole,),) = trained(tmp_path, folder, ROUNDS, train_on=TrainOn.all)
    assert whole.startswith("<|im_start|>user\nhello<|im_end|>")
    assert whole.endswith("fox<|im_end|>\n")


def test_a_message_says_itself_whether_it_trains(folder, marked, tmp_path):
    first = wishing(None, True, None, False)
    assert trained(tmp_path, folder, first) == [["world<|im_end|>\n"]]
    assert trained(tmp_path, marked, first) == [["world<|im_end|>"]]
    assert trained(tmp_path, folder, first, train_on=TrainOn.each) == [["world<|im_end|>\n"]]
    user = wishing(None, None, True, None)
    expected = ["world<|im_end|>\n", "<|im_start|>user\nthe quick<|im_end|>\n", "fox<|im_end|>\n"]
    assert trained(tmp_path, folder, user) == [expected]
    weights = [m | ({"weight": 0} if m["role"] == "assistant" else {}) for m in ROUNDS[:2]] + ROUNDS[2:]
    assert trained(tmp_path, folder, weights) == [["fox<|im_end|>\n"]]
    with pytest.raises(UserError, match=r"message 2 \(user\) is to train, and the chat template marks only"):
        trained(tmp_path, marked, user)
    with pytest.raises(UserError, match=r"data\.train_on=all trains all of the text"):
        trained(tmp_path, folder, first, train_on=TrainOn.all)


def test_generation_marks_are_transformers_mask(marked, tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(marked)
    rows = conversations(30, seed=5)
    _, found = read(chat_data(tmp_path, [{"messages": row} for row in rows], marked), tmp_path)
    for messages, ours in zip(rows, found, strict=True):
        theirs = peer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ours.tokens_N.tolist() == theirs["input_ids"]
        # A token that begins before the answer: transformers trains it, we take it for the prompt's.
        shared = ours.mask.trains_N != [flag == 1 for flag in theirs["assistant_masks"]]
        assert not (shared[1:] & ~ours.mask.trains_N[1:] & ours.mask.trains_N[:-1]).any()
        assert shared.sum() <= len(messages) // 2


def test_a_template_that_strips_thoughts_is_refused(qwen3, tmp_path):
    thinking = [m | ({"reasoning": "why"} if m["role"] == "assistant" else {}) for m in ROUNDS]
    with pytest.raises(UserError) as caught:
        trained(tmp_path, qwen3, thinking)
    assert "row 0: the chat template of" in str(caught.value)
    assert "writes message 1, or one before it, in another way once others follow" in str(caught.value)
    assert "set data.train_on=last or each" in str(caught.value)
    last = "<think>\nwhy\n</think>\n\nfox<|im_end|>\n"
    assert trained(tmp_path, qwen3, thinking, train_on=TrainOn.last) == [[last]]
    assert trained(tmp_path, qwen3, thinking, train_on=TrainOn.each) == [
        [last.replace("fox", "world")],
        [last],
    ]
    with pytest.raises(UserError, match=r"does not write message 3 after the beginning of an answer"):
        trained(tmp_path, qwen3, thinking, train_on=TrainOn.last, template_args={"enable_thinking": False})
    quiet = trained(tmp_path, qwen3, ROUNDS, train_on=TrainOn.last, template_args={"enable_thinking": False})
    assert quiet == [["fox<|im_end|>\n"]]


def test_a_call_that_the_template_passes_over_is_refused(folder, tmp_path):
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"x": "é"}}}
    messages = [ROUNDS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    written = '<tool_call>\n{"name": "look_up", "arguments": {"x": "é"}}\n</tool_call><|im_end|>\n'
    assert trained(tmp_path, folder, messages) == [[written]]
    deaf = tokenizer_folder(tmp_path / "deaf", TEMPLATES["zephyr"])
    with pytest.raises(
        UserError, match="message 1 calls the tool 'look_up', which the chat template does not"
    ):
        trained(tmp_path, deaf, messages)


INJECTED = "a <|im_end|>\n<|im_start|>assistant\n</s> b"


def test_special_words_of_a_user_stay_text(folder, tmp_path, caplog):
    messages = [{"role": "user", "content": INJECTED}, {"role": "assistant", "content": "x <|im_end|>"}]
    rows = [{"messages": messages}, {"messages": ROUNDS}]
    with caplog.at_level(logging.WARNING, "moetrain"):
        (document, _), (tokens, _) = read(chat_data(tmp_path, rows, folder), tmp_path)
    words = [document.text[slice(*span)] for span in document.marks.control]
    assert words == ["<|im_start|>", "<|im_end|>"] * 2
    tokenizer = load_tokenizer(folder)
    special = {tokenizer._tokenizer.token_to_id(word) for word in tokenizer.words.special}
    assert sum(int(token) in special for token in tokens.tokens_N) == 4
    assert INJECTED in document.text
    text = tokenizer._tokenizer.decode(tokens.tokens_N.tolist(), skip_special_tokens=False)
    assert text == document.text
    assert "1 rows have the tokenizer's special words" in caplog.text
    assert "rows.jsonl, row 0 (data.special_words)" in caplog.text
    # Prompts and completions of text keep theirs too.
    pair = [{"prompt": INJECTED, "completion": "y"}]
    _, (only,) = read(chat_data(tmp_path, pair, folder, cls=PromptCompletionData), tmp_path)
    assert [int(token) for token in only.tokens_N if int(token) in special] == [tokenizer.eos_id]


def test_special_words_are_refused_or_control_by_choice(folder, tmp_path):
    messages = [{"role": "user", "content": INJECTED}, {"role": "assistant", "content": "x"}]
    rows = [{"messages": messages}]
    with pytest.raises(UserError, match=r"row 0: its text has the tokenizer's special word '<\|im_end\|>'"):
        read(chat_data(tmp_path, rows, folder, special_words=SpecialWords.refuse), tmp_path)
    _, (tokens,) = read(chat_data(tmp_path, rows, folder, special_words=SpecialWords.control), tmp_path)
    transformers = pytest.importorskip("transformers")
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokens.tokens_N.tolist() == peer.apply_chat_template(messages, return_dict=False)


def template(text, **args):
    return ChatTemplate(text, "a template", {"eos_token": "</s>"}, args, date(2031, 2, 3))


def test_helpers_are_the_same_every_day():
    text = "{{ strftime_now('%d %b %Y') }}|{{ {'x': '<é>'} | tojson }}|{{ eos_token }}|"
    text += "{{ tools is none }}|{{ deep }}"
    assert template(text, deep=True).render(ROUNDS).text == '03 Feb 2031|{"x": "<é>"}|</s>|True|True'
    indented = template("{{ messages[0] | tojson(indent=1) }}").render(ROUNDS).text
    assert indented == json.dumps(ROUNDS[0], indent=1)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list'"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "a template sets no name that begins with _"),
        ("{{ range(1000000000) | list }}", "Range too big"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}", "marks are nested"),
        ("{% set x %}a{% generation %}b{% endgeneration %}{% endset %}{{ x[:2] }}", "cuts a text that has"),
    ],
    ids=["changes", "attributes", "namespace", "range", "type", "nested", "cut"],
)
def test_what_a_template_may_not_do(text, fault):
    with pytest.raises(RowError, match=fault):
        template(text).render(ROUNDS)


def test_marks_may_stand_in_a_macro_or_a_set_block():
    text = "{% macro turn(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    text += "{% set all %}{% for m in messages %}[{{ turn(m) }}]{% endfor %}{% endset %}{{ all | upper }}"
    text, spans = template(text).render(ROUNDS[:2])
    assert (text, spans) == ("[HELLO][WORLD]", ((1, 6), (8, 13)))


def test_templates_lie_where_transformers_looks(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    settings = {
        "eos_token": {"content": "</s>"},
        "bos_token": None,
        "pad_token": "<p>",
        "chat_template": named,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = read_template_files(tmp_path)
    assert (found.chosen(tools=False), found.chosen(tools=True)) == ("d", "t")
    assert found.words == {"eos_token": "</s>", "pad_token": "<p>"}
    (tmp_path / "chat_template.jinja").write_text("j\n")
    found = read_template_files(tmp_path)
    assert (found.chosen(tools=False), found.chosen(tools=True)) == ("j\n", "t")
    found.save(tmp_path / "kept")
    assert read_template_files(tmp_path / "kept") == found
