"""`smelt export`: an artifact's weights as a Hugging Face folder, for all else that runs models.

hf                  plain weights in the model's dtype; quantized linears are dequantized.
compressed-tensors  quantized linears as the compressed-tensors package reads them: the same values,
                    scales and zero points, under the modules' own names.

The weights come out of the artifact alone. Fused linears are cut apart again along N; norms that a
scale was folded into are written as they are now.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from smelt.models.folder import TOKENIZER_FILES
from smelt.runtime import manifest as manifests
from smelt.runtime.errors import UserError
from smelt.runtime.integrity import verify

from .artifact import SHARD_BYTES, replacing
from .compressed import Scheme, configuration, tensors
from .exported_weights import Weights
from .packed import Packed

FORMATS = ("compressed-tensors", "hf")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written. quantized: how many linears, each expert's counted; plain: how many not,
    without experts'; notes: what a reader of the folder should know."""

    folder: Path
    quantized: int
    plain: int
    notes: tuple[str, ...] = ()


def export(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "compressed-tensors",
    progress: Progress | None = None,
) -> Exported:
    """Write the artifact's weights as a Hugging Face folder `out`, whole or not at all.

    format: "compressed-tensors" or "hf". The folder has config.json, safetensors, and the
    tokenizer and generation settings of the artifact. Raises UserError when `out` is in use, when
    the artifact has no record of its parameters, or when nothing in it is quantized and
    compressed-tensors was asked for.
    """
    source, target = Path(artifact).expanduser(), Path(out).expanduser().absolute()
    if format not in FORMATS:
        raise UserError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is in use; name a new folder")
    loaded = manifests.read(source)
    verify(source, loaded.files)
    weights = Weights(source, loaded)
    chosen = _chosen(weights) if format == "compressed-tensors" else {}
    if format == "compressed-tensors" and not chosen:
        why = next((f" ({name}: {s})" for name, s in weights.schemes().items()), "")
        raise UserError(
            f"{source} has no weight that compressed-tensors can hold{why}; export it with "
            "--format hf, or compile the model with --quant"
        )
    with replacing(target, force=False) as folder:
        writer = _Writer(folder)
        report = progress or (lambda stage, done, total: None)
        weights.apart = {name for name in chosen if name in weights.experts}
        schemes = _schemes(weights, loaded.model["dtype"], chosen)
        for done, (name, value) in enumerate(weights.parameters()):
            report("export", done, weights.count)
            for leaf, tensor in schemes.tensors(name, value).items():
                writer.add(leaf, tensor)
        weights.check_complete()
        writer.close()
        (folder / "config.json").write_text(json.dumps(_config(weights, schemes), indent=1) + "\n")
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
    count = len(schemes.modules)
    notes = _notes(weights, chosen) if format != "hf" else []
    return Exported(target, count + len(schemes.experts), weights.linears - count, tuple(notes))


@dataclass
class _Schemes:
    """Turns parameters into a folder's tensors. modules: the linears that stay quantized; experts:
    those of experts."""

    dtype: str
    modules: dict[str, Scheme] = field(default_factory=dict)
    experts: dict[str, Scheme] = field(default_factory=dict)

    def tensors(self, name: str, value: torch.Tensor | Packed) -> dict[str, torch.Tensor]:
        dtype = getattr(torch, self.dtype)
        if isinstance(value, torch.Tensor):
            return {name: value}
        module = name.removesuffix(".weight")
        if module not in self.modules and module not in self.experts:
            return {name: value.dequantize().to(dtype)}
        return {f"{module}.{leaf}": tensor for leaf, tensor in tensors(value, dtype).items()}


def _schemes(weights: Weights, dtype: str, chosen: dict[str, Scheme]) -> _Schemes:
    found = _Schemes(dtype)
    for name, scheme in chosen.items():
        if name in weights.apart:
            found.experts |= dict.fromkeys(weights.expert_linears(name), scheme)
        else:
            found.modules[name] = scheme
    return found


def _chosen(weights: Weights) -> dict[str, Scheme]:
    """The linears and experts' stacked weights that stay quantized, and how.

    transformers reads zero points only by dequantizing while it loads, and then all linears by one
    scheme. Where there are any, only the commonest scheme is kept. Experts have one scheme always.
    """
    found = weights.schemes()
    possible = {name: scheme for name, scheme in found.items() if isinstance(scheme, Scheme)}
    experts = {name: possible.pop(name) for name in weights.experts if name in possible}
    if not all(scheme.symmetric for scheme in possible.values()):
        possible = _commonest(possible)
    grouped = {scheme.group for scheme in experts.values() if scheme.group}
    for name, scheme in experts.items():
        # As many features as a group has are one group, or a whole row: the same values.
        if not scheme.group and {weights.features(name)} == grouped:
            experts[name] = replace(scheme, group=weights.features(name))
    return {**possible, **_commonest(experts)}


def _commonest(schemes: dict[str, Scheme]) -> dict[str, Scheme]:
    most = Counter(schemes.values()).most_common(1)
    return {name: scheme for name, scheme in schemes.items() if scheme == most[0][0]}


def _notes(weights: Weights, kept: dict[str, Scheme]) -> list[str]:
    notes = []
    for name, scheme in weights.schemes().items():
        if isinstance(scheme, str):
            notes.append(f"{name}: written dequantized; {scheme}")
        elif name not in kept and name in weights.experts:
            notes.append(
                f"{name}: written dequantized; transformers reads one scheme for all experts of a "
                "model, and others have another"
            )
        elif name not in kept:
            notes.append(
                f"{name}: written dequantized; transformers reads one scheme with zero points a "
                "model, and others have another"
            )
    return notes


def _config(weights: Weights, schemes: _Schemes) -> dict[str, Any]:
    config = {**weights.config, "dtype": schemes.dtype}
    config.pop("quantization_config", None)
    if schemes.modules or schemes.experts:
        linears = [n for n, m in weights.model.named_modules() if isinstance(m, nn.Linear)]
        left = [name for name in linears if name not in schemes.modules]
        config["quantization_config"] = configuration(
            schemes.modules, left, next(iter(schemes.experts.values()), None)
        )
    return config


class _Writer:
    """Safetensors files of at most two gibibytes, and their index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shard: dict[str, torch.Tensor] = {}
        self._files: list[list[str]] = []
        self._size = self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._shard[name] = tensor.clone(memory_format=torch.contiguous_format)
        self._size += tensor.nbytes
        self._total += tensor.nbytes
        if self._size >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        path = self._folder / f"{len(self._files)}.safetensors"
        save_file(self._shard, path, metadata={"format": "pt"})
        self._files.append(list(self._shard))
        self._shard, self._size = {}, 0

    def close(self) -> None:
        """Give the files their names, which hold how many there are."""
        if self._shard:
            self._flush()
        count = len(self._files)
        if count == 1:
            os.replace(self._folder / "0.safetensors", self._folder / "model.safetensors")
            return
        where: dict[str, str] = {}
        for i, names in enumerate(self._files):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._folder / f"{i}.safetensors", self._folder / final)
            where |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": where}
        path = self._folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1) + "\n")
