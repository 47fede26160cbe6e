"""What becomes of documents before they are tokenised."""

from moetrain.data.documents import Document, Part


class ListSource:
    label = "a list"

    def __init__(self, documents):
        self.given = documents

    def documents(self):
        return iter(self.given)


def test_blank_documents_drop_and_lone_surrogates_are_replaced():
    documents = [Document("", "a"), Document(" \n", "a"), Document("x\ud800y", "b"), Document("é", "c")]
    cleaned = list(Part(ListSource(documents)).cleaned())
    assert [(document.text, document.domain) for document in cleaned] == [("x?y", "b"), ("é", "c")]
    assert cleaned[1].raw == b"\xc3\xa9"
