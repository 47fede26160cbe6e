"""Suggestions for a misspelt name."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from moetrain.config.hydra.compose import compose_train
from moetrain.nearest import near_miss, nearest

KEYS = [f.name for f in dataclasses.fields(compose_train.__globals__["TrainConfig"])]


@given(st.sampled_from([k for k in KEYS if len(k) > 4]), st.data())
def test_one_slip_of_the_finger_is_understood(key, data):
    at = data.draw(st.integers(0, len(key) - 1))
    slips = [key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key[:at] + "x" + key[at + 1 :], key.upper()]
    for slip in slips:
        assert near_miss(slip, KEYS) == key


@given(st.text(max_size=8), st.lists(st.text(st.characters(codec="ascii"), max_size=8), max_size=6))
def test_a_suggestion_is_always_a_known_name(word, known):
    assert near_miss(word, known) in [None, *known]
    said = nearest(word, known)
    assert said == "" or all(k in said for k in known if not k.startswith("_"))
