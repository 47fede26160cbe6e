"""MoWE: the longest word that ends at a token, by a loop; its table; generation; files that are refused.

Shapes: T tokens, B sequences of S, E experts.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from router_cases import chosen

from moetrain.models.cache import KVCache
from moetrain.models.decoder import Decoder
from moetrain.models.options import ModelConfig
from moetrain.moe import RouterContext, build_router
from moetrain.moe.options import ExpertsConfig
from moetrain.moe.routers.words import WordsOptions, read_words

E, B, S = 5, 3, 23
T = B * S
WORDS = {"1": 9, "2": 4, "1 2": 7, "2 1": 3, "1 2 1": 5, "3 3 3 3": 2, "4": 0, "0 1": 6}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps(WORDS))
    return str(path)


def table() -> dict[tuple[int, ...], int]:
    """Greedily: by falling count, to the expert with the least so far; words that never occur have none."""
    loads, found = [0] * E, {}
    for word, count in sorted(WORDS.items(), key=lambda item: -item[1]):
        if count:
            expert = min(range(E), key=lambda e: loads[e])
            found[tuple(map(int, word.split()))] = expert
            loads[expert] += count
    assert max(loads) - min(loads) <= max(WORDS.values())
    return found


def ids() -> torch.Tensor:
    return torch.randint(0, 6, (T,), generator=torch.Generator().manual_seed(2)).clamp(max=4)


def context() -> RouterContext:
    ids_T = ids()
    ids_T[8:10] = torch.tensor([1, 2])  # the second begins a document
    ids_T[30:36] = 3
    ids_T[56:59] = torch.tensor([1, 2, 1])
    return replace(
        RouterContext.default(B, S), token_ids_T=ids_T, valid_T=torch.arange(T) % 11 != 6,
        doc_ids_T=(torch.arange(T) % S >= 9).long(),
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("divided", [True, False])
def test_the_longest_word_that_ends_here(file, divided, training):
    router = build_router("words", d_model=3, num_experts=E, words=file).train(training)
    hashed = build_router("hash", d_model=3, num_experts=E, top_k=1)
    ctx = context() if divided else replace(context(), valid_T=None, doc_ids_T=None)
    routing = router(torch.zeros(T, 3), ctx)
    routing.check()
    assert (routing.assignment.weights_N == 1).all()
    fallback_T = chosen(hashed(torch.zeros(T, 3), ctx), T).double().argmax(1)
    found, expected, lengths = chosen(routing, T), table(), set()
    for t in range(T):
        if ctx.valid_T is not None and not ctx.valid_T[t]:
            assert not found[t].any()
            continue
        expert, word = int(fallback_T[t]), []
        for u in range(t, t - t % S - 1, -1):
            if divided and not (ctx.valid_T[u] and ctx.doc_ids_T[u] == ctx.doc_ids_T[t]):
                break
            word.insert(0, int(ctx.token_ids_T[u]))
            if tuple(word) in expected:
                expert = expected[tuple(word)]
                lengths.add(len(word))
        assert found[t].nonzero().flatten().tolist() == [expert]
    assert lengths == {1, 2, 3, 4}


def test_without_a_file_each_id_is_a_word():
    ctx = context()
    ours = build_router("words", d_model=3, num_experts=E, salt=4)(torch.zeros(T, 3), ctx)
    hashed = build_router("hash", d_model=3, num_experts=E, top_k=1, salt=4)(torch.zeros(T, 3), ctx)
    assert torch.equal(chosen(ours, T), chosen(hashed, T))


def test_the_table_is_part_of_the_state(file):
    one, ctx = build_router("words", d_model=3, num_experts=E, words=file), context()
    other = build_router("words", d_model=3, num_experts=E, words=file)
    with torch.no_grad():
        one.experts_V.copy_((one.experts_V + 1) % E)
    other.load_state_dict(one.state_dict())
    assert torch.equal(chosen(one(torch.zeros(T, 3), ctx), T), chosen(other(torch.zeros(T, 3), ctx), T))


def test_generation_knows_the_tokens_before(file):
    torch.manual_seed(0)
    cfg = ModelConfig(d_model=12, num_layers=2, num_heads=2, d_ff=8, d_ff_expert=6, num_experts=E)
    model = Decoder(cfg, WordsOptions(words=file), ExpertsConfig(), 7).double().eval()
    ids_BS = ids()[None, :S]
    cache = KVCache(2, S)
    pieces = [model(part, cache=cache) for part in (ids_BS[:, :2], *ids_BS[:, 2:].split(1, 1))]
    for layer, record in model(ids_BS).records.items():
        demand_PE = torch.stack([piece.records[layer].demand_E for piece in pieces])
        assert demand_PE.sum(0).tolist() == record.demand_E.tolist()
    hidden_BSD = torch.cat([piece.hidden_BSD for piece in pieces], 1)
    torch.testing.assert_close(hidden_BSD, model(ids_BS).hidden_BSD, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON text"),
        ("{}", "must hold an object"),
        ('["1"]', "must hold an object"),
        ('{"1  2": 3}', "'1  2' must be 1 to 8 token ids"),
        ('{"1 x": 3}', "'1 x' must be 1 to 8 token ids"),
        ('{"01": 3}', "'01' must be 1 to 8 token ids"),
        ('{"1 1 1 1 1 1 1 1 1": 3}', "must be 1 to 8 token ids"),
        ('{"1": -1}', "'1' must have a count from 0"),
        ('{"1": 1.5}', "'1' must have a count from 0"),
    ],
)
def test_a_file_that_is_malformed_is_one_line(tmp_path, text, words):
    path = tmp_path / "words.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        read_words(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"router\.words=/nowhere"):
        build_router("words", d_model=3, num_experts=E, words="/nowhere")
