"""Generation: the cache gives what the full forward pass gives, and draws follow their distribution.

Shapes: B batch, S sequence, V vocabulary.
"""

from typing import Any

import pytest
import torch
from model_cases import VOCAB, decoder, tokens
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models import Decoder, KVCache, generate
from moetrain.models.generate import choose
from moetrain.models.options import QKNorm
from moetrain.models.rope_options import RopeKind, RopeScaling


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("pieces", [[1] * 11, [5, 1, 1, 4], [3, 8], [11]])
def test_cached_pieces_equal_the_full_forward_pass(window: int | None, pieces: list[int]) -> None:
    model, ids = decoder(sliding_window=window, first_dense=1), tokens(3, 11)
    cache, parts = KVCache(3, 11), []
    for piece in ids.split(pieces, dim=1):
        parts.append(model(piece, cache=cache).hidden_BSD)
    assert cache.length == 11
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).hidden_BSD, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True, "rope_scaling": RopeScaling(RopeKind.yarn, factor=3.0, original_max_positions=5)},
        {"qk_norm": QKNorm.head_after_rope, "rope_interleaved": True, "out_bias": True},
        {"head_dim": 12, "rope_fraction": 0.5, "first_dense": 1, "mlp_bias": True},
    ],
    ids=["scaled", "interleaved", "in part"],
)
def test_cached_pieces_however_a_head_turns(changes: dict[str, Any]) -> None:
    model, ids = decoder(**changes), tokens(3, 11)
    cache = KVCache(3, 11)
    parts = [model(piece, cache=cache).hidden_BSD for piece in ids.split([4, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).hidden_BSD, rtol=1e-11, atol=1e-11)


def test_a_cache_refuses_more_than_it_holds_and_documents() -> None:
    model, cache = decoder(), KVCache(3, 4)
    with pytest.raises(ValueError, match="holds 4 tokens; 5"):
        model(tokens(1, 5), cache=cache)
    with pytest.raises(ValueError, match="do not go together"):
        model(tokens(1, 2), doc_ids_BS=torch.zeros(1, 2).long(), cache=cache)


def uncached(model: Decoder, prompt: list[int], new: int) -> list[int]:
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model.logits(model(torch.tensor([ids])).hidden_BSD[0, -1]).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("window", [None, 3])
def test_greedy_equals_the_uncached_argmax(window: int | None) -> None:
    model, prompt = decoder(sliding_window=window), tokens(1, 5)[0].tolist()
    expected = uncached(model, prompt, 13)
    assert generate(model, prompt, 13, temperature=0) == expected
    assert len(set(expected)) > 2
    assert generate(model, prompt, 13, temperature=2.0, top_k=1) == expected
    assert generate(model, prompt, 13, temperature=2.0, top_p=1e-9) == expected


def test_it_ends_with_eos_and_leaves_the_mode_alone() -> None:
    model, prompt = decoder(), tokens(1, 5)[0].tolist()
    text = uncached(model, prompt, 13)
    end = text.index(text[4])
    assert model.train().training
    assert generate(model, prompt, 13, temperature=0, eos_id=text[4]) == text[: end + 1]
    assert model.training
    stop = next(n for n in range(2, 13) if text[n - 2 : n] == text[2:4])
    assert generate(model, prompt, 13, temperature=0, ended=lambda ids: ids[-2:] == text[2:4]) == text[:stop]
    assert generate(model.eval(), prompt, 0) == []
    assert not model.training


def test_seeds_repeat_and_differ() -> None:
    model, prompt = decoder(), tokens(1, 5)[0].tolist()
    texts = [generate(model, prompt, 17, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    torch.manual_seed(99)
    assert texts[0] == texts[1] == generate(model, prompt, 17, temperature=1.5, seed=1)
    assert texts[0] != texts[2]


def frequencies(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    draws = [choose(logits, temperature, top_k, top_p, generator) for _ in range(4000)]
    return torch.bincount(torch.tensor(draws), minlength=len(logits)) / 4000


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [
        (1.0, None, None, [0, 1, 2, 3, 4]),
        (1.7, None, None, [0, 1, 2, 3, 4]),
        (1.0, 3, None, [1, 3, 4]),
        (1.0, None, 0.65, [3, 4]),  # 0.4 < 0.65, 0.4 + 0.3 >= 0.65
        (1.0, None, 0.75, [1, 3, 4]),
        (1.0, 2, 0.5, [3]),  # renormalised over two: 0.4 / 0.7 >= 0.5
    ],
)
def test_draws_follow_the_restricted_distribution(
    temperature: float, top_k: int | None, top_p: float | None, kept: list[int]
) -> None:
    logits = torch.tensor([0.05, 0.15, 0.1, 0.4, 0.3]).log()
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), (logits[kept] / temperature).softmax(0))
    assert (frequencies(logits, temperature, top_k, top_p) - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt_ids": []}, "prompt is empty"),
        ({"prompt_ids": [3, VOCAB]}, f"knows {VOCAB} tokens"),
        ({"prompt_ids": [-1]}, "from -1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        generate(decoder(), **{"prompt_ids": [1], "max_new_tokens": 1, **arguments})
    assert "\n" not in str(error.value)
