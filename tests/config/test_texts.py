"""Any text as a value: taken as typed, printed as typed, and the same in a file that is read back."""

import dataclasses

from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moetrain.config.hydra.compose import (
    compose_app,
    compose_train,
    load_yaml,
)
from moetrain.config.hydra.overrides import normalize
from moetrain.plain import to_yaml
from moetrain.train.options import CompareConfig, GenerateConfig, RunConfig

TEXTS = st.text(st.sampled_from(list("ab'\"\\ =(){}[],:$%#\n\t1e.-+~*é")), max_size=12)


@settings(deadline=None, max_examples=200)
@given(TEXTS)
def test_any_text_reaches_a_text_key_as_typed(text):
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if quoted or "${" in text or text == "null":
        return
    (override,) = normalize(GenerateConfig, [f"prompt={text}"])
    assert str(OverridesParser.create().parse_override(override).value()) == text


def test_a_prompt_needs_no_quotes_of_its_own():
    for prompt in (
        'def f(x): return "a" + {1: 2}[x]',
        "it's",
        "a\\",
        "x=1, y=2",
        "",
        "  spaced  ",
        "naïve\nlines",
    ):
        assert prompt_of(["checkpoint=/a b/[c]", f"prompt={prompt}"]) == prompt
    assert prompt_of(["checkpoint=x", "prompt='a: b'"]) == "a: b"
    assert prompt_of(["checkpoint=x", "prompt=null"]) is None


def prompt_of(overrides: list[str]) -> str | None:
    return compose_app(GenerateConfig, "generate", overrides).prompt


PIECES = st.lists(st.sampled_from(["${", "}", "\\", *"a:'\"#-e1. \n?~$"]), max_size=10)


@settings(deadline=None, max_examples=25)
@given(PIECES.map("".join), st.floats(1e-30, 1e30))
@example("\\${a}", 1e-5)
@example("\\\\${oc.env:HOME}", 1e22)
def test_yaml_reads_back_equal(tmp_path_factory, text, number):
    base = _plain_base()
    cfg = dataclasses.replace(
        base,
        run=RunConfig(name=text),
        train=dataclasses.replace(base.train, sample_prompt=text),
        optim=dataclasses.replace(base.optim, lr=number),
        compare=CompareConfig(arms={"a": [text]}, seeds=[1]),
    )
    if "???" in text:
        return
    file = tmp_path_factory.getbasetemp() / "hypothesis.yaml"
    file.write_text(to_yaml(cfg))
    assert load_yaml(file) == cfg


_BASES = []


def _plain_base():
    if not _BASES:
        _BASES.append(compose_train([]))
    return _BASES[0]


def test_what_is_printed_is_what_is_typed():
    text = to_yaml(_plain_base())
    assert "precision: fp32\n" in text
    assert "scope: global_batch\n" in text
    assert "hydra" not in text
    assert "Enum" not in text
    assert "!!" not in text
