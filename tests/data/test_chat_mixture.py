"""Mixtures of conversations, prompts with completions and plain text: each as its source alone has it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from chat_cases import CHATML, conversations, tokenizer_folder
from data_cases import documents, jsonl, text_folder

from moetrain.data import TrainLoader, prepare
from moetrain.data.batch import IGNORE
from moetrain.data.chat.options import ChatData, PromptCompletionData
from moetrain.data.chat.settings import Broken, Overlong, TrainOn
from moetrain.data.options import (
    LocalData,
    MixtureData,
    MixturePart,
    SourceKind,
    TextFormat,
    TokenizerConfig,
    TokenizerKind,
)
from moetrain.data.rules import check_data
from moetrain.errors import UserError

OTHER = CHATML.replace("<|im_end|>\\n", "<|im_end|>")
SHARED = {"seq_len": 61, "val_fraction": 0.2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tokenizer, rows of both kinds, plain text and another template."""
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer_folder(folder / "tokenizer", CHATML)
    (folder / "other.jinja").write_text(OTHER)
    jsonl(folder / "talk.jsonl", [{"messages": row} for row in conversations(41, seed=1)])
    pairs = [{"prompt": f"hello {i}", "completion": " world fox" * (1 + i % 7)} for i in range(43)]
    jsonl(folder / "pairs.jsonl", pairs)
    text_folder(folder, documents(37), "text")
    return folder


def config(place, **changes):
    """``changes``: part -> settings of it that differ."""
    parts = {
        "talk": MixturePart(SourceKind.chat, 5.0, f"{place}/talk.jsonl", train_on=TrainOn.last),
        "pairs": MixturePart(SourceKind.prompt_completion, 2.0, f"{place}/pairs.jsonl"),
        "text": MixturePart(SourceKind.local, 1.0, f"{place}/text"),
    }
    parts |= {name: replace(parts[name], **given) for name, given in changes.items()}
    tokenizer = TokenizerConfig(TokenizerKind.file, path=f"{place}/tokenizer")
    return MixtureData(parts=parts, tokenizer=tokenizer, cache_dir=f"{place}/cache", **SHARED)


def alone(place, cls, **settings):
    tokenizer = TokenizerConfig(TokenizerKind.file, path=f"{place}/tokenizer")
    return prepare(cls(tokenizer=tokenizer, cache_dir=f"{place}/cache", **SHARED, **settings))


def test_each_part_has_the_windows_of_its_source_alone(place):
    mixed = prepare(config(place), seed=3)
    assert mixed.domains == ("pairs", "talk", "text")
    singles = [
        alone(place, PromptCompletionData, path=f"{place}/pairs.jsonl"),
        alone(place, ChatData, path=f"{place}/talk.jsonl", train_on=TrainOn.last),
        alone(place, LocalData, path=f"{place}/text"),
    ]
    for side in ("train", "val"):
        split, start = getattr(mixed, side), 0
        for number, single in enumerate(getattr(corpus, side) for corpus in singles):
            assert split.part_lengths[number] == len(single) > 0
            ids = np.arange(len(single))
            found, expected = split.rows(start + ids), single.rows(ids)
            for name in ("input_ids_BS", "labels_BS", "doc_ids_BS", "positions_BS", "valid_BS"):
                assert (getattr(found, name) == getattr(expected, name)).all(), name
            assert (found.byte_counts_BS == expected.byte_counts_BS).all()
            assert set(found.domain_ids_BS.flatten()) == {number}
            start += len(single)
        assert start == len(split)
    assert mixed.order.quotas == [256, 640, 128]
    assert mixed.tokenizer.template_files == singles[1].tokenizer.template_files


def test_a_resumed_mixture_goes_on_at_its_place(place):
    first, again = prepare(config(place), seed=3), prepare(config(place), seed=3)
    loader, resumed = (TrainLoader(corpus.train, corpus.order, 2, 6) for corpus in (first, again))
    steps = [loader.next_step() for _ in range(4)]
    resumed.load_state_dict({**loader.state_dict(), "samples": 18})
    for one, same in zip(steps[3], resumed.next_step(), strict=True):
        assert torch.equal(one.input_ids_BS, same.input_ids_BS)
        assert torch.equal(one.labels_BS, same.labels_BS)
        assert one.num_targets == same.num_targets == int((one.labels_BS != IGNORE).sum())
        assert one.num_targets < one.labels_BS.numel()


