"""The weights of an artifact as the parameters of the model, read back one after another.

Fused linears are cut apart again along N, experts that are written packed into the linears that a
checkpoint holds for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from smelt.models.folder import read_json
from smelt.models.skeleton import build
from smelt.passes.weights import Step
from smelt.runtime import manifest as manifests
from smelt.runtime.artifact import map_weights
from smelt.runtime.errors import SmeltError, UserError
from smelt.runtime.ops.linear_fp8 import row_scales
from smelt.runtime.ops.packing import unpack

from . import origins
from .compressed import Scheme
from .expert_names import expert_names, stored_name
from .origins import Origin, Part
from .packed import Packed
from .portable import FACTS, LaidOutSource

WRITTEN_BITS = (4, 8)
ZEROS = "transformers loads experts without zero points only"
BLOCKS = "transformers loads experts with one scale a row only, in float8"
UNNAMED = "transformers does not say which linears its experts are in a checkpoint"
ORDER = "its groups hold features out of order, which compressed-tensors does not load"


class Weights:
    """The parameters of an artifact, one after another. apart: experts' weights that are to be
    given linear by linear."""

    def __init__(self, folder: Path, loaded: manifests.Manifest) -> None:
        self.apart: set[str] = set()
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
        self._middle: dict[str, bool] = {}
        self._linears_of: dict[str, list[str]] = {}

    def _experts_scheme(self, part: Part, scheme: Scheme) -> Scheme | str:
        """How each expert's linears can be stored, or why they are written dequantized."""
        if not self.expert_linears(part.name):
            return UNNAMED
        if scheme.block:
            return BLOCKS
        return scheme if scheme.symmetric else ZEROS

    def expert_linears(self, name: str) -> list[str]:
        """The linears that a stacked weight is in a checkpoint, by row; empty if unknown."""
        if name not in self._linears_of:
            found = expert_names(self.model, name, self._part(name).shape[0])
            self._linears_of[name] = [path for expert in found or () for path in expert]
        return self._linears_of[name]

    def features(self, name: str) -> int:
        """K of a quantized parameter."""
        return self._part(name).shape[-1]

    def _part(self, name: str) -> Part:
        return next(p for parts in self.quantized for p in parts if p.name == name)

    def schemes(self) -> dict[str, Scheme | str]:
        """How each quantized module can be stored, or why it is written dequantized."""
        found: dict[str, Scheme | str] = {}
        for parts, names in self.quantized.items():
            scheme, start = self._scheme(parts, names), 0
            sorted_ = any(part.name in self._orders for part in parts)
            for part in parts:
                module = part.name.removesuffix(".weight")
                found[module] = scheme
                if sorted_:
                    found[module] = ORDER
                elif part.turned:
                    found[module] = "it is stored turned round"
                elif scheme.bits not in WRITTEN_BITS:
                    found[module] = (
                        f"it has {scheme.bits} bits, and only 4 and 8 are written packed"
                    )
                elif part.experts:
                    found[module] = self._experts_scheme(part, scheme)
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
        group = 0 if groups == 1 else k // groups
        return Scheme(bits, self._symmetric(names, bits), group, inputs=origin.inputs)

    def _symmetric(self, names: dict[str, str], bits: int) -> bool:
        """Whether there are no zero points, or all are the middle of the range."""
        name = names.get("zeros")
        if name is None:
            return True
        if name not in self._middle:
            middle = bits == 4 and bool((self._source.tensor(name) == 8).all())
            self._middle[name] = middle
        return self._middle[name]

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
            name = self._once(part.name)
            # A router beside experts that have their own names in a checkpoint has its own, too.
            name = stored_name(self.model, name) if self.apart else name
            yield name, rows.T if part.turned else rows

    def _packed(
        self, parts: tuple[Part, ...], names: dict[str, str]
    ) -> Iterator[tuple[str, torch.Tensor | Packed]]:
        found = {field: self._source.tensor(name) for field, name in names.items()}
        scheme = self._scheme(parts, names)
        q, scales, zeros = found["qweight"], found["scales"], found.get("zeros")
        if zeros is not None:
            q = unpack(q, scheme.bits, parts[0].shape[-1])
        if scheme.block:
            # Every expert begins with a block of its own, even where the last one was not full.
            count = parts[0].shape[0] if parts[0].experts else 1
            n, k = q.shape[0] // count, q.shape[1]
            each = [row_scales(own, n, k, scheme.block) for own in scales.chunk(count)]
            scales = torch.cat(each)
        order = next((self._orders[p.name] for p in parts if p.name in self._orders), None)
        columns = None if order is None else self._source.tensor(order)
        scales = scales.reshape(q.shape[0], -1)
        whole = Packed(q, scales, scheme, zeros, columns, found.get("input_scale"))
        start = 0
        for part in parts:
            rows = whole.rows(start, start + part.rows)
            start += part.rows
            name = self._once(part.name)
            # A linear that is stored turned round has no packed form elsewhere.
            if name in self.apart:
                linears = self.expert_linears(name)
                size = part.rows // len(linears)
                for i, path in enumerate(linears):
                    yield f"{path}.weight", rows.rows(i * size, (i + 1) * size)
            elif part.experts:
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
