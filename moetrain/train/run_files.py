"""The names of what a run folder holds besides its checkpoints, and the types of what reads its config.

Composing a config is above the trainer, and so is reading one: who calls hands the reader down. Both raise
UserError for a config that cannot be read.
"""

from collections.abc import Callable
from pathlib import Path

from moetrain.train.options import TrainConfig

CONFIG = "config.yaml"
TOKENIZER = "tokenizer"  # a folder

ReadConfig = Callable[[Path], TrainConfig]  # the config in a file, whatever it describes
ReadTrained = Callable[[Path], TrainConfig]  # the one beside a checkpoint, which it describes
