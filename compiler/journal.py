"""What calibration has found so far, on disk: a compilation that was killed goes on from there.

A journal is a folder in the user's cache, one safetensors file for each linear. Its name is a hash
of everything the results depend on: the graph and its plan, the samples and the method's settings
(given by the pass), the checkpoint's files, and the versions of smelt's code and of torch. It goes
when the artifact is complete; one that nobody came back for goes after `KEPT_DAYS`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, MutableMapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import smelt.passes
import smelt.runtime.ops
from smelt.runtime.integrity import cache_folder, digest

KEPT_DAYS = 14
_SUFFIX = ".safetensors"


class Journal(MutableMapping[str, dict[str, Any]]):
    """Name -> fields (tensors, numbers, strings, None), each entry a file written whole or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, name: str) -> Path:
        return self.folder / (quote(name, safe="") + _SUFFIX)

    def __getitem__(self, name: str) -> dict[str, Any]:
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                fields = json.loads(file.metadata()["fields"])
                return fields | {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise KeyError(name) from error  # not there, or not whole: it is searched again

    def __setitem__(self, name: str, fields: dict[str, Any]) -> None:
        tensors = {k: v.contiguous() for k, v in fields.items() if isinstance(v, torch.Tensor)}
        rest = {k: v for k, v in fields.items() if k not in tensors}
        path = self._path(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file(tensors, temporary, {"fields": json.dumps(rest)})
        os.replace(temporary, path)

    def __delitem__(self, name: str) -> None:
        try:
            self._path(name).unlink()
        except FileNotFoundError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            yield unquote(path.name.removesuffix(_SUFFIX))

    def __len__(self) -> int:
        return len(list(self.folder.glob(f"*{_SUFFIX}")))


class Journals:
    """The journals of one compilation.

    checkpoint: the folder the weights come from. resumed(count): called when a journal is opened
    that holds the results of so many linears already.
    """

    def __init__(self, checkpoint: Path, resumed: Callable[[int], None] = lambda _: None) -> None:
        self.root = cache_folder() / "calibration"
        self.checkpoint = checkpoint
        self.resumed = resumed
        self.opened: list[Journal] = []

    def __call__(self, calibration: str) -> Journal:
        """The journal of a calibration, by the pass's description of it."""
        _forget_old(self.root)
        parts = [calibration, _files(self.checkpoint), _code(), torch.__version__]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        journal = Journal(self.root / key)
        self.opened.append(journal)
        if journal:
            self.resumed(len(journal))
        return journal

    def discard(self) -> None:
        """Delete what this compilation wrote: its artifact is complete."""
        for journal in self.opened:
            shutil.rmtree(journal.folder, ignore_errors=True)
        self.opened.clear()


def _files(folder: Path) -> str:
    """Name, size and modification time of the files a model is read from."""
    found = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin"))
    stats = [(path.resolve(), path.stat()) for path in found]
    return json.dumps([(str(p), s.st_size, s.st_mtime_ns) for p, s in stats])


@cache
def _code() -> str:
    """Digest of the source of everything that computes in a calibration."""
    h = hashlib.sha256()
    for package in (smelt.passes, smelt.runtime.ops):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            h.update(digest(path).encode())
    return h.hexdigest()


def _forget_old(root: Path) -> None:
    if not root.is_dir():
        return
    for folder in root.iterdir():
        try:
            age = time.time() - folder.stat().st_mtime
        except OSError:
            continue  # another compilation has just deleted it
        if age > KEPT_DAYS * 86400:
            shutil.rmtree(folder, ignore_errors=True)
