"""Layers that predict further tokens in families' files: their function, and the way there and back.

The oracle is a model of transformers of one layer, which reads what the published matrix makes of the
embedding and the state. Shapes: B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from further_cases import NAMES, write
from hf_cases import assert_same_tensors, convert, export, load_ours, load_theirs
from hf_family import VOCAB
from torch import Tensor

IDS_BS = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(5))


def normed(x_BSD: Tensor, weight_D: Tensor, like: Any) -> Tensor:
    """By transformers' own class of norms."""
    norm = type(like)(x_BSD.shape[-1], getattr(like, "variance_epsilon", getattr(like, "eps", None)))
    norm.weight.copy_(weight_D)
    result: Tensor = norm(x_BSD)
    return result


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.real] * (n != "glm4_moe")) for n in NAMES],
)
@torch.no_grad()
def test_a_further_layer_is_kept_and_goes_back(name, tmp_path, monkeypatch, capsys):
    made = write(name, tmp_path / "source")
    converted = convert(made.folder, tmp_path / "ours")
    assert "left out" not in capsys.readouterr().err
    spec, ours = load_ours(converted)
    assert spec.model.future.layers == 1
    output = ours(IDS_BS, look_ahead=True)
    theirs = made.theirs.model(IDS_BS).last_hidden_state
    scale = float(made.theirs(IDS_BS).logits.abs().max())
    assert torch.allclose(
        ours.logits(output.hidden_BSD), made.theirs(IDS_BS).logits, rtol=0, atol=1e-5 * scale
    )

    token_BSD = made.theirs.model.embed_tokens(IDS_BS[:, 1:])
    like, joining, names = made.theirs.model.norm, made.joining, made.names
    pair = [
        normed(token_BSD, joining[names.token_norm], like),
        normed(theirs[:, :-1], joining[names.hidden_norm], like),
    ]
    expected_BSV = made.alone(inputs_embeds=torch.cat(pair, -1) @ joining[names.join].T).logits
    found_BSV = ours.logits(output.ahead[0])[:, :-1]
    scale = float(expected_BSV.abs().max())
    assert scale > 1
    torch.testing.assert_close(found_BSV, expected_BSV, rtol=0, atol=1e-5 * scale)

    back = export(converted, tmp_path / "back")
    assert_same_tensors(made.folder, back)
    config = json.loads((back / "config.json").read_text())
    assert {key: config[key] for key in names.config} == names.config
    if names.copies:  # transformers names the layers of published models only
        ignored = [rf"model\.layers\.{spec.model.num_layers}.*"]
        monkeypatch.setattr(type(made.theirs), "_keys_to_ignore_on_load_unexpected", ignored)
    again = load_theirs(back)(IDS_BS).logits
    torch.testing.assert_close(again, made.theirs(IDS_BS).logits, rtol=0, atol=1e-5)


def other_copy(held: dict[str, Tensor]) -> None:
    held["model.layers.3.shared_head.head.weight"][0, 0] += 1


def no_join(held: dict[str, Tensor]) -> None:
    del held["model.layers.3.eh_proj.weight"]


def one_more(held: dict[str, Tensor]) -> None:
    held["model.layers.3.extra.weight"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_copy, "model.layers.3.shared_head.head.weight is another than the decoder's own"),
        (no_join, "which are not read in this form"),
        (one_more, "which are not read in this form"),
    ],
    ids=["a copy that differs", "one missing", "one too many"],
)
@pytest.mark.real
def test_what_is_no_such_layer_is_left_out_and_said(change, why, tmp_path, capsys):
    made = write("glm4_moe", tmp_path / "source", change)
    converted = convert(made.folder, tmp_path / "ours")
    assert why in capsys.readouterr().err
    spec, _ = load_ours(converted)
    assert spec.model.future.layers == 0
