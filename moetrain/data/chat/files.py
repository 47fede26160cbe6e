"""The chat template that lies beside a tokenizer, in the places where transformers looks, and its words."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from moetrain.errors import UserError
from moetrain.files import MB, belongs, parse_json, read_bytes

_LARGEST = 10 * MB
_DEFAULT, _TOOLS = "default", "tool_use"
_JINJA = "chat_template.jinja"
_MORE = "additional_chat_templates"
_CONFIG, _WORDS = "tokenizer_config.json", "special_tokens_map.json"


@dataclass(frozen=True)
class _Word:
    content: str


@dataclass(frozen=True)
class _Named:
    name: str
    template: str


@dataclass(frozen=True)
class _Template:
    chat_template: str | list[_Named] | None = None


@dataclass(frozen=True)
class TemplateFiles:
    """``templates``: name -> Jinja text, ``default`` among them. ``words``: ``bos_token`` and the like."""

    templates: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    def chosen(self, tools: bool) -> str | None:
        """The text for a conversation with or without tools, as transformers chooses it."""
        if tools and _TOOLS in self.templates:
            return self.templates[_TOOLS]
        return self.templates.get(_DEFAULT)

    def save(self, folder: Path) -> None:
        """Write what transformers reads. Nothing where there is no template."""
        self.save_templates(folder)
        if self.templates:
            (folder / _WORDS).write_text(json.dumps(self.words, indent=1) + "\n", encoding="utf-8")

    def save_templates(self, folder: Path) -> None:
        """Without the words, for a folder that has them."""
        for name, text in self.templates.items():
            file = folder / _JINJA if name == _DEFAULT else folder / _MORE / f"{name}.jinja"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="")


def read_template_files(folder: Path) -> TemplateFiles:
    """What the folder has; a file of its own comes before one in a settings file."""
    templates: dict[str, str] = {}
    for name in (_CONFIG, "chat_template.json"):
        if _is_there(folder / name):
            found = parse_json(read_bytes(folder / name, _LARGEST), _Template, f"cannot read {folder / name}")
            if isinstance(found.chat_template, str):
                templates[_DEFAULT] = found.chat_template
            else:
                templates |= {each.name: each.template for each in found.chat_template or ()}
    for file in sorted((folder / _MORE).glob("*.jinja")):
        if _is_there(file):
            templates[file.stem] = read_template(file)
    if _is_there(folder / _JINJA):
        templates[_DEFAULT] = read_template(folder / _JINJA)
    return TemplateFiles(templates, _words(folder))


def _is_there(file: Path) -> bool:
    """Whether the folder has it. A link out of a folder is not followed: an export would publish its text."""
    return file.is_file() and belongs(file)


def read_template(file: Path) -> str:
    """The text of a template's file. Raises UserError where it is none."""
    try:
        return read_bytes(file, _LARGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no template: it is not UTF-8 text (byte {error.start})") from None


def _words(folder: Path) -> dict[str, str]:
    """Every ``..._token`` of the two files: a text, or an object with its content."""
    words: dict[str, str] = {}
    for name in (_WORDS, _CONFIG):
        if not _is_there(folder / name):
            continue
        found = parse_json(
            read_bytes(folder / name, _LARGEST), dict[str, object], f"cannot read {folder / name}"
        )
        for key, value in found.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                words[key] = text
    return words
