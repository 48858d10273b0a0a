"""Folders of trained speculation heads: read and checked, every fault as one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError

if TYPE_CHECKING:
    from ..engine_options import StepProgram


def check_features(program: StepProgram, kind: str, draft: str) -> int:
    """The width of the model's features. Raises `UserError` where it gives none of `kind`."""
    features = program.features
    if features is None or features.kind != kind:
        has = f"has --features {features.kind}" if features is not None else "has no features"
        raise UserError(
            f"--draft {draft}: this artifact {has}; compile the model with --features {kind}"
        )
    return features.width


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder of heads. Raises `UserError`."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no heads: there is no config.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return data


def number(config: Mapping[str, Any], name: str, folder: Path, least: int = 1) -> int:
    """A whole number of a configuration. Raises `UserError` where it is none or below `least`."""
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{folder}/config.json: {name} is {value!r}, not a number from {least} on")
    return value


def read_weights(folder: Path, *names: str) -> dict[str, torch.Tensor]:
    """The tensors of the first of `names` that is there, on the CPU.

    .safetensors, or a file of torch.save that is opened for tensors only: one that holds anything
    else is refused. Raises `UserError`.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no heads: there is no {' and no '.join(names)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers raise whatever the bytes make them
        raise UserError(f"{path} holds no plain tensors, or is damaged: {_line(error)}") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        raise UserError(f"{path} holds something else than tensors by name")
    return found


class Weights:
    """Tensors by name, each asked for with its shape.

    dtype: floating tensors come in the first one's dtype, on `device`.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], folder: Path, device: torch.device
    ) -> None:
        self._tensors, self._folder, self._device = tensors, folder, device
        floats = [t.dtype for t in tensors.values() if t.dtype.is_floating_point]
        self.dtype = floats[0] if floats else torch.float32

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def rows(self, name: str) -> int:
        """The first size of a tensor. Raises `UserError` where there is none."""
        return int(self._found(name).shape[0])

    def columns(self, name: str) -> int:
        """The last size of a tensor. Raises `UserError` where there is none."""
        return int(self._found(name).shape[-1])

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor `name`. Raises `UserError` where it is missing or has another shape."""
        value = self._found(name)
        if tuple(value.shape) != shape:
            raise UserError(f"{self._folder}: {name} is {list(value.shape)}, not {list(shape)}")
        return self.placed(value)

    def placed(self, value: torch.Tensor) -> torch.Tensor:
        dtype = self.dtype if value.dtype.is_floating_point else value.dtype
        return value.to(self._device, dtype)

    def _found(self, name: str) -> torch.Tensor:
        value = self._tensors.get(name)
        if value is None or not value.dim():
            raise UserError(f"{self._folder}: there is no weight {name}")
        return value


def model_weight(program: StepProgram, role: str, draft: str) -> torch.Tensor:
    """The model's "embedding" or "head" [V, K]. Raises `UserError` where it is packed."""
    name = getattr(program.features, role)
    weights: Mapping[str, torch.Tensor] = getattr(program, "weights", {})
    if name is None or name not in weights:
        raise UserError(
            f"--draft {draft} has no {role} of its own, and this artifact's is not kept in 16 bits"
        )
    return weights[name]


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
