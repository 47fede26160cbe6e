"""What every registered router may be exported as, and why not as anything else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from model_cases import TINY, VOCAB

from moetrain.models.hf import FAMILIES, ModelSpec, families_for
from moetrain.moe import ROUTERS

MODEL = replace(TINY, vocab_size=VOCAB, num_experts=4)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_a_router_has_a_family_or_the_reason_why_not(name: str) -> None:
    options = ROUTERS[name].options()
    assert options.name == name
    spec = ModelSpec(MODEL, options)
    rule = options.evaluation_rule(MODEL.num_experts) if ROUTERS[name].exported else None
    coded, more = families_for(spec, with_code=True)
    assert [family.model_type for family in coded] == (["moetrain"] if rule is not None else [])
    if rule is None:
        (reason,) = more
        assert reason.startswith(f"moetrain: router={name} ")
        assert "is not among the exported: " in reason or "has no rule that is exported" in reason
    able, reasons = families_for(spec)
    assert len(able) + len(reasons) + len(coded) + len(more) == len(FAMILIES)
    for reason in reasons:
        family, _, why = reason.partition(": ")
        assert family in FAMILIES
        assert why
        assert "\n" not in reason
    if rule is None:  # what no code of ours can do, no class of theirs does
        assert able == []
        assert any(f"router={name}" in reason or "router" in reason for reason in reasons)
