"""A model as the user names it: a local folder, or a hub name fetched through huggingface_hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from smelt.runtime.errors import SmeltError, UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model"]


def resolve(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of `model`, downloading a hub name when there is no such folder.

    Raises UserError when neither a folder nor a hub name fits, SmeltError when the hub cannot be
    reached and the model is not in the local cache.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json; is it a Hugging Face model folder?")
        return folder.resolve()
    name = os.fspath(model)
    if folder.exists():
        raise UserError(f"{name} is a file; name the folder that holds config.json")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no folder {name}; name a model folder, or a hub model as OWNER/NAME")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise UserError(f"no folder {name}, and it is not a hub name: {error}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no folder {name}, and the hub knows no such model (or it is gated)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SmeltError(
            f"no folder {name}, and the hub cannot be reached to fetch it "
            f"({type(error).__name__}); go online, or name a local folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError naming the file when it is something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, expected a JSON object")
    return data
