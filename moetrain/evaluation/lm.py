"""A decoder and its tokenizer as a model of lm-eval.

Shapes: B requests of a batch, S positions, D model, V vocabulary, n scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from moetrain.data import IGNORE, Tokenizer
from moetrain.models.generate import generate
from moetrain.moe import RouterContext
from moetrain.train.task import NextToken

_ROWS = 1024  # logits formed at once
_NEW_TOKENS = 256  # where a task says nothing

Pair = tuple[list[int], list[int]]  # tokens given, tokens to score


class DecoderLM(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed
    """End-of-text stands where nothing is given; texts longer than ``max_length`` lose their start."""

    def __init__(self, task: NextToken, tokenizer: Tokenizer, max_length: int, batch_size: int) -> None:
        super().__init__()
        self.task, self.max_length, self.batch_size = task.eval(), max_length, batch_size
        self.text = tokenizer  # ``tokenizer`` would have to be one of transformers

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def device(self) -> torch.device:
        return self.task.model.embed_VD.device

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.text.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            tokens = self.text.encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, 1)
            scored = self._score([make_disjoint_window(window) for window in windows])
            totals.append(sum(logprob for logprob, _ in scored))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._write(*request.args) for request in requests]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(given or [self.eot_token_id], asked) for _, given, asked in requests])

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """(log-probability of the tokens asked for, whether each of them is the likeliest), in order."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))  # of like length together
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            found |= zip(chosen, self._score_batch([pairs[i] for i in chosen]), strict=True)
        return [found[i] for i in range(len(pairs))]

    @torch.no_grad()
    def _score_batch(self, pairs: Sequence[Pair]) -> Iterator[tuple[float, bool]]:
        ids_BS, labels_BS, valid_BS = self._padded(pairs)
        ctx = replace(
            RouterContext.default(ids_BS.shape[0], ids_BS.shape[1], self.device), valid_T=valid_BS.view(-1)
        )
        asked_BS = labels_BS != IGNORE
        hidden_nD = self._hidden(ids_BS, ctx)[asked_BS]
        logprob_n, best_n = self._judged(hidden_nD, labels_BS[asked_BS])
        counts = asked_BS.sum(1).tolist()
        for logprobs, best in zip(logprob_n.split(counts), best_n.split(counts), strict=True):
            yield float(logprobs.sum()), bool(best.all())

    def _padded(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels and what is no padding, [B, S]; padding is on the right, where no token looks."""
        rows = [((given + asked)[-self.max_length - 1 :], len(asked)) for given, asked in pairs]
        shape = (len(rows), max(1, *(len(tokens) - 1 for tokens, _ in rows)))
        ids_BS = torch.full(shape, self.eot_token_id)
        labels_BS, valid_BS = torch.full(shape, IGNORE), torch.zeros(shape, dtype=torch.bool)
        for row, (tokens, asked) in enumerate(rows):
            length, scored = len(tokens) - 1, min(asked, len(tokens) - 1)
            ids_BS[row, :length] = torch.tensor(tokens[:-1])
            labels_BS[row, length - scored : length] = torch.tensor(tokens[len(tokens) - scored :])
            valid_BS[row, :length] = True
        return ids_BS.to(self.device), labels_BS.to(self.device), valid_BS.to(self.device)

    def _hidden(self, ids_BS: Tensor, ctx: RouterContext) -> Tensor:
        hidden_BSD: Tensor = self.task.model(ids_BS, ctx).hidden_BSD
        return hidden_BSD

    def _judged(self, hidden_nD: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        """Each label's log-probability, and whether no token is likelier; by chunks of logits."""
        logprobs, best = [hidden_nD.new_zeros(0)], [labels_n.new_zeros(0, dtype=torch.bool)]
        for rows_cD, labels_c in zip(hidden_nD.split(_ROWS), labels_n.split(_ROWS), strict=True):
            logits_cV = self.task.model.logits(rows_cD)
            logits_cV = logits_cV.to(torch.promote_types(logits_cV.dtype, torch.float32))
            logprobs.append(logits_cV.log_softmax(-1).gather(-1, labels_c[:, None]).squeeze(-1))
            best.append(logits_cV.argmax(-1) == labels_c)
        return torch.cat(logprobs), torch.cat(best)

    def _write(self, context: str, options: dict[str, Any]) -> str:
        """What the model writes after ``context``, up to the first of the task's stops."""
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = int(options.get("max_gen_toks") or _NEW_TOKENS)
        given = self.text.encode(context)[-max(1, self.max_length - most) :] or [self.eot_token_id]

        def ended(new_ids: list[int]) -> bool:
            text = self.text.decode(new_ids)
            return any(stop in text for stop in stops)

        new_ids = generate(
            self.task.model,
            given,
            most,
            temperature=float(options.get("temperature") or 1.0) if options.get("do_sample") else 0.0,
            top_k=options.get("top_k") or None,
            top_p=options.get("top_p"),
            eos_id=self.eot_token_id,
            ended=ended,
        )
        text = self.text.decode(new_ids)
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
