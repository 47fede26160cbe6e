"""Documents that once ended in something else than one line or the right values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Any

import yaml

from fuzz.trees import Object, Raw, dump, of, parse

_DEEP = Raw("[" * 100_000 + "]" * 100_000)
_BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@dataclass(frozen=True)
class Document:
    """One file of a target with ``value`` at ``key`` (dots between), or as the whole text if there is none.

    In a file of rows the key is one of the first row. ``way``: one of the target's, all where it is empty.
    """

    target: str
    file: str
    key: str
    value: Any
    way: str = ""

    @property
    def name(self) -> str:
        text = f"{self.target}-{self.key or 'all'}={str(self.value)[:24]}-{self.way}"
        return re.sub(r"[^\w=.-]+", "_", text).strip("_-")

    def form(self, rng: Random, data: bytes) -> tuple[bytes, str]:
        if isinstance(self.value, bytes):  # a piece of the file, and what it becomes
            assert self.key.encode() in data
            return data.replace(self.key.encode(), self.value, 1), self.name
        if not self.key:
            return str(self.value).encode(), self.name
        first, end, rest = data.partition(b"\n") if self.file.endswith(".jsonl") else (data, b"", b"")
        tree = of(yaml.safe_load(first)) if self.file.endswith(".yaml") else parse(first)
        return dump(_set(tree, self.key.split("."), self.value)).encode() + end + rest, self.name


def _set(tree: Any, keys: list[str], value: Any) -> Any:
    if not keys:
        return value
    pairs = [(k, _set(v, keys[1:], value) if k == keys[0] else v) for k, v in tree]
    if keys[0] not in (k for k, _ in tree):
        pairs.append((keys[0], value))
    return Object(pairs)


_OWN, _RUN, _EXTRA = "own/config.json", "run/config.yaml", "run/checkpoints/step_00000004/extra.json"
_METRICS, _LOAD = "run/metrics.jsonl", "run/load.jsonl"
DOCUMENTS = (
    Document("hf_config_own", _OWN, "architectures", 7, "open"),
    Document("hf_config_own", _OWN, "qk_norm", [], "open"),
    Document("hf_config_own", _OWN, "rope_parameters", 7, "open"),
    Document("hf_config_own", _OWN, "rope_parameters.rope_type", [], "open"),
    Document("hf_config_own", _OWN, "hidden_size", 2**63 - 1, "open"),
    Document("hf_config_own", _OWN, "vocab_size", 10**300, "open"),
    Document("hf_config_own", _OWN, "num_hidden_layers", 2**63 - 1, "convert"),
    Document("hf_config_own", _OWN, "unknown", _DEEP, "open"),
    Document("hf_config_mixtral", "mixtral/config.json", "router_jitter_noise", "a", "open"),
    Document("hf_index", "mixtral/model.safetensors.index.json", "weight_map", {"a": "x" * 5000}),
    Document("gguf", "llama.gguf", "h e", b"h q"),
    Document("gguf", "llama.gguf", "smollm", b"smoll\xc7"),
    Document("run_config", _RUN, "", _DEEP, "report"),
    Document("run_config", _RUN, "", _DEEP, "generate"),
    Document("run_config", _RUN, "", "a: !!timestamp x\n", "report"),
    Document("run_config", _RUN, "router", "${nope}", "generate"),
    Document("run_config", _RUN, "router.group", "${oc.env:FUZZ_SECRET}", "export"),
    Document("run_config", _RUN, "model.init_std", -1.0, "generate"),
    Document("run_config", _RUN, "model.d_ff_expert", 0, "generate"),
    Document("run_config", _RUN, "model.norm_eps", Raw(".nan"), "generate"),
    Document("run_config", _RUN, "", _BOMB, "report of two"),
    Document("run_config", _RUN, "\ntrain:", f"\n{_BOMB}train:".encode(), "generate"),
    Document("overrides", _RUN, "", "override: model.d_model=1000000007", "compose"),
    Document("metrics_resume", _METRICS, "step", "7"),
    Document("metrics_resume", _METRICS, "step", None),
    Document("metrics_resume", _METRICS, "tokens", _DEEP),
    Document("report_rows", _METRICS, "tokens", _DEEP, "report"),
    Document("report_rows", _LOAD, "layers", 1, "report"),
    Document("report_plots", _METRICS, "step", 10**30),
    Document("report_facts", "run/summary.json", "seconds", _DEEP, "report"),
    Document("tokenizer_json", "mixtral/tokenizer.json", "model.continuing_subword_prefix", "{}", "load"),
    Document("tokenizer_json", "mixtral/tokenizer.json", '"!": 1', b'"!": 4294967295', "load"),
    Document("tokenizer_json", "mixtral/tokenizer_config.json", "eos_token", {"value": "a"}, "load"),
    Document("checkpoint_extra", _EXTRA, "tokens", "256"),
    Document("checkpoint_extra", _EXTRA, "meter", _DEEP),
)
