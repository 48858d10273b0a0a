"""File hashes of an artifact, verified once per file state and remembered per user."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import SmeltError

_ALWAYS_HASHED = 8 << 20
_CHUNK = 4 << 20


class IntegrityError(SmeltError):
    """A file of an artifact is missing, truncated or altered."""


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    h = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            h.update(chunk)
    return h.hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """{"bytes", "sha256"} of a file, as a manifest holds it."""
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def verify(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check every file against the manifest.

    Sizes and the hashes of small files are checked at every open. A large file is hashed once: a
    note in the user's cache (path, size, modification time, inode, hash) says it was, so that
    opening a model again does not read all of it. Raises IntegrityError naming the file.
    """
    seen = _load_notes()
    changed = False
    for name, wanted in files.items():
        path = folder / name
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise IntegrityError(f"{folder}: the manifest names {name!r}, outside the artifact")
        if not path.is_file():
            raise IntegrityError(f"{folder}: {name} is missing; copy the whole folder again")
        stat = path.stat()
        if stat.st_size != wanted["bytes"]:
            raise IntegrityError(
                f"{folder}: {name} has {stat.st_size} bytes, {wanted['bytes']} were written; "
                "it is truncated, copy the folder again"
            )
        stamp = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}:{wanted['sha256']}"
        if stat.st_size > _ALWAYS_HASHED and seen.get(str(path.resolve())) == stamp:
            continue
        if digest(path) != wanted["sha256"]:
            raise IntegrityError(
                f"{folder}: {name} was altered after it was written (its hash differs); "
                "compile the model again"
            )
        if stat.st_size > _ALWAYS_HASHED:
            seen[str(path.resolve())] = stamp
            changed = True
    if changed:
        _save_notes(seen)


def cache_folder() -> Path:
    """smelt's folder in the user's cache."""
    given = os.environ.get("SMELT_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smelt"


def _notes_path() -> Path:
    return cache_folder() / "verified.json"


def _load_notes() -> dict[str, str]:
    try:
        data = json.loads(_notes_path().read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _save_notes(notes: dict[str, str]) -> None:
    """A note that is lost costs a hash at the next open: a cache not writable is no error."""
    path = _notes_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(dict(list(notes.items())[-256:])))
        os.replace(temporary, path)
    except OSError:
        return
