"""Text from a model: the sample at the end of training, and ``moetrain generate``."""

from __future__ import annotations

from pathlib import Path

import torch

from moetrain.checkpoint.read import find_checkpoint, load_checkpoint, run_of
from moetrain.checkpoint.state_dict import MODEL, model_tensors
from moetrain.data import Tokenizer, load_tokenizer
from moetrain.errors import UserError
from moetrain.models.decoder import Decoder
from moetrain.models.generate import generate
from moetrain.parallel.distributed import is_main
from moetrain.parallel.precision import round_for_inference
from moetrain.terminal import as_text, show
from moetrain.train.engine import Engine
from moetrain.train.options import GenerateConfig, LoopConfig, Precision
from moetrain.train.replay import OneSequence
from moetrain.train.routes import RouteWriter
from moetrain.train.rules import check_generate
from moetrain.train.run_dir import RunDir
from moetrain.train.run_files import TOKENIZER, ReadTrained
from moetrain.train.unloaded import unloaded_decoder
from moetrain.writing import write_atomic

_TEMPERATURE, _TOP_P = 0.8, 0.95


def write_sample(engine: Engine, tokenizer: Tokenizer, cfg: LoopConfig, run_dir: RunDir, step: int) -> str:
    """Continue ``train.sample_prompt``, keep the text in ``samples/`` and return it. All ranks take part."""
    model, prompt, length = engine.task.model, cfg.sample_prompt, cfg.sample_tokens
    with engine.gathered():
        text = continue_text(model, tokenizer, prompt, length, _TEMPERATURE, None, _TOP_P, cfg.seed)
    if is_main():
        write_atomic(run_dir.samples / f"step_{step:08d}.txt", text + "\n")
    return text


def continue_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    writer: RouteWriter | None = None,
) -> str:
    """``prompt`` and what the model writes after it; an empty prompt starts a document.

    ``writer`` gets the experts of every token that the model read, as sample 0: all but the last one written.
    """
    prompt = as_text(prompt)  # typed on a command line, perhaps of another encoding
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    routes = None if writer is None else OneSequence(writer)
    was_training = model.training
    model.eval()
    try:
        new_ids = generate(
            model,
            prompt_ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_id=tokenizer.eos_id,
            observe=None if routes is None else routes.add,
        )
    finally:
        model.train(was_training)
    if routes is not None:
        routes.write()
    return prompt + tokenizer.decode(new_ids)


def generate_app(cfg: GenerateConfig, read: ReadTrained) -> int:
    """``moetrain generate``: print the prompt and its continuation. Returns the exit code."""
    check_generate(cfg)
    prompt = _prompt(cfg)
    checkpoint = find_checkpoint(Path(cfg.checkpoint))
    trained = read(checkpoint)
    tokenizer = load_tokenizer(run_of(checkpoint) / TOKENIZER)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = found if cfg.device == "auto" else cfg.device
    vocab_size = trained.model.vocab_size or tokenizer.vocab_size
    wide = Precision.fp64 in (trained.train.precision, cfg.precision)
    model = unloaded_decoder(trained.model, trained.router, trained.experts, vocab_size, wide, device)
    load_checkpoint(checkpoint, model_tensors(model), prefix=MODEL, cast=True)
    if cfg.precision is Precision.bf16:
        round_for_inference(model, torch.bfloat16)
    writer = (
        None
        if cfg.record is None
        else RouteWriter(Path(cfg.record).expanduser(), model.routers(), key="record")
    )
    text = continue_text(
        model, tokenizer, prompt, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, cfg.seed, writer
    )
    show(text)
    return 0


def _prompt(cfg: GenerateConfig) -> str:
    if (cfg.prompt is None) == (cfg.prompt_file is None):
        raise UserError("give exactly one of prompt=... and prompt_file=...")
    if cfg.prompt is not None:
        return cfg.prompt
    try:
        return Path(str(cfg.prompt_file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file={cfg.prompt_file} cannot be read as text: {error}") from None
