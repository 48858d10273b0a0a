"""What a section's process tells the benchmark that started it: a line of JSON for each thing.

    {"begin": name}                    work on a row began
    {"row": {...}}                     it is there
    {"failed": name, "error": text}    or it is not
    {"note": {...}}                    facts of the section as a whole
    {"end": true}                      nothing is left to do

A process that dies in between has said which row it died of. One that takes over does what is left;
work whose name begins with LOADING only prepares, so it is done again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOADING = "load "


class Lines:
    """Writes lines to a file that somebody follows."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def begin(self, name: str) -> None:
        self._write({"begin": name})

    def row(self, row: dict[str, Any]) -> None:
        self._write({"row": row})

    def failed(self, name: str, error: str) -> None:
        self._write({"failed": name, "error": error})

    def note(self, facts: dict[str, Any]) -> None:
        self._write({"note": facts})

    def end(self) -> None:
        self._write({"end": True})


class Follower:
    """Reads what a `Lines` of another process has written since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def new(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return []
        self._at += len(whole) + 1
        return [json.loads(line) for line in whole.splitlines()]
