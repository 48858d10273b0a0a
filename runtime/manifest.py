"""The manifest of an artifact: what it is, what made it, what it runs on, and its files' hashes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .batch import CONTRACT_VERSION, BatchLayout, CacheSpec, Features
from .errors import SmeltError, UserError

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"


class ManifestError(UserError):
    """A folder is no artifact, or one this version cannot read."""


@dataclass
class Manifest:
    """Everything but the tensors and the code.

    model: name, class, revision, dtype, vocab_size, max_position, eos_token_id (list),
    bos_token_id, parameters, source_bytes, features (`Features`; not there without). quant: the
    QuantSpec. target: device, machine, isa, torch, triton. constants: package constant -> tensor
    name. layout_steps: weight-plan steps that brought canonical weights into the provider's
    layout. files: relative path -> {bytes, sha256}. steps: the packages of the step, each {file,
    max_tokens, max_query} (`specialised.Bounds`), the last for any step; empty where the only one
    is graphs/step.pt2.
    """

    model: dict[str, Any]
    quant: dict[str, Any]
    target: dict[str, Any]
    backend: str
    cache: CacheSpec
    layout: BatchLayout
    constants: dict[str, str]
    layout_steps: list[dict[str, Any]]
    passes: list[dict[str, Any]]
    providers: list[dict[str, Any]]
    memory: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    schema: int = SCHEMA_VERSION
    contract: int = CONTRACT_VERSION

    @property
    def features(self) -> Features | None:
        """What the step gives beside logits."""
        data = self.model.get("features")
        return None if data is None else Features.from_json(data)

    def write(self, folder: Path) -> None:
        """Write atomically: a manifest is either the old one or the new one."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["cache"] = self.cache.to_json()
        data["layout"] = self.layout.to_json()
        temporary = folder / (FILE_NAME + ".new")
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(temporary, folder / FILE_NAME)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read(folder: Path) -> Manifest:
    """The manifest of `folder`.

    Raises ManifestError when there is none, when it is not readable, of a newer schema, or of
    another contract between graph and engine.
    """
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise ManifestError(f"no artifact {folder}; make one with: smelt compile MODEL -o {folder}")
    if not path.is_file():
        raise ManifestError(
            f"{folder} is not an artifact (no {FILE_NAME}); "
            "make one with: smelt compile MODEL -o OUT"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} is damaged ({error}); compile the model again") from error
    if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
        raise ManifestError(f"{path} is damaged (no schema version); compile the model again")
    return _parse(data, path)


def _parse(data: Mapping[str, Any], path: Path) -> Manifest:
    if data["schema"] > SCHEMA_VERSION:
        raise ManifestError(
            f"{path}: schema {data['schema']} is newer than this smelt reads ({SCHEMA_VERSION}); "
            "update smelt"
        )
    if data["schema"] < SCHEMA_VERSION:
        raise ManifestError(
            f"{path}: schema {data['schema']} is older than this smelt reads ({SCHEMA_VERSION}); "
            "compile the model again"
        )
    if data.get("contract") != CONTRACT_VERSION:
        raise ManifestError(
            f"{path}: contract is {data.get('contract')}, this smelt's engine speaks "
            f"{CONTRACT_VERSION}; compile the model again"
        )
    data = {"steps": [], **data}  # artifacts of one package had no such entry
    missing = [f.name for f in fields(Manifest) if f.name not in data]
    if missing:
        raise ManifestError(f"{path} is damaged (no {missing[0]}); compile the model again")
    try:
        values = {f.name: data[f.name] for f in fields(Manifest)}
        values["cache"] = CacheSpec.from_json(data["cache"])
        values["layout"] = BatchLayout.from_json(data["layout"])
        _check_steps(data["steps"], data["files"])
        found = Manifest(**values)
        if found.model.get("features") is not None:
            Features.from_json(found.model["features"])
        return found
    except (SmeltError, ValueError, TypeError, KeyError) as error:
        raise ManifestError(f"{path} is damaged ({error}); compile the model again") from error


def _check_steps(steps: Any, files: Mapping[str, Any]) -> None:
    """Raise ValueError unless each is a file of the artifact and the last one takes any step."""
    if not isinstance(steps, list):
        raise ValueError("steps is no list")
    for step in steps:
        if not isinstance(step, dict) or step.get("file") not in files:
            raise ValueError(f"{step!r} of steps names no file of the artifact")
        for name in ("max_tokens", "max_query"):
            bound = step.get(name)
            if not isinstance(bound, int) or isinstance(bound, bool) or bound < 0:
                raise ValueError(f"{name} of {step['file']} is {bound!r}")
    if steps and (steps[-1]["max_tokens"] or steps[-1]["max_query"]):
        raise ValueError(f"{steps[-1]['file']}, the last of steps, has bounds")
