"""Look into a torch.export archive before torch opens it.

`torch.export.load` unpickles sample inputs, and weights or constants marked so, with
`weights_only=False`. What smelt writes has none of these; an archive that does is refused.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from .errors import SmeltError


class ArchiveError(SmeltError):
    """An archive that smelt did not write, or that would run code when opened."""


def check(path: Path) -> None:
    """Raise ArchiveError when the archive at `path` is damaged or holds a pickled payload."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename.split("/", 1)[-1]
                if name.startswith("data/sample_inputs/") and entry.file_size:
                    raise ArchiveError(_refusal(path, "sample inputs"))
                if name.startswith("data/") and name.endswith("_config.json"):
                    config = json.loads(archive.read(entry)).get("config", {})
                    if any(value.get("use_pickle") for value in config.values()):
                        raise ArchiveError(_refusal(path, "weights or constants"))
                if name.endswith((".pkl", ".pickle", ".pt")) and entry.file_size:
                    raise ArchiveError(_refusal(path, entry.filename))
    except (zipfile.BadZipFile, OSError, ValueError, AttributeError) as error:
        raise ArchiveError(f"{path} is not a torch.export archive ({error})") from error


def _refusal(path: Path, what: str) -> str:
    return f"{path} holds pickled {what}, which smelt never writes and does not open"
