"""Files beside the weights that other tools want: kept with a model, so that its export gives them back.

Only regular files go along, and links to files of the same model: a folder that was downloaded may hold links
to anything, and an export would publish what they point at.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from moetrain import files
from moetrain.errors import UserError
from moetrain.terminal import tell

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
_LIMIT = 200 * files.MB  # of a file; the largest vocabularies take a quarter of it


def carry_files(source: Path, target: Path, tokenizer: bool = True) -> None:
    """Copy those of the files that ``source`` has; ``target`` is made only if there is one.

    ``tokenizer``: those of the tokenizer too, which is the one that the model goes on with; all or none.
    What is left out, since it is a link that leaves the model's folder or no regular file, is said.
    """
    if source.name == CARRIED and source.is_symlink():
        tell(f"not copied: {source}, which is a link", sys.stderr)
        return
    for names in (_MODEL, _TOKENIZER) if tokenizer else (_MODEL,):
        found = [source / name for name in names if os.path.lexists(source / name)]
        left_out = [file for file in found if not files.belongs(file)]
        if left_out:
            listed = ", ".join(file.name for file in left_out)
            tell(f"not copied from {source}: {listed} (links out of it, or no files)", sys.stderr)
        if names is _TOKENIZER and left_out:
            continue
        for file in found:
            if file not in left_out:
                target.mkdir(parents=True, exist_ok=True)
                _copy(file, target / file.name)


def _copy(file: Path, target: Path) -> None:
    with os.fdopen(files.open_regular(file.resolve()), "rb") as source:
        size = os.fstat(source.fileno()).st_size
        if size > _LIMIT:
            raise UserError(f"{file} has {size} bytes, and such a file has {_LIMIT} at the most")
        with target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