def test_overlong_is_each_part_s_own(place):
    jsonl(place / "long.jsonl", [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " fox" * n}]}
        for n in (*range(1, 30), 90, 95)
    ])  # fmt: skip
    given = {"path": f"{place}/long.jsonl"}
    cut, dropped = (prepare(config(place, talk={**given, "overlong": o})) for o in list(Overlong)[:2])
    assert cut.folder == dropped.folder
    assert cut.fingerprint != dropped.fingerprint
    sums = [sum(s.parts[1].sums.cut for s in (corpus.train, corpus.val)) for corpus in (cut, dropped)]
    assert sums[1] == 0 < sums[0]
    with pytest.raises(UserError, match=r"long\.jsonl, row 29: .* data\.parts\.talk\.overlong=truncate or"):
        prepare(config(place, talk={**given, "overlong": Overlong.refuse}))
    prepare(config(place, talk=given, pairs={"overlong": Overlong.refuse}))  # those are short


def test_the_run_s_template_is_that_of_all_conversations(place, caplog):
    given = {"chat_template": f"{place}/other.jinja"}
    assert prepare(config(place, talk=given)).tokenizer.template_files.templates == {"default": OTHER}
    two = config(place, talk=given)
    two.parts["more"] = replace(two.parts["talk"], chat_template=None, path=f"{place}/talk.jsonl")
    with caplog.at_level(logging.WARNING, "moetrain"):
        kept = prepare(two)
    assert kept.tokenizer.template_files.templates == {"default": CHATML}
    assert "data.parts.more, data.parts.talk: their chat templates differ" in caplog.text
    rows = {"path": f"{place}/talk.jsonl", "train_on": TrainOn.last}
    singles = [alone(place, ChatData, **rows), alone(place, ChatData, **rows, **given)]
    tokens = [corpus.train.num_tokens for corpus in singles]
    assert [kept.train.part_tokens[part] for part in (0, 2)] == tokens
    assert tokens[0] > tokens[1]


def test_one_conversation_is_trained_on_and_not_held_out(place):
    jsonl(place / "one.jsonl", [{"messages": conversations(1, seed=2, longest=1)[0]}])
    corpus = prepare(config(place, talk={"path": f"{place}/one.jsonl"}))
    assert (corpus.train.part_lengths[1], corpus.val.part_lengths[1]) == (1, 0)


def test_a_broken_row_names_the_part_s_option(place):
    row = {"messages": [{"role": "assistant", "content": "x"}]}
    good = {"messages": conversations(1, seed=2, longest=1)[0]}
    (place / "bad.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (good, row)))
    said = r"bad\.jsonl, row 1: .*data\.parts\.talk\.check_order=false .*data\.parts\.talk\.on_broken=skip"
    with pytest.raises(UserError, match=said):
        prepare(config(place, talk={"path": f"{place}/bad.jsonl"}))
    prepare(config(place, talk={"path": f"{place}/bad.jsonl", "on_broken": Broken.skip}))


REFUSED = [
    ("talk", {"path": None}, "data.parts.talk.path is not set: data.parts.talk.kind=chat needs one"),
    ("talk", {"prompt_key": "p"}, "data.parts.talk.prompt_key=p is not used by data.parts.talk.kind=chat"),
    ("talk", {"text_key": "t"}, "data.parts.talk.text_key=t is not used by data.parts.talk.kind=chat"),
    ("talk", {"domains": ["python"]}, "data.parts.talk.domains=['python'] is used by"),
    ("talk", {"format": TextFormat.text}, "data.parts.talk.format=text: data.parts.talk.kind=chat reads"),
    ("talk", {"template_date": "now"}, "data.parts.talk.template_date=now is no date"),
    ("talk", {"template_args": {"tools": 1}}, "data.parts.talk.template_args.tools is what a template gets"),
    ("talk", {"chat_template": "/no"}, "data.parts.talk.chat_template=/no is no file"),
    ("talk", {"max_row_chars": 0}, "data.parts.talk.max_row_chars=0 must be 1 or more"),
    ("pairs", {"train_on": TrainOn.all}, "train_on=all is not used by data.parts.pairs.kind=prompt_co"),
    ("text", {"train_on": TrainOn.last}, "train_on=last is not used by data.parts.text.kind=local: leave it"),
    ("text", {"overlong": Overlong.drop}, "overlong=drop is not used by data.parts.text.kind=local"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "given", "said"), REFUSED, ids=[f"{p} {min(g)}" for p, g, _ in REFUSED])
def test_what_does_not_fit_is_refused(place, part, given, said):
    with pytest.raises(UserError) as caught:
        check_data(config(place, **{part: given}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_names_the_part(place):
    plain = TokenizerConfig(TokenizerKind.bytes)
    with pytest.raises(UserError, match=r"no chat template .* data\.parts\.talk\.chat_template=FILE"):
        prepare(replace(config(place), tokenizer=plain))
