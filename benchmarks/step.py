"""Whole training steps side by side: a 22.6 M parameter model (6 layers, D 256, sequence 512), fused AdamW.

    python benchmarks/step.py [--dtypes fp32 bf16] [--device cuda] [--repetitions 30] [--sequences 4]
                              [--out FILE]

Forward, loss, backward, clip to norm 1 and update, on random tokens that are new in every step; all models
in one interleaved pass, each in a process of its own, as it runs in real training: ours with the allocator's
settings that our trainer makes, the others with the C library's own. ``MALLOC_TRIM_THRESHOLD_=2147483647
MALLOC_MMAP_THRESHOLD_=33554432`` in the environment gives all of them ours. The balance loss is on in all MoE
models (coefficient 0.01). ``--before FOLDER`` adds our model as another checkout of this repository has it.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from timing import device_of, finish, interleaved, machine, medians, ratio, write_json
from torch import Tensor, nn

OURS, BEFORE = "moetrain", "moetrain before"
VOCAB, WIDTH, LAYERS, HEADS, SEQ = 4096, 256, 6, 4, 512
EXPERTS, TOP_K, HIDDEN = 8, 2, 512
WARM_UP = 10  # steps: a CPU's matmul kernels are compiled at the first use of an expert's number of rows
Loss = Callable[[Tensor], Tensor]


def ours(bf16: bool) -> tuple[nn.Module, Loss]:
    from moetrain.models.decoder import Decoder
    from moetrain.models.options import ModelConfig
    from moetrain.moe.balance import StepTotals, count_ahead, make_terms, total_loss
    from moetrain.moe.balance.settings import LossConfig
    from moetrain.moe.options import ExpertsConfig
    from moetrain.moe.routers.topk import TopKOptions
    from moetrain.parallel.apply import parallelize
    from moetrain.parallel.mesh import Meshes
    from moetrain.train.task import NextToken

    cfg = ModelConfig(
        d_model=WIDTH, num_layers=LAYERS, num_heads=HEADS, num_experts=EXPERTS, d_ff_expert=HIDDEN,
        tie_embeddings=False,
    )  # fmt: skip
    decoder = Decoder(cfg, TopKOptions(top_k=TOP_K), ExpertsConfig(), VOCAB)
    decoder.compute_dtype = torch.bfloat16 if bf16 else None
    task = NextToken(decoder)
    parallelize(task, Meshes(), compute_dtype=decoder.compute_dtype)
    terms = make_terms([LossConfig()])

    def loss(ids_BS: Tensor) -> Tensor:
        labels_BS = torch.cat([ids_BS[:, 1:], torch.full_like(ids_BS[:, :1], -100)], dim=1)
        out = task(ids_BS, labels_BS)
        totals = StepTotals(ids_BS.numel(), count_ahead([out.records], terms))
        extra, _ = total_loss(out.records, terms, totals)
        return out.loss_sum / (labels_BS != -100).sum() + extra

    return task, loss


def ours_before(folder: str, bf16: bool) -> tuple[nn.Module, Loss]:
    """Of the checkout in ``folder``, by its own copy of this file."""
    sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location("step_before", Path(folder, "benchmarks", "step.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: tuple[nn.Module, Loss] = module.ours(bf16)
    return made


def from_transformers(kind: str) -> tuple[nn.Module, Loss]:
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "max_position_embeddings": SEQ, "tie_word_embeddings": False,
        "use_cache": False, "attn_implementation": "sdpa",
    }  # fmt: skip
    moe = {"output_router_logits": True, "router_aux_loss_coef": 0.01, "num_experts_per_tok": TOP_K}
    if kind == "Llama":
        config = transformers.LlamaConfig(**shared, intermediate_size=TOP_K * HIDDEN)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    elif kind == "Mixtral":
        config = transformers.MixtralConfig(
            **shared, **moe, intermediate_size=HIDDEN, num_local_experts=EXPERTS
        )
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            **shared, **moe, head_dim=WIDTH // HEADS, moe_intermediate_size=HIDDEN, num_experts=EXPERTS,
            norm_topk_prob=True,
        )  # fmt: skip
        model = transformers.Qwen3MoeForCausalLM(config)
    if kind != "Llama":
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]  # of transformers' models
    model.train()
    return model, lambda ids_BS: model(input_ids=ids_BS, labels=ids_BS).loss


BUILDERS: dict[str, Callable[[bool], tuple[nn.Module, Loss]]] = {
    "dense Llama": lambda bf16: from_transformers("Llama"),
    OURS: ours,
    "transformers Mixtral": lambda bf16: from_transformers("Mixtral"),
    "transformers Qwen3-MoE": lambda bf16: from_transformers("Qwen3"),
}


def serve(
    name: str,
    before: str | None,
    bf16: bool,
    device: str,
    threads: int,
    data: list[Tensor],
    pipe: Connection,
) -> None:
    """A process with one model, which makes a step for every repetition that it is sent."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        model, loss = BUILDERS[name](bf16) if before is None else ours_before(before, bf16)
        if name in (OURS, BEFORE):
            from moetrain.parallel.allocator import keep_freed_memory

            keep_freed_memory()  # as our trainer does
    except ImportError as error:
        pipe.send(str(error))
        return
    model.to(device)
    pipe.send(sum(p.numel() for p in model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    while (repetition := pipe.recv()) is not None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16 and name != OURS):
            value = loss(data[repetition].to(device))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finish(device)
        pipe.send(None)


def measure(
    bf16: bool, device: str, repetitions: int, sequences: int, threads: int, before: str | None
) -> dict[str, Any]:
    torch.manual_seed(1)
    data = [torch.randint(0, VOCAB, (sequences, SEQ)) for _ in range(WARM_UP + repetitions)]
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    sizes: dict[str, int] = {}
    skipped: dict[str, str] = {}
    processes = []
    for name in [*BUILDERS, *([BEFORE] if before else [])]:
        here, there = context.Pipe()
        arguments = (name, before if name == BEFORE else None, bf16, device, threads, data, there)
        processes.append(context.Process(target=serve, args=arguments, daemon=True))
        processes[-1].start()
        answer = here.recv()
        if isinstance(answer, str):
            skipped[name] = answer
        else:
            pipes[name], sizes[name] = here, answer

    def step(pipe: Connection, repetition: int) -> None:
        pipe.send(repetition)
        pipe.recv()

    times = interleaved({name: partial(step, pipe) for name, pipe in pipes.items()}, repetitions, WARM_UP)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    middle = medians(times)
    return {
        "skipped": skipped,
        "models": {
            name: {
                "tokens_per_second": sequences * SEQ / middle[name],
                "speedup_of_ours": ratio(times, name, OURS),
                "parameters": sizes[name],
            }
            for name in pipes
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--before", metavar="FOLDER")
    parser.add_argument("--out")
    args = parser.parse_args()
    import as_trainer  # noqa: F401  # here: the models' processes get its environment, not the package

    device = device_of(parser, args.device)
    result: dict[str, Any] = {
        "machine": machine(), "repetitions": args.repetitions, "tokens": args.sequences * SEQ, "dtypes": {},
    }  # fmt: skip
    print(result["machine"])
    for dtype in args.dtypes:
        figures = measure(
            dtype == "bf16", device, args.repetitions, args.sequences, args.threads, args.before
        )
        result["dtypes"][dtype] = figures
        print(f"\n{dtype}, {args.sequences} x {SEQ} tokens a step")
        for name, reason in figures["skipped"].items():
            print(f"  skipped: {name} ({reason})")
        for name, f in figures["models"].items():
            print(
                f"  {name:24} {f['tokens_per_second']:7,.0f} tokens/s  ours is {f['speedup_of_ours']:.2f}x  "
                f"{f['parameters'] / 1e6:.2f} M parameters"
            )
        write_json(args.out, result)


if __name__ == "__main__":
    main()
