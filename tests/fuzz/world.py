"""The valid files that get mutated: a corpus, a run, its exports and a GGUF file, made once in one folder.

All paths in them are relative to that folder, and all times are one constant: a seed means the same edit
wherever the folder lies.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiny
import torch

from fuzz.sign import signed_checkpoint
from moetrain.checkpoint.read import CHECKPOINTS, step_folder
from moetrain.cli import main
from moetrain.moe import RouterContext, build_router
from moetrain.train.routes import RouteWriter

STEPS = 4
RUN = [
    *(override for override in tiny.OVERRIDES if not override.startswith("data.tokenizer")),
    "run.dir=run", "data.path=text", "data.cache_dir=cache", "data.tokenizer.kind=bpe",
    "data.tokenizer.vocab_size=300",
    f"train.steps={STEPS}", "schedule.horizon=4", "schedule.warmup_steps=1", "checkpoint.every=2",
    "train.eval_every=2",
    "train.eval_samples=2", "router=mixtral", "optim.lr=0.01",
]  # fmt: skip
EXPERTS, LAYERS = 5, 2  # of RUN
ROUTED = [[7, 2, 7, 41, 0], [3, 3, 19, 5, 1]]  # the tokens of a record of routes
ALARMS = {  # as in the middle of a collapse of layer 1
    "places": {
        "collapse": {
            "0": {"bad": 3, "good": 0, "raised": False},
            "1": {"bad": 20, "good": 7, "raised": True},
        },
        "dead_experts": {"1": {"bad": 1, "good": 0, "raised": True}},
        "loss_spike": {"-1": {"bad": 0, "good": 2, "raised": True}},
        "imbalance_cost": {}, "large_logits": {}, "low_entropy": {},
    },
    "idle": {"0": [0, 0, 3, 0, 0], "1": [0, 0, 51, 60, 1]},
    "loss": {"sum": 16.5, "count": 4},
}  # fmt: skip
_WHY = {"why": "2.0 of 5 experts are in use, for 2.0 a token", "suggestion": "balance=aux_free", "value": 2.0}
ALARM_ROWS: list[dict[str, object]] = [
    {"step": 1, "alarm": "loss_spike", "raised": True, "layers": [], **_WHY, "suggestion": None},
    {"step": 2, "alarm": "collapse", "raised": True, "layers": [0, 1], **_WHY},
    {"step": 4, "alarm": "collapse", "raised": False, "layers": [0], **_WHY},
]
_TIMES = re.compile(r'("(?:time|seconds|wall_seconds|tokens_per_second)": )[^,}\n]+')
_WIDTH, _HEADS, _FF, _LAYERS = 16, 2, 24, 2


def make_world(folder: Path) -> None:
    """Fill ``folder``; takes a few seconds."""
    folder.mkdir(parents=True)
    with tiny.alone(), inside(folder):
        tiny.write_corpus(Path("made"))
        Path("text").mkdir()
        for file in sorted(Path("made/text").iterdir())[:12]:
            file.rename(Path("text") / file.name)
        shutil.rmtree("made")
        _run("train", *RUN)
        for file in ("metrics.jsonl", "summary.json", "environment.json"):
            path = Path("run") / file
            path.write_text(_TIMES.sub(r"\g<1>1000.5", path.read_text()))
        last = step_folder(Path("run") / CHECKPOINTS, STEPS)
        extra = last / "extra.json"
        document = json.loads(_TIMES.sub(r"\g<1>1.5", extra.read_text()))
        extra.write_text(json.dumps(document | {"alarms": ALARMS}, sort_keys=True) + "\n")
        Path("run/alarms.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ALARM_ROWS))
        signed_checkpoint(last)
        shutil.rmtree(step_folder(Path("run") / CHECKPOINTS, 2))
        _split_blocks(last, Path("split"))
        _run("export", "checkpoint=run", "target=own", "family=moetrain")
        _run("export", "checkpoint=run", "target=mixtral", "family=mixtral", "max_shard_gb=0.00002")
        _write_routes(Path("routes"))
        _write_gguf(Path("llama.gguf"))
        _run("convert", "source=llama.gguf", "target=converted")
        _run("export", "checkpoint=converted", "target=llama", "family=llama")
        shutil.rmtree("converted")


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _run(*arguments: str) -> None:
    assert main(list(arguments)) == 0, arguments


def _split_blocks(checkpoint: Path, target: Path) -> None:
    """The same checkpoint as two ranks would have saved it: each tensor in two blocks of a file each."""
    from moetrain.checkpoint.stream import StoredTensors

    stored = StoredTensors(checkpoint)
    shutil.copytree(checkpoint, target)
    (target / "__0_0.distcp").unlink()
    document = json.loads((target / "metadata.json").read_text())
    with (target / "__0_0.distcp").open("wb") as first, (target / "__1_0.distcp").open("wb") as second:
        for name, entry in document["tensors"].items():
            tensor, entry["chunks"] = stored.read(name), []
            rows = len(tensor) if tensor.ndim else 0
            cuts = [(first, 0, rows // 2), (second, rows // 2, rows)] if rows > 1 else [(first, 0, rows)]
            for file, start, stop in cuts:
                block = tensor[start:stop].clone() if tensor.ndim else tensor
                position = file.tell()
                torch.save(block, file)
                offsets = [start, *[0] * (tensor.ndim - 1)] if tensor.ndim else []
                place = {"file": Path(file.name).name, "position": position, "length": file.tell() - position}
                entry["chunks"].append({"offsets": offsets, "sizes": list(block.shape), **place})
    (target / "metadata.json").write_text(json.dumps(document, sort_keys=True) + "\n")
    signed_checkpoint(target, names=["__0_0.distcp", "__1_0.distcp", "metadata.json", "extra.json"])


def _write_routes(folder: Path) -> None:
    """A record of two sequences, of which the second ends in padding."""
    torch.manual_seed(0)
    routers = {n: build_router("topk", d_model=4, num_experts=EXPERTS) for n in range(LAYERS)}
    tokens_BS = torch.tensor(ROUTED)
    valid_BS = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    ctx = RouterContext(2, 5, torch.arange(2), tokens_BS.view(-1), valid_BS.view(-1))
    writer = RouteWriter(folder, routers)
    writer.add(
        ctx.sample_ids_B, tokens_BS, valid_BS, {n: r(torch.randn(10, 4), ctx) for n, r in routers.items()}
    )
    writer.flush("step_1")


def _write_gguf(file: Path) -> None:
    """A dense llama with a byte-level BPE tokenizer."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    merges = [("h", "e"), ("he", "l"), ("\u0120", "hel")]
    tokens = [*sorted(ByteLevel.alphabet()), *("".join(merge) for merge in merges), "<|eos|>"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(77)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FF)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_key_length(_WIDTH // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(len(tokens) - 1)
    draw = np.random.default_rng(0)
    square, wide = (_WIDTH, _WIDTH), (_FF, _WIDTH)
    inner = {"attn_norm": _WIDTH, "attn_q": square, "attn_k": square, "attn_v": square, "attn_output": square,
             "ffn_norm": _WIDTH, "ffn_gate": wide, "ffn_up": wide, "ffn_down": wide[::-1]}  # fmt: skip
    shapes = {
        "token_embd.weight": (len(tokens), _WIDTH),
        "output_norm.weight": _WIDTH,
        "output.weight": (len(tokens), _WIDTH),
    }
    shapes |= {
        f"blk.{layer}.{name}.weight": shape for layer in range(_LAYERS) for name, shape in inner.items()
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, draw.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
