"""The root of ``moetrain eval``."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from moetrain.bounds import at_least
from moetrain.data.chat.settings import RowsSettings
from moetrain.data.options import TextFormat
from moetrain.missing import MISSING
from moetrain.train.options import Precision, ReplayConfig


class TextKind(Enum):
    """What files hold: text, or rows as ``data=chat`` and ``data=prompt_completion`` have them."""

    text = "text"
    chat = "chat"
    prompt_completion = "prompt_completion"


@dataclass(frozen=True)
class WholeFilesData:
    """Whole files to score, and how long a window of text the model sees."""

    path: Optional[str] = None  # a file, a directory or a glob
    kind: TextKind = TextKind.text
    format: TextFormat = TextFormat.auto
    text_key: str = "text"
    domain_key: Optional[str] = None  # a column whose value labels the row, for figures by domain
    # tokens of a window, of tasks' too; null: data.seq_len of the run
    seq_len: Optional[int] = field(default=None, metadata=at_least(2, 2**31 - 1))


@dataclass(frozen=True)
class EvalData(RowsSettings, WholeFilesData):
    """The settings of rows are of the kinds ``chat`` and ``prompt_completion``."""


@dataclass(frozen=True)
class EvalConfig:
    """Text of one's own (``data.path``), tasks of lm-eval (``tasks``), or both."""

    checkpoint: str = MISSING  # a run (its newest checkpoint), one checkpoint, a converted or HF folder
    data: EvalData = field(default_factory=EvalData)
    tasks: list[str] = field(default_factory=list)
    include_path: Optional[str] = None  # a folder with tasks of one's own, as yaml
    # examples before each question; null: the task's own number
    num_fewshot: Optional[int] = field(default=None, metadata=at_least(0))
    limit: Optional[int] = field(default=None, metadata=at_least(1))  # questions of each task; null: all
    json: Optional[str] = None  # a file for the figures
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    batch_size: int = field(default=8, metadata=at_least(1))  # sequences at once
    device: str = "auto"  # auto | cpu | cuda
    precision: Precision = Precision.fp32
    plugins: list[str] = field(default_factory=list)  # the packages that a run's own router needs
