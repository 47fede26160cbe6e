"""The files of ``moetrain eval``: read as what they are said to be, scored, summed by file and by domain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moetrain.convert.open_model import StoredModel
from moetrain.data import Packing, Part, Tokenizer, turns_source, val_batches, whole_files
from moetrain.data.chat.options import TurnsData, turns_data
from moetrain.data.conversations import Sums
from moetrain.data.options import DataConfig
from moetrain.data.sources.local import LocalSource, find_files
from moetrain.evaluation.options import EvalConfig, EvalData, TextKind
from moetrain.train.evaluate import evaluate
from moetrain.train.log.metrics import EvalSums
from moetrain.train.replay import open_replay
from moetrain.train.task import NextToken

_OF_TEXT = ("train_on", "template_args", "template_date", "special_words")  # what rows are to a model
_NOTHING = EvalSums(0.0, 0, 0)


@dataclass(frozen=True)
class Scores:
    """``domains``: without ``data.domain_key`` none. ``conversations``: None for text."""

    total: EvalSums
    files: Mapping[str, EvalSums]
    domains: Mapping[str, EvalSums]
    conversations: Sums | None

    def figures(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        found: dict[str, Any] = {
            "total": figures_of(self.total),
            "files": {name: figures_of(sums) for name, sums in self.files.items()},
        }
        if self.domains:
            found["domains"] = {name: figures_of(sums) for name, sums in self.domains.items()}
        if self.conversations is not None:
            found["conversations"] = asdict(self.conversations)
        return found


def figures_of(sums: EvalSums) -> dict[str, int | float]:
    return {
        "tokens": sums.tokens,
        "bytes": sums.bytes,
        "loss": sums.loss,
        "perplexity": sums.perplexity,
        "bits_per_byte": sums.bits_per_byte,
    }


def score_files(cfg: EvalConfig, stored: StoredModel, task: NextToken, data: DataConfig) -> Scores:
    """``data``: how documents become sequences."""
    assert cfg.data.path is not None
    packing = Packing(
        seq_len=data.seq_len,
        eos_id=stored.tokenizer.eos_id,
        keep_documents=not data.cross_document_attention,
        reset_positions=data.reset_positions,
        pad_last=True,
    )
    files = find_files(cfg.data.path)
    whole = whole_files(_parts(cfg.data, files, stored.tokenizer), stored.tokenizer, packing)
    batches = val_batches(whole.split, cfg.batch_size)
    replay = open_replay(cfg.replay, task.model.routers())
    ids = [str(number) for number in range(len(whole.labels))]
    total, of_ids = evaluate(task, batches, ids, seed=0, byte_scale=whole.split.byte_scale, replay=replay)
    by_file, by_domain = {str(file): _NOTHING for file in files}, dict[str, EvalSums]()
    for number, (place, domain) in zip(ids, whole.labels, strict=True):
        sums, name = of_ids.get(number, _NOTHING), str(files[place])
        by_file[name] += sums
        by_domain[domain] = by_domain.get(domain, _NOTHING) + sums
    return Scores(total, by_file, by_domain if cfg.data.domain_key is not None else {}, whole.sums)


def _parts(data: EvalData, files: Sequence[Path], tokenizer: Tokenizer) -> list[Part]:
    if data.kind is TextKind.text:
        return [Part(LocalSource(str(f), data.format, data.text_key, data.domain_key)) for f in files]
    rows = [turns_data(data.kind.value, data, str(f), data.format, data.domain_key) for f in files]
    return [Part(turns_source(each, tokenizer), overlong=data.overlong) for each in rows]


def read_otherwise(data: EvalData, trained: DataConfig) -> Iterator[str]:
    """What a run on rows of the same kind was told of them that ``data`` is not, in a line each."""
    if not isinstance(trained, TurnsData) or trained.source != data.kind.value:
        return
    for name in _OF_TEXT:
        if hasattr(trained, name) and (before := getattr(trained, name)) != (now := getattr(data, name)):
            shown = (getattr(value, "name", value) for value in (before, now))
            yield "the run was trained with data.{0}={1}, and this scores data.{0}={2}".format(name, *shown)
