"""Whether a run folder's config.yaml and tokenizer are those that a checkpoint was written with.

Each checkpoint's extra, whose hash the manifest holds, says what its weights compute: the keys of the config
that decide it, and a digest of the tokenizer. Checkpoints of before
hold neither and are opened without a word.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from moetrain.checkpoint.read import read_extra, run_of
from moetrain.errors import UserError
from moetrain.files import MB, read_json
from moetrain.flat import flat, lies_in, shown
from moetrain.train.options import TrainConfig
from moetrain.train.run_files import CONFIG, TOKENIZER, ReadConfig

IDENTITY = "identity"  # in the extra
_FUNCTION = ("model", "router", "experts", "data.cross_document_attention", "data.reset_positions")
_NO_FUNCTION = (  # of those: where weights started, how they are computed, and what their shapes tell
    *("model.init_std", "model.vocab_size", "model.attention_backend"),
    *("experts.backend", "experts.block", "experts.keep", "experts.max_rows_per_rank"),
)
_FILES = ("tokenizer.json", "tokenizer_config.json")
_LIMIT = 256 * MB  # of one of them
_LISTED = 4  # differences in one message


def identity_of(cfg: TrainConfig, run_dir: Path) -> dict[str, str]:
    """What weights of ``cfg`` compute: key -> value as JSON, and the digest of the folder's tokenizer."""
    return function_of(cfg) | {TOKENIZER: _tokenizer_digest(run_dir / TOKENIZER)}


def function_of(cfg: TrainConfig) -> dict[str, str]:
    """The keys that decide what weights compute, and their values as JSON."""
    kept = {k: v for k, v in flat(cfg).items() if lies_in(k, _FUNCTION) and not lies_in(k, _NO_FUNCTION)}
    return {key: json.dumps(value) for key, value in kept.items()}


def require_same_files(checkpoint: Path, read: ReadConfig) -> None:
    """UserError that names the file of the run folder that was changed since ``checkpoint`` was written."""
    stored, run_dir = _stored(checkpoint), run_of(checkpoint)
    if not stored:
        return
    now = identity_of(read(run_dir / CONFIG), run_dir)
    changed = _changed(stored, now)
    if changed:
        raise UserError(
            f"{run_dir / CONFIG} was changed since {checkpoint} was written: {changed}; the weights belong "
            "to the old value: restore the file"
        )
    if stored.get(TOKENIZER) not in (None, now[TOKENIZER]):
        raise UserError(
            f"{run_dir / TOKENIZER} was changed since {checkpoint} was written: its ids would mean other "
            "text; restore the folder"
        )


def compare_resumed(cfg: TrainConfig, checkpoint: Path) -> list[str]:
    """What is to be said of ``cfg`` and of the run folder's tokenizer, of whose files ``cfg`` is the next.

    UserError where ``cfg`` is of another function than the weights and ``resume_changes`` names none of it,
    which the comparison with config.yaml tells first unless that file was changed or is missing.
    """
    stored, run_dir = _stored(checkpoint), run_of(checkpoint)
    accepted = any(
        lies_in(name, _FUNCTION) or lies_in(key, [name]) for name in cfg.resume_changes for key in _FUNCTION
    )
    changed = _changed(stored, function_of(cfg))
    if changed and not accepted:
        raise UserError(
            f"resume: {run_dir / CONFIG} was changed or removed since {checkpoint} was written: {changed}; "
            "the weights belong to the old value: give it back, or name the key in resume_changes"
        )
    try:
        same = stored.get(TOKENIZER) in (None, _tokenizer_digest(run_dir / TOKENIZER))
    except UserError:
        same = False  # a start that was killed may have left half of it
    return [] if same else [f"{run_dir / TOKENIZER} is not as {checkpoint} knows it, and is written anew"]


def _stored(checkpoint: Path) -> dict[str, str]:
    found: Any = read_extra(checkpoint).get(IDENTITY, {})
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise UserError(f"{checkpoint}: its extra state's {IDENTITY} is no mapping of text")
    return found


def _changed(stored: dict[str, str], now: dict[str, str]) -> str:
    """The keys that differ, with both values; empty where none does. Keys of a later version do not count."""
    differing = [key for key in stored if key != TOKENIZER and stored[key] != now.get(key)]
    some = [
        f"{key} was {shown(stored[key])}, now {shown(now.get(key, 'missing'))}" for key in differing[:_LISTED]
    ]
    more = [f"and {len(differing) - _LISTED} more"] if len(differing) > _LISTED else []
    return ", ".join(some + more)


def _tokenizer_digest(folder: Path) -> str:
    """Of the files' values, however they are laid out; a later version of the library changes nothing."""
    files = [name for name in _FILES if (folder / name).exists()]
    content = {name: read_json(folder / name, dict[str, Any], _LIMIT) for name in files}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
