"""Peak memory and time of ``moetrain convert`` on a synthetic checkpoint of Mixtral's width.

    python benchmarks/convert_memory.py /tmp/convert_memory --gb 10

Writes a bf16 checkpoint of eight shards there (random bytes), converts it in a process of its own, prints
what that took, and removes both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

from moetrain.models.hf import FAMILIES, Fields

SHARDS, VOCAB, CHUNK = 8, 32_000, 2**24
CONFIG = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_window": None,
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Their tensors, by name."""
    family = FAMILIES["mixtral"]
    spec = family.read(Fields({**CONFIG, "num_hidden_layers": layers}, "here", family.defaults))
    return {piece.theirs: piece.shape for tiled in family.table(spec).values() for piece in tiled.pieces}


def size(shape: tuple[int, ...]) -> int:
    return 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)


def write_shard(file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header, position = {}, 0
    for name, shape in tensors.items():
        span = [position, position + size(shape)]
        header[name], position = {"dtype": "BF16", "shape": shape, "data_offsets": span}, span[1]
    text = json.dumps(header).encode()
    noise = os.urandom(CHUNK)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, position, CHUNK):
            stream.write(noise[: position - start])


def write_source(folder: Path, nbytes: float) -> int:
    """As many layers as ``nbytes`` hold, one at least; returns the bytes of all tensors."""
    layers = 1
    while sum(map(size, shapes(layers + 1).values())) <= nbytes:
        layers += 1
    tensors = shapes(layers)
    total = sum(map(size, tensors.values()))
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    done = 0
    for name, shape in tensors.items():
        shards[min(SHARDS - 1, SHARDS * done // total)][name] = shape
        done += size(shape)
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        write_shard(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "moetrain.bytes"}))
    return total


def peak_kb(pid: int) -> int:
    """VmHWM of a process that lives."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made, filled and removed")
    parser.add_argument("--gb", type=float, default=10.0, help="size of the source, in 1e9 bytes")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists: it would be removed at the end")
    options.folder.mkdir(parents=True)
    try:
        total = write_source(options.folder / "source", options.gb * 1e9)
        command = [sys.executable, "-m", "moetrain", "convert", f"source={options.folder}/source"]
        log = options.folder / "log"
        started, peak = time.monotonic(), 0
        with log.open("wb") as out:
            child = subprocess.Popen([*command, f"target={options.folder}/target"], stdout=out, stderr=out)
            while child.poll() is None:
                peak = max(peak, peak_kb(child.pid))
                time.sleep(0.1)
        seconds = time.monotonic() - started
        said = log.read_text()
        lines = [line for line in said.splitlines() if line.startswith("writing ")]
        print(said if child.returncode else "\n".join(lines))
        print(
            f"{total / 1e9:.2f} GB in {SHARDS} shards: exit code {child.returncode}, {seconds:.0f} s, "
            f"peak {peak / 1e6:.2f} GB resident, {len(lines)} progress lines"
        )
        return child.returncode
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    sys.exit(main())
