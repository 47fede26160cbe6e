"""Where prepared data lies for a user without a home folder, and how often text is read."""

import multiprocessing
import os
import pwd
import tempfile

import pytest
from data_cases import documents, text_folder

from moetrain.cache_folder import cache_root
from moetrain.data import prepare
from moetrain.data.options import TokenizerConfig
from moetrain.data.sources.local import LocalSource
from moetrain.errors import UserError

fork = multiprocessing.get_context("fork")


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """No HOME, no entry in passwd, and temporary files in ``tmp_path``."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"moetrain-{os.getuid()}"


def test_a_user_without_a_home_has_a_cache_of_their_own(homeless, monkeypatch):
    assert cache_root() == cache_root() == homeless
    assert homeless.stat().st_mode & 0o777 == 0o700
    assert str(cache_root("~/here")) == "~/here"  # as a shell leaves it
    monkeypatch.setenv("XDG_CACHE_HOME", "/set")
    assert str(cache_root()) == "/set/moetrain"


@pytest.mark.parametrize("kind", ["link", "open to all", "another's", "file"])
def test_a_cache_that_others_may_write_is_not_used(homeless, kind, tmp_path, monkeypatch):
    if kind == "link":
        (tmp_path / "far").mkdir()
        homeless.symlink_to(tmp_path / "far")
    elif kind == "file":
        homeless.touch()
    else:
        homeless.mkdir()
        homeless.chmod(0o777 if kind == "open to all" else 0o700)
    if kind == "another's":
        uid = os.getuid()
        (tmp_path / f"moetrain-{uid + 1}").mkdir()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(UserError, match=r"no home folder, and .*; set data\.cache_dir or XDG_CACHE_HOME"):
        cache_root()


def _as_nobody_known(folder):
    os.environ.pop("HOME", None)
    os.environ.pop("XDG_CACHE_HOME", None)
    tempfile.tempdir = str(folder)
    os.setuid(987_654)
    os._exit(7 if cache_root() == folder / "moetrain-987654" else 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_bare_user_number_has_a_cache(tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is shut to others
        os.chmod(folder, 0o777)
        child = fork.Process(target=_as_nobody_known, args=(type(tmp_path)(folder),))
        child.start()
        child.join(timeout=60)
        assert child.exitcode == 7


@pytest.mark.parametrize(("budget", "passes"), [(10**6, 1), (100, 3)])
def test_a_small_corpus_is_read_once(tmp_path, monkeypatch, budget, passes):
    monkeypatch.setattr("moetrain.data.documents.REMEMBERED_BYTES", budget)
    read = []
    original = LocalSource.documents
    monkeypatch.setattr(LocalSource, "documents", lambda self: read.append(1) or original(self))
    cfg = text_folder(tmp_path, documents(40))
    corpus = prepare(type(cfg)(**{**vars(cfg), "tokenizer": TokenizerConfig(vocab_size=270)}))
    assert len(read) == passes
    assert corpus.train.num_documents + corpus.val.num_documents == 40
