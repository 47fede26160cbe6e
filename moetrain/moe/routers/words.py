"""MoWE: the expert is a function of the word that a token ends (dos Santos et al. 2023, arXiv:2311.10768).

Shapes: T tokens, B sequences of S, E experts, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from moetrain.moe.assign import from_token_choice
from moetrain.moe.combine import Combine
from moetrain.moe.context import RouterContext
from moetrain.moe.options import RouterConfig
from moetrain.moe.routers.base import Router, register
from moetrain.moe.routers.hash_tables import balanced_table, is_token_id, read_counts
from moetrain.moe.routers.hashed import expert_keys
from moetrain.moe.routing import Routing
from moetrain.ops.counter import mix

_MAX_LENGTH = 8  # tokens of a word
_START = 0x30E


@dataclass(frozen=True)
class WordsOptions(RouterConfig):
    name: str = "words"
    # a JSON file {"id id ...": count} of words as token ids; null: each token id is a word
    words: Optional[str] = None
    salt: int = 0  # other experts for what is no word of the file

    def combine(self, num_experts: int) -> Combine:
        return Combine(top_k=1, even_weight=1.0, total=1.0, drops=self.drops)


@register("words", WordsOptions, "dos Santos et al. 2023, arXiv:2311.10768", "one expert of a word")
class WordsRouter(Router):
    """Each token goes to the expert of the longest word of the file that ends with it, within its document.

    Words get experts by falling count so that loads differ by the largest count at most; a token that ends no
    word goes by a hash of its id. The weight is 1. The table (``keys_V``, sorted hashes of the words, and
    ``experts_V``) is built once from the file, and is part of the state. In generation the context's memory
    has the tokens before.

    Raises ValueError where the context has no token ids, and for a file that cannot be read or is malformed.
    """

    options: WordsOptions
    top_k = 1
    has_scores = has_logits = False
    keys_V: Tensor
    experts_V: Tensor

    def __init__(self, d_model: int, num_experts: int, options: WordsOptions) -> None:
        super().__init__(d_model, num_experts, options)
        self.longest = 0
        if options.words is None:
            return
        counts = read_words(options.words)
        words = list(counts)
        self.longest = max(map(len, words))
        table = balanced_table(dict(enumerate(counts.values())), num_experts)
        table += [-1] * (len(words) - len(table))
        keys_V = torch.stack([word_key([torch.tensor(i) for i in reversed(word)]) for word in words])
        keys_V, order_V = keys_V.sort()
        if bool((keys_V[1:] == keys_V[:-1]).any()):
            raise ValueError(f"router.words={options.words} has two words of one hash: leave one of them out")
        self.register_buffer("keys_V", keys_V)
        self.register_buffer("experts_V", torch.tensor(table)[order_V])

    def route(self, x_TD: Tensor, ctx: RouterContext) -> Routing:
        if ctx.token_ids_T is None:
            raise ValueError("router=words needs token ids: give the layer a RouterContext with token_ids_T")
        ids_T = ctx.token_ids_T.to(torch.int64)
        expert_T = expert_keys(ids_T, self.num_experts, self.options.salt).argmax(-1)
        for key_T, whole_T in self._endings(ids_T, ctx):
            place_T = torch.searchsorted(self.keys_V, key_T).clamp(max=len(self.keys_V) - 1)
            found_T = self.experts_V[place_T]
            known_T = whole_T & (self.keys_V[place_T] == key_T) & (found_T >= 0)
            expert_T = torch.where(known_T, found_T, expert_T)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weights_T1 = torch.ones(len(ids_T), 1, dtype=dtype, device=ids_T.device)
        return from_token_choice(expert_T[:, None], weights_T1, ctx, self.num_experts)

    def _endings(self, ids_T: Tensor, ctx: RouterContext) -> list[tuple[Tensor, Tensor]]:
        """The hash of the last 1, 2, ... tokens at each token, and whether its document has as many."""
        batch, seq = ctx.batch, ctx.seq
        columns = [ids_T, torch.ones_like(ids_T), torch.zeros_like(ids_T)]
        if ctx.valid_T is not None:
            columns[1] = ctx.valid_T.to(torch.int64)
        if ctx.doc_ids_T is not None:
            columns[2] = ctx.doc_ids_T
        kept_BN3 = torch.stack(columns, -1).view(batch, seq, 3)
        if self.longest and ctx.memory is not None:
            kept_BN3 = ctx.memory.extend("words", kept_BN3)
        endings, parts, whole_BS = [], [], torch.ones(batch, seq, dtype=torch.bool, device=ids_T.device)
        here_BS3 = kept_BN3[:, kept_BN3.shape[1] - seq :]
        for back in range(self.longest):
            earlier_BN3 = torch.nn.functional.pad(kept_BN3, (0, 0, back, 0))[:, : kept_BN3.shape[1]]
            earlier_BS3 = earlier_BN3[:, kept_BN3.shape[1] - seq :]
            same_BS = (earlier_BS3[..., 1] == 1) & (earlier_BS3[..., 2] == here_BS3[..., 2])
            whole_BS = whole_BS & same_BS
            parts.append(earlier_BS3[..., 0].reshape(-1))
            endings.append((word_key(parts), whole_BS.reshape(-1)))
        return endings


def word_key(ids: list[Tensor]) -> Tensor:
    """The hash of a word, int64, from its tokens' ids, the last one first."""
    key = torch.full_like(ids[0], _START)
    for i in ids:
        key = mix(key + mix(i + len(ids)))
    return key


def read_words(path: str) -> dict[tuple[int, ...], int]:
    """Token ids -> count, of a JSON object whose keys are ids with blanks between, and whose values count.

    Raises ValueError, in one line, for a file that cannot be read or holds anything else.
    """
    counts = read_counts(path, "words", "count", "token ids")
    words: dict[tuple[int, ...], int] = {}
    for key, count in counts.items():
        ids = key.split(" ")
        if len(ids) > _MAX_LENGTH or not all(is_token_id(i) and str(int(i)) == i for i in ids):
            raise ValueError(
                f"router.words={path}: {key[:40]!r} must be 1 to {_MAX_LENGTH} token ids, one blank between"
            )
        words[tuple(map(int, ids))] = count
    return words
