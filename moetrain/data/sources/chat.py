"""Source ``chat``: rows of messages; each is one document, or one for every turn that trains."""

from __future__ import annotations

from collections.abc import Iterator

from moetrain.data.chat.files import TemplateFiles
from moetrain.data.chat.messages import Conversation, RowError, check_order, conversation
from moetrain.data.chat.options import ChatData
from moetrain.data.chat.turns import Example, examples
from moetrain.data.chat.words import Words
from moetrain.data.sources import parquet_rows
from moetrain.data.sources.turns import Row, TurnsSource

_SYSTEM = "system"  # a column of ShareGPT's rows
_MESSAGES = ("messages", "conversations")


class ChatSource(TurnsSource[Conversation]):
    """Rows of messages; each is one document, or one for every turn that trains."""

    def __init__(
        self, cfg: ChatData, words: Words, files: TemplateFiles, tokenizer: str, key: str = "data"
    ) -> None:
        super().__init__(cfg, words, files, tokenizer, key)
        self.cfg = cfg
        self.template()

    @property
    def renders(self) -> bool:
        return True

    def _columns(self) -> tuple[dict[str, str], tuple[str, ...]]:
        key = self.cfg.messages_key
        needed = {} if key is None else {key: f"{self.key}.messages_key"}
        return needed, (*(_MESSAGES if key is None else ()), self.cfg.tools_key, _SYSTEM)

    def _content(self, row: Row) -> Conversation:
        key = self.cfg.messages_key or next((name for name in _MESSAGES if name in row), None)
        if key is None or key not in row:
            wanted = " or ".join(map(repr, _MESSAGES)) if key is None else repr(key)
            raise RowError(
                f"it has no {wanted} ({self.key}.messages_key); it has: {parquet_rows.listed(list(row))}"
            )
        found = conversation(row[key], row.get(self.cfg.tools_key), row.get(_SYSTEM))
        if self.cfg.check_order:
            check_order(found.roles, self.key)
        return found

    def _replaced(self, content: Conversation, plain: object) -> Conversation:
        return content.with_plain(plain)

    def _examples(self, content: Conversation) -> Iterator[Example]:
        return examples(content, self.template(content.tools is not None), self.cfg.train_on)
