"""Files beside the weights that other tools want: kept with a model, so that its export gives them back."""

from __future__ import annotations

import shutil
from pathlib import Path

CARRIED = "hf"  # the folder of a run folder that holds them

CONFIG = "config.json"
_MODEL = (CONFIG, "generation_config.json", "LICENSE", "NOTICE")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def carry_files(source: Path, target: Path, tokenizer: bool = True) -> None:
    """Copy those of the files that ``source`` has; ``target`` is made only if there is one.

    ``tokenizer``: those of the tokenizer too, which is the one that the model goes on with.
    """
    for name in (*_MODEL, *(_TOKENIZER if tokenizer else ())):
        if (source / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
