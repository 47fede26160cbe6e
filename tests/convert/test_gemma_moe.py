"""An MoE made of Gemma 3's language model: it trains, and transformers computes it by the code beside it.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from hf_cases import convert, export, load_ours, refused, transformers, write_theirs
from hf_families import FAMILIES
from hf_family import VOCAB
from hf_remote_cases import load

from moetrain.cli import main
from moetrain.models import generate

WORDS = 40  # in a document


def write_text(folder: Path) -> Path:
    draw = torch.Generator().manual_seed(3)
    folder.mkdir()
    for number in range(30):
        words = torch.randint(10, (WORDS,), generator=draw).tolist()
        (folder / f"{number:02}.txt").write_text(" ".join(f"w{word}" for word in words))
    return folder


@pytest.mark.real
def test_it_trains_and_goes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = write_theirs(FAMILIES["gemma3_text"].their_model(torch.float32), tmp_path / "source")
    said = ("model.num_experts=4", "router.top_k=2", "model.first_dense=1", "prove=false")
    assert main(["upcycle", f"source={source}", f"target={tmp_path}/moe", *said]) == 0
    text, run = write_text(tmp_path / "text"), tmp_path / "run"
    with tiny.alone():
        command = [
            "train", f"init_from={tmp_path}/moe", f"run.dir={run}", "data=local", f"data.path={text}",
            f"data.cache_dir={tmp_path}/cache", "data.seq_len=16", "train.micro_batch_size=2",
            "train.global_batch_tokens=64", "train.steps=3", "train.eval_samples=2", "train.sample_tokens=3",
            "schedule.warmup_steps=0", "train.threads=1",
        ]  # fmt: skip
        assert main(command) == 0
    (before, first), (spec, ours) = load_ours(tmp_path / "moe"), load_ours(run)
    assert before.model == spec.model
    moved = [name for name, p in ours.named_parameters() if not torch.equal(p, first.get_parameter(name))]
    assert {name for name in moved if "_out_norm" in name} >= {"blocks.0.attention_out_norm.weight_D"}
    line = refused(capsys, "export", f"checkpoint={run}", f"target={tmp_path}/auto")
    assert "gemma3_text: model.num_experts=4" in line
    theirs = load(export(run, tmp_path / "out", "family=moetrain"))
    ids_BS = torch.randint(VOCAB, (2, 23), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected_BSV = ours.eval().logits(ours(ids_BS).hidden_BSD)
        found_BSV = theirs(ids_BS).logits
    scale = expected_BSV.abs().max().item()
    torch.testing.assert_close(found_BSV, expected_BSV, rtol=0, atol=1e-5 * scale)
    prompt = ids_BS[0, :7].tolist()
    text_ids = theirs.generate(ids_BS[:1, :7], max_new_tokens=13, do_sample=False, eos_token_id=None)
    assert generate(ours, prompt, 13, temperature=0) == text_ids[0, 7:].tolist()
    again = convert(tmp_path / "out", tmp_path / "again")
    assert load_ours(again)[0] == spec
