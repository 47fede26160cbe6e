"""Source ``prompt_completion``: rows of two columns, of which the second trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moetrain.data.chat.files import TemplateFiles
from moetrain.data.chat.messages import Conversation, RowError, check_order, conversation
from moetrain.data.chat.options import PromptCompletionData
from moetrain.data.chat.settings import TrainOn
from moetrain.data.chat.turns import Example, examples
from moetrain.data.chat.words import Words
from moetrain.data.sources import parquet_rows
from moetrain.data.sources.turns import Row, TurnsSource


@dataclass(frozen=True)
class _Pair:
    prompt: str
    completion: str

    @property
    def plain(self) -> list[object]:
        return [self.prompt, self.completion]


class PromptCompletionSource(TurnsSource["Conversation | _Pair"]):
    """Two columns: texts, which are put together as they are and end with the tokenizer's word for it.

    Or lists of messages, of which the completion's answers train.
    """

    def __init__(
        self, cfg: PromptCompletionData, words: Words, files: TemplateFiles, tokenizer: str, key: str = "data"
    ) -> None:
        super().__init__(cfg, words, files, tokenizer, key)
        self.cfg = cfg

    def _columns(self) -> tuple[dict[str, str], tuple[str, ...]]:
        keys = {
            self.cfg.prompt_key: f"{self.key}.prompt_key",
            self.cfg.completion_key: f"{self.key}.completion_key",
        }
        return keys, (self.cfg.tools_key,)

    def _content(self, row: Row) -> Conversation | _Pair:
        prompt, completion = (self._value(row, key) for key in self._columns()[0].items())
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion:
                raise RowError(f"its {self.cfg.completion_key!r} is empty")
            return _Pair(prompt, completion)
        if not isinstance(prompt, list) or not isinstance(completion, list):
            kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
            raise RowError(f"its prompt and completion are {kinds}; both are text, or both lists of messages")
        first, second = conversation(prompt, row.get(self.cfg.tools_key)), conversation(completion, None)
        if self.cfg.check_order:
            check_order(first.roles + second.roles, self.key)
        wishes = [
            role == "assistant" if wish is None else wish
            for role, wish in zip(second.roles, second.trains, strict=True)
        ]
        trains = (*(wish or False for wish in first.trains), *wishes)
        return Conversation(first.messages + second.messages, first.tools, trains)

    def _value(self, row: Row, key: tuple[str, str]) -> object:
        name, option = key
        if name not in row:
            raise RowError(f"it has no {name!r} ({option}); it has: {parquet_rows.listed(list(row))}")
        if row[name] is None:
            raise RowError(f"its {name!r} is null")
        return row[name]

    def _replaced(self, content: Conversation | _Pair, plain: object) -> Conversation | _Pair:
        if isinstance(content, Conversation):
            return content.with_plain(plain)
        assert isinstance(plain, list)
        return _Pair(*plain)

    def _examples(self, content: Conversation | _Pair) -> Iterator[Example]:
        if isinstance(content, Conversation):
            return examples(content, self.template(content.tools is not None), TrainOn.assistant)
        before = (self._words.bos or "") + content.prompt
        text = before + content.completion + self._words.eos
        return iter([Example(text, ((len(before), len(text)),))])
