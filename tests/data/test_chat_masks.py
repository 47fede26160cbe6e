"""Which tokens of conversations train: transformers' text and ids, and the template applied turn by turn."""

from datetime import date

import pytest
from chat_cases import LATER_TURNS, PIECES, TEMPLATES, chat_data, conversations, read, tokenizer_folder

from moetrain.data.chat.settings import TrainOn

NESTED = sorted(TEMPLATES.keys() - set(LATER_TURNS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        name: tokenizer_folder(root / name, template, pieces=name in PIECES)
        for name, template in TEMPLATES.items()
    }


def peer(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def turn_by_turn(tokenizer, messages, numbers):
    """(ids, places that train) by the text, and the places by ids, None where prefixes of ids do not nest.

    They do not where one token has a turn's first characters and those before it: it begins before the turn.
    """

    def text(part, prompt=False):
        return tokenizer.apply_chat_template(part, add_generation_prompt=prompt, tokenize=False)

    def ids(part, prompt=False):
        return tokenizer.apply_chat_template(part, add_generation_prompt=prompt, return_dict=False)

    encoded = tokenizer(text(messages), add_special_tokens=False, return_offsets_mapping=True)
    whole = ids(messages)
    assert encoded["input_ids"] == whole
    by_text, by_ids, nested = [], [], True
    for number in numbers:
        parts = (messages[:number], True), (messages[: number + 1], False)
        first, last = (len(text(*part)) for part in parts)
        by_text += [i for i, (start, _) in enumerate(encoded["offset_mapping"]) if first <= start < last]
        before, upto = (ids(*part) for part in parts)
        nested &= whole[: len(before)] == before and whole[: len(upto)] == upto
        by_ids += range(len(before), len(upto))
    return whole, by_text, by_ids if nested else None


def check(folder, rows, tmp_path, train_on, expected):
    """``expected``: (number of the row, messages of the text, numbers of those that train) of each text."""
    tokenizer = peer(folder)
    today = date.today().isoformat()  # which is what transformers gives to templates
    rows = [{"messages": row} for row in rows]
    cfg = chat_data(tmp_path, rows, folder, train_on=train_on, template_date=today)
    found = read(cfg, tmp_path)[1]
    assert len(found) == len(expected)
    nested = 0
    for (row, messages, numbers), ours in zip(expected, found, strict=True):
        ids, by_text, by_ids = turn_by_turn(tokenizer, messages, numbers)
        assert (ours.mask.row, ours.tokens_N.tolist()) == (row, ids), messages
        trained = ours.mask.trains_N.nonzero()[0].tolist()
        assert trained == by_text, messages
        assert by_ids in (None, trained), messages
        nested += by_ids is not None
    assert nested > len(expected) // 4


def answers(messages):
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def check_template(name, folders, tmp_path, count):
    rows = conversations(count, seed=len(name), system=name != "gemma")
    if name in LATER_TURNS:
        last = [(i, row, answers(row)[-1:]) for i, row in enumerate(rows)]
        check(folders[name], rows, tmp_path, TrainOn.last, last)
        each = [(i, row[: n + 1], [n]) for i, row in enumerate(rows) for n in answers(row)]
        check(folders[name], rows, tmp_path, TrainOn.each, each)
    else:
        whole = [(i, row, answers(row)) for i, row in enumerate(rows)]
        check(folders[name], rows, tmp_path, TrainOn.assistant, whole)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_trains_is_what_turns_add(name, folders, tmp_path):
    check_template(name, folders, tmp_path, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_trains_is_what_turns_add_in_500(name, folders, tmp_path):
    check_template(name, folders, tmp_path, 500)
