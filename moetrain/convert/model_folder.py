"""A model without a run: config.yaml, tokenizer/, hf/ and one checkpoint, which every command can start from.

It is a run folder whose only checkpoint holds the model alone, so ``generate``, ``eval``, ``export``,
``upcycle`` and ``train init_from=`` read it as they read a run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moetrain.checkpoint.folders import TEMPORARY, remove_folder, sync_folder
from moetrain.checkpoint.read import CHECKPOINTS, step_folder
from moetrain.checkpoint.state_dict import MODEL, OPTIM
from moetrain.checkpoint.stream import write_streamed
from moetrain.convert.progress import progress
from moetrain.data import Tokenizer
from moetrain.data.options import TokenizerConfig, TokenizerKind
from moetrain.errors import UserError
from moetrain.models.hf.carried import CARRIED
from moetrain.models.hf.source import TensorInfo, bytes_of
from moetrain.plain import to_yaml
from moetrain.train.identity import IDENTITY, identity_of
from moetrain.train.options import TrainConfig
from moetrain.train.run_files import CONFIG, TOKENIZER


def write_model_folder(
    target: Path,
    cfg: TrainConfig,
    tokenizer: Tokenizer,
    carry: Callable[[Path], None],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    origin: Mapping[str, Any],
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write ``target`` whole or not at all; ``tensors`` by our names (optimizer state as ``optim.<...>``).

    ``carry`` puts what other tools want into the folder that it is given; ``origin`` says where the tensors
    come from; ``check`` may look at the finished folder and refuse it by an exception. Raises UserError where
    ``target`` exists or cannot be written, and for a tokenizer that has more tokens than the model.
    """
    vocab_size = tensors["embed_VD"].shape[0]
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding only {vocab_size}, "
            "and those beyond it are not all added special tokens: give the model's own, or one without "
            "them: tokenizer=/path/to/tokenizer.json"
        )
    stored = {name if name.startswith(OPTIM) else MODEL + name: name for name in tensors}
    hashes: dict[str, str] = {}
    total = sum(info.nbytes for info in tensors.values())
    with new_folder(target) as folder, progress(f"writing {target}", total) as advance:
        tokenizer.save(folder / TOKENIZER)
        carry(folder / CARRIED)
        own = TokenizerConfig(kind=TokenizerKind.file, path=str((target / TOKENIZER).absolute()))
        cfg = replace(cfg, data=replace(cfg.data, tokenizer=own))
        (folder / CONFIG).write_text(to_yaml(cfg))
        identity = identity_of(cfg, folder)

        def read_hashed(name: str) -> Tensor:
            tensor = read(stored[name])
            hashes[name] = tensor_hash(tensor)
            advance(tensor.nbytes)
            return tensor

        write_streamed(
            step_folder(folder / CHECKPOINTS, 0),
            0,
            {name: tensors[ours] for name, ours in stored.items()},
            read_hashed,
            lambda: {"origin": origin, "tensors": hashes, IDENTITY: identity},
        )
        check(folder)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when all goes well; if anything fails, nothing is left."""
    if target.exists():
        raise UserError(f"target={target} exists already: choose another, or remove it")
    folder = target.parent / f"{TEMPORARY}{target.name}"
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        remove_folder(folder)
        folder.mkdir(parents=True)
        yield folder
        sync_folder(folder)
        os.replace(folder, target)
    except OSError as error:
        free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
        raise UserError(
            f"target={target} cannot be written: {error.strerror} ({error.filename or folder}); "
            f"{free:,} bytes are free there"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not target.exists():
            for parent in missing:  # the innermost first
                with suppress(OSError):  # somebody else may have put something there
                    parent.rmdir()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in its own dtype and in C order."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()
