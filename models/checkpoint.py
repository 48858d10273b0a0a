"""Weights of a Hugging Face folder: safetensors, sharded or not, mapped and never all copied."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from smelt.runtime.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what it is, read from the file's header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint:
    """The tensors of a folder's safetensors files by name.

    Raises UserError when there are no weights, when a file named by the index is missing, or when a
    header does not fit its file (a truncated download).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        self._open: dict[Path, Any] = {}
        for file in _weight_files(folder):
            handle = _open(file)
            self._open[file] = handle
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                view = handle.get_slice(name)
                code = view.get_dtype()
                if code not in DTYPES:
                    raise UserError(
                        f"{file}: tensor {name} has dtype {code}, which smelt cannot read"
                    )
                self.entries[name] = TensorEntry(file, tuple(view.get_shape()), DTYPES[code])

    @property
    def files(self) -> list[Path]:
        return list(self._open)

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self._open)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, backed by the mapped file. Raises KeyError for an unknown name."""
        entry = self.entries[name]
        value = self._open[entry.file].get_tensor(name)
        assert isinstance(value, torch.Tensor)
        return value


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a complete safetensors file ({error}); download it again"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not a safetensors index: {error}") from error
        for name in names:
            if "/" in name or "\\" in name or not (folder / name).is_file():
                raise UserError(
                    f"{index} names {name}, which is not in {folder}; download it again"
                )
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles:
        raise UserError(
            f"{folder} has weights only as {pickles[0].name}, a pickle that smelt does not load; "
            "convert them to safetensors with transformers' save_pretrained"
        )
    raise UserError(f"{folder} has a configuration but no weights (no model.safetensors)")
