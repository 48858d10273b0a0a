"""Calibration text: what the quantizer runs through the model, from a file or the shipped text.

Sources are `builtin`, a .txt or a .jsonl file (objects with "text", or with "messages", which go
through the model's chat template). The text is tokenized document by document in a seeded order and
cut into sequences of equal length; what does not fit is counted, never dropped silently.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import smelt.models
from smelt.runtime.errors import UserError

BUILTIN = Path(str(smelt.models.__file__)).parent / "calibration" / "builtin.txt"
# A document of a .txt file: paragraphs up to about this many characters.
_DOCUMENT = 4000
# Tokens looked at to tell whether the tokenizer knows the text's language, and how many may be
# unknown or halves of characters.
_PROBE = 4000
_MAX_BROKEN = 0.5


class Tokenizer(Protocol):
    """What is needed of a tokenizer; transformers' have it. Chat files also need
    `apply_chat_template(messages, tokenize=False)`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Calibration(Sequence[tuple[int, ...]]):
    """Token sequences, all of one length, and where they come from.

    sha256: of the source's bytes. tokens: how many the sequences hold. dropped: what was left out,
    in words.
    """

    token_lists: tuple[tuple[int, ...], ...]
    source: str
    sha256: str
    tokens: int
    dropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.token_lists)

    def __getitem__(self, index: Any) -> Any:
        return self.token_lists[index]

    def to_json(self) -> dict[str, Any]:
        """For the manifest: everything but the tokens themselves."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "samples": len(self.token_lists),
            "tokens": self.tokens,
            "dropped": list(self.dropped),
        }


def load_calibration(
    source: str | Path,
    tokenizer: Tokenizer,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    model_folder: Path | None = None,
) -> Calibration:
    """Up to `samples` sequences of `seqlen` tokens.

    source "builtin": calibration.txt of `model_folder` if it has one, else the text that ships.
    Raises UserError for a file that is missing, empty, not UTF-8, of another kind, broken (with
    the line), too short for one sequence, or in a language the tokenizer does not know.
    """
    if samples < 1 or seqlen < 2:
        raise UserError(
            f"calibration needs at least 1 sample of 2 tokens, not {samples} of {seqlen}"
        )
    path = _path(source, model_folder)
    data = _read(path)
    documents = list(_documents(path, data, tokenizer))
    random.Random(seed).shuffle(documents)
    stream, used = _encode(path, documents, tokenizer, samples * seqlen)
    count = min(samples, len(stream) // seqlen)
    if count == 0:
        raise UserError(
            f"{path} holds {len(stream)} tokens, less than one calibration sample of {seqlen}; "
            f"give a longer text or --calib-seqlen {max(2, len(stream))}"
        )
    lists = tuple(tuple(stream[i * seqlen : (i + 1) * seqlen]) for i in range(count))
    dropped = []
    if used < len(documents):
        dropped.append(f"{len(documents) - used} of {len(documents)} documents not needed")
    if len(stream) > count * seqlen:
        dropped.append(f"{len(stream) - count * seqlen} tokens after the last full sample")
    if count < samples:
        dropped.append(f"{samples - count} of {samples} samples asked for: the text is too short")
    digest = hashlib.sha256(data).hexdigest()
    name = "builtin" if path == BUILTIN else str(path)
    return Calibration(lists, name, digest, count * seqlen, tuple(dropped))


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


@dataclass(frozen=True)
class _Document:
    """text to tokenize; special: whether the tokenizer adds its own special tokens."""

    text: str
    special: bool = True


def _documents(path: Path, data: bytes, tokenizer: Any) -> Iterator[_Document]:
    text = _text(path, data)
    if path.suffix != ".jsonl":
        yield from (_Document(part) for part in _pieces(text))
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


def _json_document(path: Path, number: int, line: str, tokenizer: Any) -> _Document:
    where = f"calibration {path}, line {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where} is a {type(entry).__name__}, expected an object")
    if isinstance(entry.get("text"), str):
        return _Document(entry["text"])
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
    return _Document(str(text), special=False)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= set(value)


def _encode(
    path: Path, documents: Sequence[_Document], tokenizer: Tokenizer, wanted: int
) -> tuple[list[int], int]:
    """(tokens of as many documents as give `wanted`, how many documents that took)."""
    stream: list[int] = []
    used = 0
    for document in documents:
        if len(stream) >= wanted:
            break
        if document.special:
            stream += tokenizer.encode(document.text)
        else:
            stream += tokenizer.encode(document.text, add_special_tokens=False)
        used += 1
    _check_language(path, tokenizer, stream[:_PROBE])
    return stream, used


def _check_language(path: Path, tokenizer: Any, tokens: Sequence[int]) -> None:
    """Raise UserError when most tokens are unknown ones or halves of characters."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    decode = getattr(tokenizer, "decode", None)
    known: dict[int, bool] = {}
    for token in set(tokens):
        broken = token == unknown
        if not broken and decode is not None:
            broken = "\ufffd" in decode([token])
        known[token] = not broken
    share = sum(not known[token] for token in tokens) / max(len(tokens), 1)
    if share > _MAX_BROKEN:
        raise UserError(
            f"calibration {path}: {100 * share:.0f} % of its tokens are unknown to the model's "
            "tokenizer or halves of characters; is the text in a language of the model?"
        )
