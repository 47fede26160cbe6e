"""What the tests of training share: a corpus, and a process that looks as if nothing was trained in it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import interpreted  # noqa: F401 - before what imports Triton
import pytest
import tiny
from hypothesis import settings

from moetrain.moe.routers import ROUTERS, RouterSpec

_LONGEST = ("dist", "launch", "plugins", "fuzz")

settings.register_profile("no deadline", deadline=None)  # 200 ms an example would measure the machine
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The folders whose files take longest come first, lest one worker ends long after the other."""
    items.sort(key=lambda item: item.path.parent.name not in _LONGEST)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collection: walking it was a third of each composed config."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def proofs_end_before_tests() -> Iterator[None]:
    """Ranks of a proof that hang are told with their stacks, which pytest's own time-out would not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrain.verify.command._SECONDS", 200.0)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``text``, and room for the prepared corpora of all tests of the session in ``cache``."""
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def training() -> Iterator[None]:
    """Training in this process; see :func:`tiny.alone`."""
    with tiny.alone():
        yield


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with ``tiny.TRAINED``; nobody may change it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    with tiny.alone():
        assert tiny.train(corpus, run, *tiny.TRAINED) == 0
    return run


@pytest.fixture
def faulty(training: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training, and the overrides that choose the router of ``faulty_router.py``, whose faults may change."""
    import faulty_router as plugin

    ROUTERS.pop("faulty", None)  # importing it has registered it for good
    monkeypatch.setitem(ROUTERS, "faulty", RouterSpec("faulty", plugin.FaultyRouter, plugin.FaultyOptions))
    return ["plugins=[faulty_router]", "router=faulty", "resume_changes=[router]"]
