"""Calibration text from a Hugging Face dataset: `hf:NAME`, `hf:NAME:SPLIT`, `hf:NAME:CONFIG:SPLIT`.

NAME is a dataset of the hub or a folder with data files (or one that `save_to_disk` wrote). Rows
are streamed: no more of a large dataset is downloaded than is used. Offline, a dataset of the hub
is read from the cache of the `datasets` library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smelt.runtime.errors import UserError

from .calibration_text import Document, document

PREFIX = "hf:"
# Of a streamed dataset, the order is drawn among so many rows at a time.
BUFFER = 10_000


class DatasetText:
    """The rows of one split, "text" or "messages" each, in an order drawn by the seed.

    `revision` is the commit of a hub's dataset, None for folders and offline. `sha256` is of the
    text that was taken, each document ended by a zero byte. Raises UserError in one line where
    the `datasets` library, the dataset, the configuration, the split or the columns are missing.
    """

    def __init__(self, source: str, tokenizer: Any, seed: int) -> None:
        name, config, split = _parse(source)
        self.name = self.where = source
        self._hash = hashlib.sha256()
        self._empty = 0
        self._exhausted = False
        self._rows, self.revision = _open(source, name, config, split, seed)
        self.documents = self._documents(tokenizer)

    def _documents(self, tokenizer: Any) -> Iterator[Document]:
        for number, row in enumerate(_iterate(self.where, self._rows), 1):
            if row.get("messages") is None and not (row.get("text", "-") or "").strip():
                self._empty += 1
                continue
            made = document(row, f"calibration {self.where}, row {number}", tokenizer)
            self._hash.update(made.text.encode() + b"\0")
            yield made
        self._exhausted = True

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def left_out(self, used: int) -> list[str]:
        left = [] if self._exhausted else [f"rows after the first {used + self._empty} not needed"]
        return [*left, *([f"{self._empty} rows without text"] if self._empty else [])]


def _parse(source: str) -> tuple[str, str | None, str]:
    """(name, configuration, split) of "hf:...", the split "train" where none is named."""
    name, *rest = source.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise UserError(
            f"--calib {source}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"
        )
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"


def _open(
    source: str, name: str, config: str | None, split: str, seed: int
) -> tuple[Any, str | None]:
    """(the split's rows in their order, the dataset's commit)."""
    try:
        import datasets
        from huggingface_hub import HfApi, constants
    except ImportError as error:
        raise UserError(
            f"--calib {source} needs the datasets library ({error}): pip install 'smelt[datasets]'"
        ) from error
    folder = Path(name).expanduser()
    revision = None
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            return _split(datasets.load_from_disk(str(folder)), split).shuffle(seed=seed), None
        if folder.is_dir():
            name = str(folder)
        elif not constants.HF_HUB_OFFLINE:
            revision = HfApi().dataset_info(name).sha
        if folder.is_dir() or revision is not None:
            rows = datasets.load_dataset(
                name, config, split=split, streaming=True, revision=revision
            )
            return rows.shuffle(seed=seed, buffer_size=BUFFER), revision
        return datasets.load_dataset(name, config, split=split).shuffle(seed=seed), None
    except StopIteration:  # where the library looks for the columns of a file without rows
        return (), revision
    except Exception as error:  # the library raises its own, pyarrow's and the connection's
        raise _failed(source, error) from error


def _split(saved: Any, split: str) -> Any:
    """The split of what `save_to_disk` wrote: a dictionary of splits, or one without a name."""
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise ValueError(f"no split {split}; it has {', '.join(saved)}")
    return saved[split]


def _iterate(source: str, rows: Any) -> Iterator[dict[str, Any]]:
    """The rows, errors of the library in one line. Raises UserError where there are none."""
    found = iter(rows)
    count = 0
    while True:
        try:
            row = next(found, None)
        except Exception as error:  # as in _open: rows are fetched and parsed here
            raise _failed(source, error) from error
        if row is None:
            break
        count += 1
        yield row
    if not count:
        raise UserError(f"--calib {source}: the split is empty; name another, as hf:NAME:SPLIT")


def _failed(source: str, error: Exception) -> UserError:
    """What the library or the hub said, in one line, and what to do."""
    said = " ".join(str(error).split())[:300].rstrip(".")
    advice = "check the name, the configuration and the split (hf:NAME:CONFIG:SPLIT)"
    if any(word in type(error).__name__ for word in ("Connect", "Timeout", "Offline")):
        advice = "name a folder or a .jsonl file, or go online"
    return UserError(f"--calib {source}: {type(error).__name__}: {said}; {advice}")
