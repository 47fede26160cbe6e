"""What sources of rows share whose text trains in part: ``chat`` and ``prompt_completion``."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np

from moetrain.data.chat.files import TemplateFiles, read_template
from moetrain.data.chat.left_out import LeftOut
from moetrain.data.chat.messages import RowError
from moetrain.data.chat.options import TurnsData
from moetrain.data.chat.settings import SpecialWords
from moetrain.data.chat.template import ChatTemplate
from moetrain.data.chat.turns import Example
from moetrain.data.chat.words import Hider, Words, texts_of
from moetrain.data.documents import Document, Marks, Part, Source, content_key, digest_of
from moetrain.data.options import TextFormat
from moetrain.data.shards import TokenStream
from moetrain.data.sources import json_rows, parquet_rows
from moetrain.data.sources.local import format_of
from moetrain.data.sources.paths import find_files, identity
from moetrain.errors import UserError

DOMAIN = "chat"
_VERSION = 1  # of how rows become text
_ELSEWHERE = ("seq_len", "tokenizer", "val_fraction", "cross_document_attention", "reset_positions")
_NOT_TEXT = (*_ELSEWHERE, "cache_dir", "path", "overlong", "chat_template")

Row = dict[str, object]
log = logging.getLogger("moetrain.data")


class _Content(Protocol):
    """What a row says. ``plain``: all its texts, as plain JSON."""

    @property
    def plain(self) -> list[object]: ...


C = TypeVar("C", bound=_Content)


class TurnsSource(Generic[C]):
    """What both sources share. ``files``: the tokenizer's templates; ``tokenizer`` names it in messages.

    ``key``: where the settings of ``cfg`` stand, for messages: ``data``, or a part of a mixture.

    Raises UserError where a template is missing or no Jinja, for a path that matches nothing, and, unless
    they are skipped, for the first row that cannot be used.
    """

    def __init__(
        self, cfg: TurnsData, words: Words, files: TemplateFiles, tokenizer: str, key: str = "data"
    ) -> None:
        if cfg.chat_template is not None:
            text = read_template(Path(cfg.chat_template).expanduser())
            files = TemplateFiles({"default": text}, files.words)
        self.template_files = files
        self._turns, self._words, self._tokenizer, self.key = cfg, words, tokenizer, key
        self._hider = Hider(words.special)
        self._templates: dict[str, ChatTemplate] = {}
        self._told = False  # documents are read several times
        self.files = find_files(cfg.path, f"{key}.path")

    @property
    def renders(self) -> bool:
        """Whether its rows go through the chat template, as far as can be told before they are read."""
        return self._turns.chat_template is not None

    @property
    def label(self) -> str:
        return f"{self.key}.path={self._turns.path}"

    def fingerprint(self) -> str:
        listing = [
            (str(file.absolute()), identity(file))
            for file in find_files(self._turns.path, f"{self.key}.path")
        ]
        settings = {name: repr(value) for name, value in asdict(self._turns).items() if name not in _NOT_TEXT}
        files = self.template_files
        templates, words = sorted(files.templates.items()), sorted(files.words.items())
        special = sorted(self._words.special), self._words.eos, self._words.bos
        return digest_of("turns", _VERSION, sorted(settings.items()), templates, words, special, listing)

    def documents(self) -> Iterator[Document]:
        left_out = LeftOut(self.label, self._turns.on_broken, self._told, self.key)
        for index, file in enumerate(self.files):
            for number, row in self._rows(file, left_out):
                where = f"{file}, row {number}"
                try:
                    found = self._documents(row, index, number, where, left_out)
                except RowError as error:
                    left_out.broken(UserError(f"{where}: {error}"))
                except RecursionError:
                    left_out.broken(UserError(f"{where}: it is nested too deeply"))
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
                else:
                    left_out.used += 1
                    yield from found
        left_out.finish()
        self._told = True

    def _rows(self, file: Path, left_out: LeftOut) -> Iterator[tuple[int, Row]]:
        format = format_of(file) if self._turns.format is TextFormat.auto else self._turns.format
        if format is TextFormat.text:
            raise UserError(
                f"{file} is plain text; rows of {self._turns.source} are read from .jsonl, .json and "
                f".parquet, or what {self.key}.format says"
            )
        if format is TextFormat.jsonl:
            return json_rows.numbered_rows(file, left_out.broken)
        needed, optional = self._columns()
        if self._turns.domain_key is not None:
            needed = needed | {self._turns.domain_key: f"{self.key}.domain_key"}
        rows = parquet_rows.numbered_rows(file, needed, optional, left_out.broken)
        return ((number, {name: _without_nulls(each) for name, each in row.items()}) for number, row in rows)

    def _documents(self, row: Row, index: int, number: int, where: str, left_out: LeftOut) -> list[Document]:
        content = self._content(row)
        key = content_key(json.dumps(content.plain, sort_keys=True, default=str).encode())
        if found := self._special_words(content):
            left_out.special(found, where)
            content = self._replaced(content, self._hider.hide(content.plain))
        domain = self._domain(row)
        return [
            Document(
                self._hider.restore(text),
                domain,
                Marks(trained, self._hider.control(text), key, index, number),
            )
            for text, trained in self._examples(content)
        ]

    def _domain(self, row: Row) -> str:
        key = self._turns.domain_key
        if key is None:
            return DOMAIN
        if key not in row:
            raise RowError(
                f"it has no {key!r} ({self.key}.domain_key); it has: {parquet_rows.listed(list(row))}"
            )
        return str(row[key]).encode(errors="replace").decode()

    def _special_words(self, content: C) -> str | None:
        """The first special word of the text that is to stay text. Raises RowError for what is too long."""
        size, most = sum(map(len, texts_of(content.plain))), self._turns.max_row_chars
        if size > most:
            raise RowError(f"it has {size:,} characters, more than {self.key}.max_row_chars={most:,}")
        found = self._hider.found(content.plain)
        if not found or self._turns.special_words is SpecialWords.control:
            return None
        if self._turns.special_words is SpecialWords.refuse:
            raise RowError(
                f"its text has the tokenizer's special word {found[0]!r} ({self.key}.special_words=refuse)"
            )
        return found[0]

    def template(self, tools: bool = False) -> ChatTemplate:
        """For conversations with or without tools; each is compiled once."""
        text = self.template_files.chosen(tools)
        if text is None:
            raise UserError(
                f"{self._tokenizer} has no chat template (chat_template.jinja, or chat_template in its "
                f"tokenizer_config.json): give the file of one, {self.key}.chat_template=FILE"
            )
        if text not in self._templates:
            label = self._turns.chat_template or f"the chat template of {self._tokenizer}"
            today = date.fromisoformat(self._turns.template_date)
            words = {"eos_token": self._words.eos} | self.template_files.words
            args = self._turns.template_args
            self._templates[text] = ChatTemplate(text, label, words, args, today, self.key)
        return self._templates[text]

    def _columns(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """(columns that Parquet files must have, with their options; columns that are read if there)."""
        raise NotImplementedError

    def _content(self, row: Row) -> C:
        raise NotImplementedError

    def _replaced(self, content: C, plain: object) -> C:
        raise NotImplementedError

    def _examples(self, content: C) -> Iterator[Example]:
        raise NotImplementedError


def common_templates(parts: Sequence[Part]) -> TemplateFiles | None:
    """The chat template that the run goes on with: the one of all its conversations; None: the tokenizer's.

    Warns where they have several.
    """
    found = {
        part.key: part.source.template_files
        for part in parts
        if isinstance(part.source, TurnsSource) and part.source.renders
    }
    first = next(iter(found.values()), None)
    if all(files == first for files in found.values()):
        return first
    log.warning(
        "%s: their chat templates differ: generate and exports get the tokenizer's own, if it has one",
        ", ".join(found),
    )
    return None


def refuse_overlong(source: Source, stream: TokenStream, seq_len: int) -> None:
    """Raise UserError, which names the first row, for documents longer than a sequence and its last label."""
    lengths_M = np.diff(stream.ends_M, prepend=0)
    long = np.flatnonzero(lengths_M > seq_len + 1)
    if len(long) and stream.mask is not None and isinstance(source, TurnsSource):
        file, row = source.files[stream.mask.files_M[long[0]]], stream.mask.rows_M[long[0]]
        raise UserError(
            f"{file}, row {row}: it has {lengths_M[long[0]]:,} tokens; {len(long):,} of {len(lengths_M):,} "
            f"conversations have more than data.seq_len={seq_len:,} and a last label, the longest "
            f"{lengths_M.max():,}: raise data.seq_len, or set {source.key}.overlong=truncate or drop"
        )


def _without_nulls(value: object) -> object:
    """Rows of Parquet have every key that any of them has, with null where it is none of theirs."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
