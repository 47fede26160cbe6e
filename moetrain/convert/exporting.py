"""``moetrain export``: a checkpoint of any layout becomes a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.convert.model_folder import new_folder
from moetrain.convert.open_model import StoredModel, open_model
from moetrain.convert.options import AdapterFormat, ExportConfig, StoredDtype
from moetrain.convert.peft import export_adapters
from moetrain.convert.products import merged, without_products
from moetrain.convert.progress import progress
from moetrain.data import Tokenizer
from moetrain.data.chat.files import read_template_files
from moetrain.data.tokenizer import ByteTokenizer
from moetrain.data.tokenizer_bytes import bytes_as_json
from moetrain.errors import UserError
from moetrain.models.attention import SHIPPED
from moetrain.models.hf import FAMILIES, Family, ModelSpec, families_for
from moetrain.models.hf.carried import CONFIG
from moetrain.models.hf.further import copies
from moetrain.models.hf.pieces import Piece, by_theirs, joined
from moetrain.models.hf.shards import write_shards
from moetrain.models.hf.source import TensorInfo, read_json
from moetrain.models.hf.text_part import text_config
from moetrain.models.options import attention_kinds
from moetrain.models.wiring_rules import beyond_families
from moetrain.moe.options import ExpertKind
from moetrain.terminal import tell
from moetrain.train.run_files import ReadTrained

MANIFEST = "moetrain_export.json"
_DTYPES = {StoredDtype.fp32: torch.float32, StoredDtype.bf16: torch.bfloat16, StoredDtype.fp16: torch.float16}
_LISTED = 8  # complaints in one message
_OTHER_WORDS = (  # for what a family writes
    *("torch_dtype", "rope_theta", "rope_scaling", "layer_types", "num_local_experts"),
    *("original_max_position_embeddings", "partial_rotary_factor", "rotary_dim", "auto_map"),
    "quantization_config",  # of the weights that it came with
)
_CODED = "by code that is written beside the weights (in transformers: trust_remote_code=True)"
# in whatever dtype the rest is, as in training
_FP32 = (".router.bias_E", ".router.threshold_E", ".gate.e_score_correction_bias")
_KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # by another family too


def export(cfg: ExportConfig, read: ReadTrained) -> int:
    """Returns the exit code. Raises UserError for what the user can mend; nothing is written then."""
    model = open_model(Path(cfg.checkpoint).expanduser(), read)
    before = _config_before(model)
    if (layers := model.spec.model.feed_forward) != "moe":
        raise UserError(f"{cfg.checkpoint}: model.feed_forward={layers}: no family has such layers")
    for attention in attention_kinds(model.spec.model):
        if attention not in SHIPPED:
            raise UserError(
                f"{cfg.checkpoint}: model.attention={attention} is a plug-in's: no family has such attention"
            )
    if key := beyond_families(model.spec.model):
        raise UserError(f"{cfg.checkpoint}: {key}: no family has such blocks")
    base = _without_products(cfg, model)
    family = _family(cfg.family, base.spec, before.get("model_type"))
    if cfg.adapters is AdapterFormat.peft:
        export_adapters(model, base, family, Path(cfg.target).expanduser(), _DTYPES.get(cfg.dtype))
        return 0
    model = base
    pieces = _pieces(family, model)
    dtype, wide = _DTYPES.get(cfg.dtype), (*_FP32, *family.fp32)
    infos = {
        name: TensorInfo(
            piece.whole_shape, model.infos[ours].dtype if ours.endswith(wide) or not dtype else dtype
        )
        for name, ((ours, piece), *_) in pieces.items()
    }
    dtypes = {infos[name].dtype for name, ((ours, _), *_) in pieces.items() if not ours.endswith(wide)}
    total = sum(info.nbytes for info in infos.values())
    target = Path(cfg.target).expanduser()
    with new_folder(target) as folder, progress(f"writing {target}", total) as advance:
        model.carry(folder)
        _save_tokenizer(model.tokenizer, folder)
        config = _config(family, model, before, dtypes)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for file in family.code:
            shutil.copyfile(file, folder / file.name)
        tensors = _reader(model, pieces, infos, advance)
        hashes = write_shards(folder, infos, tensors, int(cfg.max_shard_gb * 1e9))
        manifest = {"checkpoint": _name(model), "family": family.model_type, "tensors": hashes}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    tell(f"{len(infos)} tensors of {family.architecture} are in {target} ({total / 1e9:.2f} GB)")
    return 0


def _without_products(cfg: ExportConfig, model: StoredModel) -> StoredModel:
    """The model whose matrices are written: with its products added, or the one that they stand beside."""
    rank, peft = model.spec.model.lora.rank, cfg.adapters is AdapterFormat.peft
    if rank is None and (cfg.merge or peft):
        asked = "merge=true" if cfg.merge else "adapters=peft"
        raise UserError(f"{asked}, but {cfg.checkpoint} has no low-rank products: leave it out")
    if cfg.merge and peft:
        raise UserError("merge=true writes the whole model, adapters=peft its products: ask for one of them")
    if rank is not None and not (cfg.merge or peft):
        raise UserError(
            f"{cfg.checkpoint} has low-rank products (model.lora.rank={rank}): set merge=true for the whole "
            "model with them added, or adapters=peft for the products alone"
        )
    if peft and model.spec.experts.kind is ExpertKind.low_rank:
        raise UserError(
            f"{cfg.checkpoint}: experts.kind=low_rank: peft has no experts of products around one network; "
            "merge=true writes the whole model, each expert with a network of its own"
        )
    return merged(model) if cfg.merge else without_products(model)


def _name(model: StoredModel) -> str:
    """Run and step, or the folder: an export tells nothing of the machine that it was made on."""
    path = model.path.absolute()
    return path.name if model.run_dir is None else f"{model.run_dir.absolute().name}/{path.name}"


def _family(name: str, spec: ModelSpec, before: str | None) -> Family:
    """The one that is asked for; ``auto``: the one that the model came from (``before``), else the first."""
    able, reasons = families_for(spec)
    coded, more = families_for(spec, with_code=True)
    if name == "auto":
        if not able:
            offers = [f"family={family.model_type} would, {_CODED}" for family in coded]
            raise UserError(
                f"no family expresses this model exactly: {'; '.join([*reasons, *more, *offers])}"
            )
        return next((family for family in able if family.model_type == before), able[0])
    if name not in FAMILIES:
        raise UserError(f"family={name} is not known: auto, {', '.join(sorted(FAMILIES))}")
    for family in able + coded:
        if family.model_type == name:
            return family
    (why,) = [reason for reason in reasons + more if reason.startswith(f"{name}: ")]
    instead = ", ".join(family.model_type for family in able or coded)
    hint = f"; {instead} would" if instead else ""
    raise UserError(f"family={name} cannot express this model: {why.removeprefix(f'{name}: ')}{hint}")


def _pieces(family: Family, model: StoredModel) -> dict[str, list[tuple[str, Piece]]]:
    """Their name -> our names and the pieces of them. Every stored tensor is used, or is refused."""
    table, stored = family.table(model.spec), model.weights
    complaints = [f"{name} is not in the checkpoint" for name in table if name not in stored]
    complaints += [f"{name} has no place in {family.model_type}" for name in stored if name not in table]
    for name, tiled in table.items():
        if name not in stored:
            continue
        if stored[name].shape != tiled.shape:
            complaints.append(f"{name} is {list(stored[name].shape)}, not {list(tiled.shape)}")
        elif not tiled.pieces and bool(model.read(name).any()):
            complaints.append(
                f"{name} is not zero, and {family.model_type} has no such tensor: family=moetrain has"
            )
    if complaints:
        raise UserError(f"{model.path} cannot be exported: {'; '.join(complaints[:_LISTED])}")
    pieces = by_theirs(table)
    for name, ours in copies(model.spec.model, family.further).items():
        (piece,) = table[ours].pieces
        pieces[name] = [(ours, replace(piece, theirs=name))]
    return pieces


def _reader(
    model: StoredModel,
    pieces: dict[str, list[tuple[str, Piece]]],
    infos: Mapping[str, TensorInfo],
    advance: Callable[[int], None],
) -> Callable[[str], Tensor]:
    """Their tensors; one of ours is read once, since its pieces follow each other."""
    held: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        wanted = {ours for ours, _ in pieces[name]}
        for ours in held.keys() - wanted:
            del held[ours]
        for ours in wanted - held.keys():
            held[ours] = model.read(ours)
        tensor = joined(pieces[name], held.__getitem__).to(infos[name].dtype)
        advance(tensor.nbytes)
        return tensor

    return read


def _config(
    family: Family, model: StoredModel, before: dict[str, Any], dtypes: set[torch.dtype]
) -> dict[str, Any]:
    """The family's keys over those that came with the model, all of them if it was of this family."""
    if before.get("model_type") != family.model_type:
        before = {key: before[key] for key in _KEPT if key in before}
    before = {
        key: value
        for key, value in before.items()
        if key not in _OTHER_WORDS and not key.startswith("_")  # "_name_or_path" and other private ones
    }
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    own = family.config(model.spec) | {"dtype": names[0] if len(names) == 1 else "float32"}
    defaults = {"eos_token_id": model.tokenizer.eos_id, "bos_token_id": None, "pad_token_id": None}
    scaling = model.spec.model.rope_scaling
    if scaling.original_max_positions is not None:
        defaults["max_position_embeddings"] = int(scaling.factor * scaling.original_max_positions)
    return defaults | before | own


def _config_before(model: StoredModel) -> dict[str, Any]:
    """The config.json that came with the model, empty where it came from elsewhere."""
    file = model.carried_from / CONFIG
    if not file.is_file():
        return {}
    config = read_json(file)
    return text_config({k: v for k, v in config.items() if k not in _OTHER_WORDS}, str(file))


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Ours, unless the model came with its own files; bytes in words that other tools know.

    The chat template is the one that it was trained with.
    """
    files = tokenizer.template_files
    if not (folder / "tokenizer.json").is_file():
        own = bytes_as_json().with_templates(files) if isinstance(tokenizer, ByteTokenizer) else tokenizer
        own.save(folder)
    elif files.templates and files.templates != read_template_files(folder).templates:
        files.save_templates(folder)
