"""The extra state of a checkpoint that was changed and signed again: one line, and nothing is taken over."""

import copy
import json
import re
import shutil

import pytest
import tiny

from moetrain.checkpoint.read import read_extra
from moetrain.checkpoint.saved_state import SavedState
from moetrain.checkpoint.state_dict import rng_state
from moetrain.errors import UserError

EXTRA = {
    "step": 8,
    "tokens": 8000,
    "skipped": [3],
    "loader": {"samples": 32, "seed": 0, "fingerprint": "ab"},
    "monitor": {"sum": 1.5, "count": 7},
    "meter": {"seconds": 3.25},
    "rng": rng_state(),
}
ODD = [None, True, "7", -1, 1.5, 1e300, 10**30, [], {}, "", "zz", [[]]]


def _leaves(value, path=()):
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from _leaves(child, (*path, key))


def _with(path, value, remove=False):
    extra = copy.deepcopy(EXTRA)
    *parents, last = path
    inside = extra
    for key in parents:
        inside = inside[key]
    inside[last] = value
    if remove:
        del inside[last]
    return extra


PATHS = [path for path in _leaves(EXTRA) if path]


def test_what_a_training_saves_fits():
    saved = SavedState.of(EXTRA, "here")
    assert (saved.step, saved.skipped, saved.loader.samples, saved.identity) == (8, (3,), 32, None)
    newer = EXTRA | {"identity": {"router.name": "topk", "tokenizer": "aa"}, "unheard_of": [1]}
    assert SavedState.of(newer, "here").identity["router.name"] == "topk"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_every_field_that_is_odd_or_missing_is_one_line(path):
    for value in ODD:
        said = _refusal(_with(path, value))
        assert said is not None or _takes(path, value), f"{path} took {value!r}"
        assert said is None or (said.startswith("here: ") and "\n" not in said)
    if path[-1] != "gauss" and path != ("skipped", 0):
        with pytest.raises(UserError, match=f"{path[-1]}: Field required"):
            SavedState.of(_with(path, None, remove=True), "here")


def _refusal(extra) -> str | None:
    try:
        SavedState.of(extra, "here")
    except UserError as error:
        return str(error)
    return None


def _takes(path, value) -> bool:
    """Odd, yet of the field's own kind."""
    if path == ("skipped",):
        return value == []
    if path[-1] == "gauss":
        return value is None or type(value) in (int, float)
    if path[-1] in ("sum", "seconds"):
        return type(value) in (int, float) and (value >= 0 or path[-1] == "sum")
    if path[-1] in ("seed", "version"):
        return type(value) is int
    return value == "" or (path[-1] == "fingerprint" and isinstance(value, str))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 40}, "40 steps cannot have consumed 32 sequences"),
        ({"step": 6}, "6 steps cannot have had 7 losses"),
        ({"step": 0, "monitor": {"sum": 0.0, "count": 0}}, "0 steps cannot have consumed 32"),
        ({"rng": EXTRA["rng"] | {"numpy": EXTRA["rng"]["numpy"] | {"position": 625}}}, "rng.numpy.position"),
        ({"rng": EXTRA["rng"] | {"numpy": EXTRA["rng"]["numpy"] | {"words": "00" * 8}}}, "rng.numpy.words"),
    ],
    ids=["samples", "losses", "start", "beyond_the_words", "too_few_words"],
)
def test_values_that_contradict_each_other(change, message):
    with pytest.raises(UserError, match=message):
        SavedState.of(EXTRA | change, "here")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a":' * 10**5, "\0", "9" * 5000], ids=lambda text: text[:6]
)
def test_extra_that_is_no_object(tmp_path, text):
    (tmp_path / "extra.json").write_text(text)
    with pytest.raises(UserError, match=r"extra\.json: ") as caught:
        read_extra(tmp_path)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 13}, "extra.json is of step 13, its manifest of step 12"),
        ({"meter": {"seconds": "7"}}, r"extra.json: meter.seconds: .*found '7'"),
        ({"rng": None}, "extra.json: rng: "),
    ],
    ids=["step", "text_for_a_number", "no_rng"],
)
@pytest.mark.usefixtures("training")
def test_a_resume_from_signed_nonsense_changes_nothing(corpus, trained, tmp_path, capsys, change, message):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = tiny.checkpoint(run, tiny.STEPS)
    extra = json.loads((newest / "extra.json").read_text())
    (newest / "extra.json").write_text(json.dumps(extra | change))
    tiny.sign(newest)
    before = {name: (run / name).read_bytes() for name in tiny.files(run)}
    assert tiny.train(corpus, run, *tiny.TRAINED, "train.steps=20") == 2
    assert re.search(message, capsys.readouterr().err)
    assert {name: (run / name).read_bytes() for name in tiny.files(run)} == before
