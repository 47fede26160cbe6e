"""Text, one token at a time: greedy or sampled, with a cache of keys and values.

Shapes: S prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moetrain.errors import UserError
from moetrain.models.cache import KVCache
from moetrain.models.decoder import Decoder
from moetrain.moe import RoutingRecord


@torch.no_grad()
def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
    ended: Callable[[list[int]], bool] | None = None,
    observe: Callable[[Tensor, dict[int, RoutingRecord]], None] | None = None,
) -> list[int]:
    """The new tokens only; the last one is ``eos_id`` where the model ended by itself, or that
    after which ``ended`` is true of them all.

    ``temperature`` 0 is greedy. ``top_k`` keeps the k likeliest tokens, ``top_p`` the fewest likeliest ones
    that hold that much probability after the temperature (both: k first). Equal seeds give equal text: the
    draw is made on the CPU by its own generator. The model runs in evaluation mode and is left as it was.
    ``observe`` gets the tokens [1, S] of each pass and what its MoE layers told, by their places.
    Raises UserError for an empty prompt, ids outside the vocabulary, or an option out of its range.
    """
    _check(model, prompt_ids, max_new_tokens, temperature, top_k, top_p)
    device = model.embed_VD.device
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(model.cfg.num_layers, len(prompt_ids) + max_new_tokens)
    ids_BS = torch.tensor([list(prompt_ids)], device=device)
    new_ids: list[int] = []
    was_training = model.training
    model.eval()
    try:
        while len(new_ids) < max_new_tokens:
            output = model(ids_BS, cache=cache)
            if observe is not None:
                observe(ids_BS, output.records)
            logits_V = model.logits(output.hidden_BSD[0, -1])
            new_ids.append(choose(logits_V, temperature, top_k, top_p, generator))
            if new_ids[-1] == eos_id or (ended is not None and ended(new_ids)):
                break
            ids_BS = torch.tensor([new_ids[-1:]], device=device)
    finally:
        model.train(was_training)
    return new_ids


def choose(
    logits_V: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    """One token id: the largest logit (the first of equals) or a draw from what top_k and top_p leave."""
    logits_V = logits_V.to("cpu", torch.float64)
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V, ids_V = (logits_V / temperature).sort(descending=True, stable=True)
    if top_k is not None:
        logits_V, ids_V = logits_V[:top_k], ids_V[:top_k]
    p_V = logits_V.softmax(0)
    if top_p is not None:
        before_V = p_V.cumsum(0) - p_V  # a token stays while those likelier than it hold less than top_p
        p_V = p_V.where((before_V < top_p) | (torch.arange(len(p_V)) == 0), 0.0)
    return int(ids_V[torch.multinomial(p_V, 1, generator=generator)])


def _check(
    model: Decoder,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if len(prompt_ids) == 0:
        raise UserError(
            "prompt is empty: give at least one token, the tokenizer's end-of-text for a new text"
        )
    if min(prompt_ids) < 0 or max(prompt_ids) >= model.vocab_size:
        raise UserError(
            f"prompt has token ids from {min(prompt_ids)} to {max(prompt_ids)}, but the model knows "
            f"{model.vocab_size} tokens: use the tokenizer that it was trained with"
        )
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature} must be at least 0 (0 is greedy) and finite")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k} must be at least 1, or null for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} must lie in (0, 1], or null for all tokens")
