"""``moetrain export``: a checkpoint of any layout becomes a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.config.init_from import read_spec
from moetrain.config.schema_convert import ExportConfig, StoredDtype
from moetrain.convert.model_folder import new_folder
from moetrain.convert.progress import progress
from moetrain.data import Tokenizer, load_tokenizer
from moetrain.errors import UserError
from moetrain.models.hf import FAMILIES, Family, ModelSpec, families_for
from moetrain.models.hf.carried import CARRIED, carry_files
from moetrain.models.hf.pieces import Piece
from moetrain.models.hf.shards import write_shards
from moetrain.models.hf.source import TensorInfo, read_json
from moetrain.train.checkpoint_read import run_of
from moetrain.train.checkpoint_stream import StoredTensors
from moetrain.train.sample import TOKENIZER
from moetrain.train.state_dict import MODEL

MANIFEST = "moetrain_export.json"
_DTYPES = {StoredDtype.fp32: torch.float32, StoredDtype.bf16: torch.bfloat16, StoredDtype.fp16: torch.float16}
_OTHER_WORDS = ("torch_dtype", "rope_theta", "rope_scaling", "layer_types")  # for what a family writes
_KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # by another family too


def export(cfg: ExportConfig) -> int:
    """Returns the exit code. Raises UserError for what the user can mend; nothing is written then."""
    stored = StoredTensors(Path(cfg.checkpoint).expanduser(), MODEL)
    run_dir = run_of(stored.path)
    spec = read_spec(run_dir)
    family = _family(cfg.family, spec)
    tokenizer = load_tokenizer(run_dir / TOKENIZER)
    pieces = _pieces(family, spec, stored)
    dtype = _DTYPES.get(cfg.dtype)
    infos = {
        name: TensorInfo(piece.shape, dtype or stored.tensors[ours].dtype)
        for name, (ours, piece) in pieces.items()
    }
    total = sum(info.nbytes for info in infos.values())
    target = Path(cfg.target).expanduser()
    with new_folder(target) as folder, progress(f"writing {target}", total) as advance:
        carry_files(run_dir / CARRIED, folder)
        _save_tokenizer(tokenizer, folder)
        config = _config(family, spec, run_dir, tokenizer, infos)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        read = _reader(stored, pieces, dtype, advance)
        hashes = write_shards(folder, infos, read, int(cfg.max_shard_gb * 1e9))
        manifest = {"checkpoint": str(stored.path.absolute()), "family": family.model_type, "tensors": hashes}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(infos)} tensors of {family.architecture} are in {target} ({total / 1e9:.2f} GB)")
    return 0


def _family(name: str, spec: ModelSpec) -> Family:
    able, reasons = families_for(spec)
    if name == "auto":
        if not able:
            raise UserError(f"no family expresses this model exactly: {'; '.join(reasons)}")
        return able[0]
    if name not in FAMILIES:
        raise UserError(f"family={name} is not known: auto, {', '.join(sorted(FAMILIES))}")
    for family in able:
        if family.model_type == name:
            return family
    (why,) = [reason for reason in reasons if reason.startswith(f"{name}: ")]
    instead = ", ".join(family.model_type for family in able)
    hint = f"; {instead} would" if able else ""
    raise UserError(f"family={name} cannot express this model: {why.removeprefix(f'{name}: ')}{hint}")


def _pieces(family: Family, spec: ModelSpec, stored: StoredTensors) -> dict[str, tuple[str, Piece]]:
    """Their name -> our name and the piece of it. Every stored tensor is used, or is refused."""
    table = family.table(spec)
    complaints = [f"{name} is not in the checkpoint" for name in table if name not in stored.tensors]
    complaints += [
        f"{name} has no place in {family.model_type}" for name in stored.tensors if name not in table
    ]
    complaints += [
        f"{name} is {list(stored.tensors[name].shape)}, not {list(tiled.shape)}"
        for name, tiled in table.items()
        if name in stored.tensors and stored.tensors[name].shape != tiled.shape
    ]
    for name, tiled in table.items():
        if not tiled.pieces and name in stored.tensors and bool(stored.read(name).any()):
            complaints.append(f"{name} is not zero, and {family.model_type} has no such tensor")
    if complaints:
        raise UserError(f"{stored.path} cannot be exported: {'; '.join(complaints[:8])}")
    return {piece.theirs: (ours, piece) for ours, tiled in table.items() for piece in tiled.pieces}


def _reader(
    stored: StoredTensors,
    pieces: dict[str, tuple[str, Piece]],
    dtype: torch.dtype | None,
    advance: Callable[[int], None],
) -> Callable[[str], Tensor]:
    """Their tensors; one of ours is read once, since its pieces follow each other."""
    held: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        ours, piece = pieces[name]
        if ours not in held:
            held.clear()
            held[ours] = stored.read(ours)
        tensor = piece.to_theirs(held[ours])
        tensor = tensor if dtype is None else tensor.to(dtype)
        advance(tensor.nbytes)
        return tensor

    return read


def _config(
    family: Family, spec: ModelSpec, run_dir: Path, tokenizer: Tokenizer, infos: dict[str, TensorInfo]
) -> dict[str, Any]:
    """The family's keys over those that came with the model, all of them if it was of this family."""
    file = run_dir / CARRIED / "config.json"
    before = read_json(file) if file.is_file() else {}
    if before.get("model_type") != family.model_type:
        before = {key: before[key] for key in _KEPT if key in before}
    dtypes = {str(info.dtype).removeprefix("torch.") for info in infos.values()}
    own = family.config(spec) | {"dtype": dtypes.pop() if len(dtypes) == 1 else "float32"}
    for key in _OTHER_WORDS:
        before.pop(key, None)
    defaults = {"eos_token_id": tokenizer.eos_id, "bos_token_id": None, "pad_token_id": None}
    return defaults | before | own


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Ours, unless the model came with its own files."""
    if not (folder / "tokenizer.json").is_file():
        tokenizer.save(folder)
