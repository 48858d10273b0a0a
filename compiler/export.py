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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from smelt.models.folder import TOKENIZER_FILES, read_json
from smelt.models.skeleton import build
from smelt.passes.weights import Step
from smelt.runtime import manifest as manifests
from smelt.runtime.artifact import map_weights
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.integrity import verify
from smelt.runtime.ops.linear_fp8 import row_scales
from smelt.runtime.ops.packing import unpack

from . import origins
from .artifact import SHARD_BYTES, replacing
from .compressed import Scheme, configuration, tensors
from .origins import Origin, Part
from .packed import Packed
from .portable import FACTS, LaidOutSource

FORMATS = ("compressed-tensors", "hf")
WRITTEN_BITS = (4, 8)
EXPERTS = (
    "transformers holds a layer's experts as one parameter, which compressed-tensors does not load"
)
ORDER = "its groups hold features out of order, which compressed-tensors does not load"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written. quantized and plain: how many linears each way; notes: what a reader of
    the folder should know."""

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
    weights = _Weights(source, loaded)
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
        schemes = _Schemes(loaded.model["dtype"], chosen)
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
    notes = _notes(weights, schemes.modules) if format != "hf" else []
    return Exported(target, count, weights.linears - count, tuple(notes))


class _Weights:
    """The parameters of an artifact, one after another."""

    def __init__(self, folder: Path, loaded: manifests.Manifest) -> None:
        self.folder = folder
        self.config, self._origins = origins.load(folder)
        steps = [
            Step(s["op"], tuple(s["outputs"]), tuple(s["inputs"]), s["args"])
            for s in loaded.layout_steps
        ]
        self._source = LaidOutSource(map_weights(folder, "cpu"), steps)
        self.dtype: torch.dtype = getattr(torch, loaded.model["dtype"])
        self.model = self._skeleton(self.dtype)
        self._tied = _first_names(self.model)
        fields: dict[tuple[Part, ...], dict[str, str]] = {}
        self._orders: dict[str, str] = {}
        for name, origin in self._origins.items():
            if origin.field == "order":
                self._orders[origin.parts[0].name] = name
            elif origin.field != "weight":
                fields.setdefault(origin.parts, {})[origin.field] = name
        self.quantized = fields
        self.experts = {part.name for parts in fields for part in parts if part.experts}
        self.count = sum(len(o.parts) for o in self._origins.values() if o.field == "weight")
        self.count += sum(len(parts) for parts in fields)
        self.linears = sum(isinstance(m, nn.Linear) for m in self.model.modules())
        facts = read_json(folder / FACTS)["weights"].values()
        self._shapes = {w["tensor"]: w["shape"] for w in facts}
        self._dtypes = {w["tensor"]: w["dtype"] for w in facts}
        self._written: set[str] = set()

    def schemes(self) -> dict[str, Scheme | str]:
        """How each quantized module can be stored, or why it is written dequantized."""
        found: dict[str, Scheme | str] = {}
        for parts, names in self.quantized.items():
            scheme, start = self._scheme(parts, names), 0
            sorted_ = any(part.name in self._orders for part in parts)
            for part in parts:
                module = part.name.removesuffix(".weight")
                found[module] = scheme
                if part.experts:
                    found[module] = EXPERTS
                elif sorted_:
                    found[module] = ORDER
                elif part.turned:
                    found[module] = "it is stored turned round"
                elif scheme.bits not in WRITTEN_BITS:
                    found[module] = (
                        f"it has {scheme.bits} bits, and only 4 and 8 are written packed"
                    )
                elif scheme.block and start % scheme.block:
                    found[module] = f"its rows do not begin with a block of {scheme.block}"
                start += part.rows
        return found

    def _scheme(self, parts: tuple[Part, ...], names: dict[str, str]) -> Scheme:
        origin = self._origins[names["qweight"]]
        shape = self._shapes[names["scales"]]
        if self._dtypes[names["qweight"]] == "float8_e4m3fn":
            return Scheme(8, True, kind="float", block=origin.block, inputs=origin.inputs)
        k, groups = parts[0].shape[-1], int(shape[1]) if len(shape) == 2 else 1
        # A row of values packed by their bits is at most seven bits longer than they are.
        bits = 8 * self._shapes[names["qweight"]][1] // k
        return Scheme(
            bits, "zeros" not in names, 0 if groups == 1 else k // groups, inputs=origin.inputs
        )

    def _skeleton(self, dtype: torch.dtype) -> nn.Module:
        from transformers import AutoConfig

        raw = dict(self.config)
        try:
            config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        except (KeyError, ValueError, TypeError) as error:
            line = str(error).split("\n")[0]
            raise UserError(
                f"{self.folder}: transformers cannot make a model of its configuration ({line}); "
                "models that bring their own code cannot be exported"
            ) from error
        return build(config, dtype, real=False)

    def parameters(self) -> Iterator[tuple[str, torch.Tensor | Packed]]:
        """(name, value) of every parameter; a quantized linear's weight as its integers."""
        for name, origin in self._origins.items():
            if origin.field == "weight":
                yield from self._plain(origin, self._source.tensor(name))
        for parts, names in self.quantized.items():
            yield from self._packed(parts, names)

    def _plain(self, origin: Origin, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        start = 0
        for part in origin.parts:
            rows = value[start : start + part.shape[0]] if len(origin.parts) > 1 else value
            start += part.shape[0]
            yield self._once(part.name), rows.T if part.turned else rows

    def _packed(
        self, parts: tuple[Part, ...], names: dict[str, str]
    ) -> Iterator[tuple[str, torch.Tensor | Packed]]:
        found = {field: self._source.tensor(name) for field, name in names.items()}
        scheme = self._scheme(parts, names)
        q, scales, zeros = found["qweight"], found["scales"], found.get("zeros")
        if zeros is not None:
            q = unpack(q, scheme.bits, parts[0].shape[-1])
        if scheme.block:
            scales = row_scales(scales, q.shape[0], q.shape[1], scheme.block)
        order = next((self._orders[p.name] for p in parts if p.name in self._orders), None)
        columns = None if order is None else self._source.tensor(order)
        scales = scales.reshape(q.shape[0], -1)
        whole = Packed(q, scales, scheme, zeros, columns, found.get("input_scale"))
        start = 0
        for part in parts:
            rows = whole.rows(start, start + part.rows)
            start += part.rows
            name = self._once(part.name)
            # Experts, and a linear that is stored turned round, have no packed form elsewhere.
            if part.experts:
                yield name, rows.dequantize().view(part.shape).to(self.dtype)
            else:
                yield name, rows.dequantize().T.to(self.dtype) if part.turned else rows

    def _once(self, name: str) -> str:
        name = self._tied.get(name, name)
        if name in self._written:
            raise SmeltError(
                f"{self.folder}: {name} has two values in the artifact, so it is no longer tied; "
                "such an artifact cannot be exported yet"
            )
        self._written.add(name)
        return name

    def check_complete(self) -> None:
        """Raise SmeltError when a parameter of the model is in no weight of the artifact."""
        for name, _ in self.model.named_parameters():
            if self._tied.get(name, name) not in self._written:
                raise SmeltError(
                    f"{self.folder}: no weight of the artifact holds {name} in a form that can be "
                    "written back; such an artifact cannot be exported yet"
                )


def _first_names(model: nn.Module) -> dict[str, str]:
    """The name under which a tied parameter is stored, by each of its names."""
    names: dict[int, str] = {}
    return {
        name: names.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


@dataclass
class _Schemes:
    """Turns parameters into a folder's tensors. modules: the linears that stay quantized."""

    dtype: str
    modules: dict[str, Scheme] = field(default_factory=dict)

    def tensors(self, name: str, value: torch.Tensor | Packed) -> dict[str, torch.Tensor]:
        dtype = getattr(torch, self.dtype)
        if isinstance(value, torch.Tensor):
            return {name: value}
        module = name.removesuffix(".weight")
        if module not in self.modules:
            return {name: value.dequantize().to(dtype)}
        return {f"{module}.{leaf}": tensor for leaf, tensor in tensors(value, dtype).items()}


def _chosen(weights: _Weights) -> dict[str, Scheme]:
    """The modules that stay quantized, and how.

    transformers reads zero points only by dequantizing while it loads, and then all modules by one
    scheme. Where there are any, only the commonest scheme is kept.
    """
    found = weights.schemes()
    possible = {name: scheme for name, scheme in found.items() if isinstance(scheme, Scheme)}
    if not possible or all(scheme.symmetric for scheme in possible.values()):
        return possible
    common = Counter(possible.values()).most_common(1)[0][0]
    return {name: scheme for name, scheme in possible.items() if scheme == common}


def _notes(weights: _Weights, kept: dict[str, Scheme]) -> list[str]:
    notes = []
    for name, scheme in weights.schemes().items():
        if isinstance(scheme, str):
            notes.append(f"{name}: written dequantized; {scheme}")
        elif name not in kept:
            notes.append(
                f"{name}: written dequantized; transformers reads one scheme with zero points a "
                "model, and others have another"
            )
    return notes


def _config(weights: _Weights, schemes: _Schemes) -> dict[str, Any]:
    config = {**weights.config, "dtype": schemes.dtype}
    config.pop("quantization_config", None)
    if schemes.modules:
        linears = [n for n, m in weights.model.named_modules() if isinstance(m, nn.Linear)]
        left = [name for name in linears if name not in schemes.modules]
        config["quantization_config"] = configuration(schemes.modules, left)
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
