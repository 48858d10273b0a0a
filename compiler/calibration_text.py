"""Texts to calibrate on, as documents: files, and how a JSON object becomes a document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import smelt.models
from smelt.runtime.errors import UserError

BUILTIN = Path(str(smelt.models.__file__)).parent / "calibration" / "builtin.txt"
# A document of a .txt file: paragraphs up to about this many characters.
_DOCUMENT = 4000


@dataclass(frozen=True)
class Document:
    """text to tokenize; special: whether the tokenizer adds its own special tokens."""

    text: str
    special: bool = True


class Text(Protocol):
    """A source of documents. name: for the manifest; where: for messages; revision: if it has one.

    `documents` is read as far as needed; `sha256` and `left_out` are asked after that.
    """

    name: str
    where: str
    revision: str | None
    documents: Iterator[Document]

    def sha256(self) -> str:
        """Of the source."""

    def left_out(self, used: int) -> list[str]:
        """What was not used, in words, when `used` documents were."""


class FileText:
    """A .txt or .jsonl file, its documents in a seeded order.

    source "builtin": calibration.txt of `model_folder` if it has one, else the text that ships.
    Raises UserError for a file that is missing, empty, not UTF-8, of another kind or broken (with
    the line).
    """

    revision: str | None = None

    def __init__(
        self, source: str | Path, tokenizer: Any, seed: int, model_folder: Path | None
    ) -> None:
        path = _path(source, model_folder)
        self.name = "builtin" if path == BUILTIN else str(path)
        self.where = str(path)
        self._data = _read(path)
        documents = list(_documents(path, self._data, tokenizer))
        Random(seed).shuffle(documents)
        self._count = len(documents)
        self.documents = iter(documents)

    def sha256(self) -> str:
        return hashlib.sha256(self._data).hexdigest()

    def left_out(self, used: int) -> list[str]:
        if used == self._count:
            return []
        return [f"{self._count - used} of {self._count} documents not needed"]


def _path(source: str | Path, model_folder: Path | None) -> Path:
    if str(source) == "builtin":
        own = model_folder / "calibration.txt" if model_folder is not None else None
        return own if own is not None and own.is_file() else BUILTIN
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(
            f"no calibration file {path}; name a .txt or .jsonl file, or builtin for the text "
            "that ships"
        )
    if path.is_dir():
        raise UserError(f"calibration {path} is a folder; name a .txt or .jsonl file in it")
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"calibration {path} ends in {path.suffix or 'nothing'}; smelt reads .txt (plain text) "
            'and .jsonl (a JSON object a line, with "text" or "messages")'
        )
    return path


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"calibration {path} cannot be read: {error.strerror}") from error
    if not data.strip():
        raise UserError(f"calibration {path} is empty; give a text the model is meant for")
    return data


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"calibration {path} is not UTF-8 (line {line}, byte {error.start}); convert it with "
            "iconv -t utf-8"
        ) from error


def _documents(path: Path, data: bytes, tokenizer: Any) -> Iterator[Document]:
    text = _text(path, data)
    if path.suffix != ".jsonl":
        yield from (Document(part) for part in _pieces(text))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _json_document(path, number, line, tokenizer)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about _DOCUMENT characters, cut between lines."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= _DOCUMENT:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _json_document(path: Path, number: int, line: str, tokenizer: Any) -> Document:
    where = f"calibration {path}, line {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where} is a {type(entry).__name__}, expected an object")
    return document(entry, where, tokenizer)


def document(entry: dict[str, Any], where: str, tokenizer: Any) -> Document:
    """The "text" of an object, or its "messages" through the chat template.

    Raises UserError where it has neither (naming what it has) and where the template refuses.
    """
    if isinstance(entry.get("text"), str):
        return Document(entry["text"])
    messages = entry.get("messages")
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        raise UserError(
            f'{where} has neither "text" nor "messages" with role and content; '
            f"it has {', '.join(sorted(entry)) or 'nothing'}"
        )
    template = getattr(tokenizer, "apply_chat_template", None)
    try:
        if template is None:
            raise ValueError("this tokenizer has none")
        text = template(messages, tokenize=False)
    except Exception as error:  # a template is a program of the model's author
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"{where} does not go through the model's chat template ({first}); "
            'use objects with "text"'
        ) from error
    return Document(str(text), special=False)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= set(value)
