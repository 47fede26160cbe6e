"""All targets by name, and single documents of them."""

from __future__ import annotations

from dataclasses import replace

from fuzz import of_alarms, of_checkpoint, of_data, of_hf, of_routes, of_run
from fuzz.known import DOCUMENTS, Document
from fuzz.target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (of_checkpoint, of_alarms, of_data, of_run, of_hf, of_routes)
    for target in module.TARGETS
}


def _single(document: Document) -> Target:
    target = TARGETS[document.target]
    ways = tuple(way for way in target.ways if document.way in ("", way.name))
    assert ways, document
    return replace(target, name=document.name, files=(document.file,), form=document.form, ways=ways)


KNOWN = {document.name: _single(document) for document in DOCUMENTS}
