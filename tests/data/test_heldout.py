"""The held-out side is decided by content: for each domain, on any machine, with any seed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.documents import Document, Part, content_key
from moetrain.data.heldout import MAX_DOMAINS, HeldOut, scan
from moetrain.errors import UserError


class ListSource:
    label = "a list"

    def __init__(self, documents):
        self.given = [Document(text, domain) for text, domain in documents]

    def documents(self):
        return iter(self.given)


def sides(documents, val_fraction):
    """domain -> (texts trained on, texts held out)"""
    part = Part(ListSource(documents))
    held_out = scan([part], val_fraction).held_out
    found = {}
    for document in part.cleaned():
        found.setdefault(document.domain, (set(), set()))[held_out(document.key)].add(document.text)
    return found


def test_the_key_is_the_same_on_every_machine():
    assert content_key(b"moe") == 0x7C9900AECDEAB5F2


def test_the_share_of_held_out_documents_is_val_fraction():
    found = sides([(f"document {i}", "d") for i in range(4000)], 0.1)["d"]
    assert 330 < len(found[1]) < 470  # 400, within 3.7 standard deviations


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(
        st.tuples(st.integers(0, 12).map("text {}".format), st.sampled_from("abc")), min_size=1, max_size=30
    ),
    val_fraction=st.sampled_from([0.001, 0.02, 0.5, 0.98, 0.999]),
)
def test_identical_documents_share_a_side_and_sides_are_filled(documents, val_fraction):
    found = sides(documents, val_fraction)
    trained = set().union(*(trained for trained, _ in found.values()))
    held = set().union(*(held for _, held in found.values()))
    assert not trained & held
    if len({text for text, _ in documents}) > 1:
        assert trained
        assert held


def test_every_domain_of_two_documents_has_both_sides():
    documents = [(f"{domain} {i}", domain) for domain in "abcdef" for i in range(2)] + [("alone", "g")]
    for val_fraction in (1e-6, 0.5, 1 - 1e-6):
        found = sides(documents, val_fraction)
        assert all(len(trained) == len(held) == 1 for name, (trained, held) in found.items() if name != "g")
        assert found["g"] == ({"alone"}, set())


def test_domains_of_one_document_each_still_give_one_to_hold_out():
    for val_fraction in (1e-6, 0.5, 1 - 1e-6):
        found = sides([(f"text of {name}", name) for name in "abcde"], val_fraction)
        assert sum(len(held) for _, held in found.values()) == 1


def test_exceptions_flip_single_documents():
    rule = HeldOut(0.5, frozenset({1, 2**64 - 1}))
    assert [rule(key) for key in (0, 1, 2**64 - 2, 2**64 - 1)] == [True, False, False, True]


def test_the_scan_counts_and_keeps_domains_in_order():
    result = scan(
        [Part(ListSource([("one", "z"), ("", "y"), ("twö", "a")])), Part(ListSource([("x", "z")]))], 1e-9
    )
    assert (result.documents, result.train_bytes, result.domains) == (3, 8, ["z", "a"])


def test_a_part_without_text_is_named():
    parts = [Part(ListSource([("text", "d")]), "full"), Part(ListSource([(" \n", "d")]), "empty")]
    with pytest.raises(UserError, match=r"data\.parts\.empty \(a list\) holds no text \(0 documents"):
        scan(parts, 0.1)


def test_a_column_that_is_no_label_is_refused():
    documents = [(f"text {i}", f"id {i}") for i in range(MAX_DOMAINS + 1)]
    with pytest.raises(UserError, match="more than 256 domains"):
        scan([Part(ListSource(documents))], 0.1)
