"""Which parameters of the model each weight of an artifact holds, for the way back to a checkpoint.

Passes join, turn, scale and quantize weights as steps of the weight plan. Read backwards, the steps
say where a weight came from. It is written beside the portable program as `model.json`, with the
model's configuration, so that an artifact can be exported without the checkpoint it was made of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smelt.passes.program import Program
from smelt.passes.quantize.stored import DEQUANTIZE
from smelt.passes.weights import Step, WeightPlan
from smelt.runtime.errors import UserError

smelt = torch.ops.smelt
FILE_NAME = "model.json"

# Steps that change the values of their first input and not what it is.
_SAME = {"cast", "multiply_columns", "divide_rows", "divide_offset", "fold_factor"}
_FIELDS = {
    "quantize_int2": ("qweight", "scales", "zeros"),
    "quantize_int3": ("qweight", "scales", "zeros"),
    "take_int3": ("qweight", "scales", "zeros"),
    "quantize_int4": ("qweight", "scales", "zeros"),
    "quantize_int8": ("qweight", "scales"),
    "take_int4": ("qweight", "scales", "zeros"),
    "keep_int4": ("qweight", "scales", "zeros"),
    "keep_int8": ("qweight", "scales"),
    "quantize_w8a8": ("qweight", "scales"),
    "keep_w8a8": ("qweight", "scales"),
    "quantize_fp8": ("qweight", "scales"),
    "keep_fp8": ("qweight", "scales"),
}


@dataclass(frozen=True)
class Part:
    """A parameter of the model. shape: of the weight [N, K] as a linear reads it, or its own, which
    of experts is [E, N, K]. turned: the parameter is stored [K, N]."""

    name: str
    shape: tuple[int, ...]
    turned: bool = False

    @property
    def experts(self) -> bool:
        return len(self.shape) == 3

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class Origin:
    """What a planned tensor is. field: "weight" for the values themselves; "qweight", "scales" and
    "zeros" of a quantized linear, "input_scale" of its static activations; "order", int64 [K],
    which features of the parameters its columns are. parts: the parameters, joined along the first
    dimension. Of a qweight, inputs: how its linear rounds its input, and block: the size of blocks
    that share a scale, or 0."""

    field: str
    parts: tuple[Part, ...]
    inputs: str = "none"
    block: int = 0

    def to_json(self) -> dict[str, Any]:
        parts = [{"name": p.name, "shape": list(p.shape), "turned": p.turned} for p in self.parts]
        return {"field": self.field, "parts": parts, "inputs": self.inputs, "block": self.block}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Origin:
        parts = (Part(p["name"], tuple(p["shape"]), bool(p["turned"])) for p in data["parts"])
        how = (str(data.get("inputs", "none")), int(data.get("block", 0)))
        return cls(str(data["field"]), tuple(parts), *how)


def origins(program: Program, parameters: set[str]) -> dict[str, Origin]:
    """The origin of every weight that the program reads and that holds parameters of the model.

    parameters: their names. Tensors computed on the way, and weights that a pass made in a way this
    does not know, are left out.
    """
    reader = _Reader(program.weights, parameters)
    found = {name: reader.origin(name) for name in program.used_weights()}
    known = {name: origin for name, origin in found.items() if origin is not None}
    for node in program.calls(smelt.linear_w8a8.default, smelt.linear_fp8.default):
        name, scale = program.weight_name(node.args[1]), program.weight_name(node.args[3])
        if name in known:
            inputs: tuple[Any, ...] = tuple(node.args[5:])
            if not inputs:
                inputs = ("dynamic" if scale is None else "static", 0)
            known[name] = Origin("qweight", known[name].parts, *inputs)
            if scale is not None:
                known[scale] = Origin("input_scale", known[name].parts)
    for node in program.calls(smelt.experts_quantized.default):
        block: Any = node.args[12]
        for name in map(program.weight_name, (node.args[3], node.args[6])):
            if name in known:
                known[name] = Origin("qweight", known[name].parts, block=block)
    return known


class _Reader:
    def __init__(self, plan: WeightPlan, parameters: set[str]) -> None:
        self.plan = plan
        self.parameters = parameters
        self.made = plan.producers()
        # The weight that a quantized checkpoint's integers stand for, by the integers' name.
        self.stands_for = {s.inputs[0]: s.outputs[0] for s in plan.steps if s.op == DEQUANTIZE}

    def origin(self, name: str) -> Origin | None:
        step = self.made[name]
        if step.op == "sort_features" and name == step.outputs[1]:
            return self._origin("order", self.parts(step.outputs[0]))
        if step.op == "order_of_experts":
            return self._origin("order", self.parts(step.args["weight"]))
        return self._origin(self._field(step, name), self.parts(name))

    def _origin(self, field: str, parts: list[Part] | None) -> Origin | None:
        return None if parts is None else Origin(field, tuple(parts))

    def _field(self, step: Step, name: str) -> str:
        below = step.inputs[0] if step.op in ("cat", "join_experts") else None
        if step.op == "take_rows":
            below = step.inputs[1 + step.outputs.index(name)]
        if below is not None and name not in self.parameters:
            return self._field(self.made[below], below)
        fields = _FIELDS.get(_operation(step))
        return fields[step.outputs.index(name)] if fields else "weight"

    def parts(self, name: str) -> list[Part] | None:
        if name in self.parameters:
            return [Part(name, self.plan.specs[name].shape)]
        if name in self.stands_for:
            return self.parts(self.stands_for[name])
        step = self.made[name]
        if step.op == "cat" and step.args["dim"] == 0:
            found: list[Part] = []
            for part in step.inputs:
                below = self.parts(part)
                if below is None:
                    return None
                found += below
            return found
        if step.op == "join_experts":
            return self.parts(step.args["weight"])
        if step.op == "transpose":
            return self._turned(step.inputs[0])
        if step.op in _SAME or _operation(step) in _FIELDS or step.op == "sort_features":
            return self.parts(step.inputs[0])
        return None

    def _turned(self, name: str) -> list[Part] | None:
        below = self.parts(name)
        if below is None or len(below) != 1 or len(below[0].shape) != 2:
            return None
        part = below[0]
        return [Part(part.name, part.shape[::-1], not part.turned)]


def _operation(step: Step) -> str:
    """A step's operation; for experts that of the format each of them is quantized to."""
    return f"quantize_{step.args['format']}" if step.op == "quantize_experts" else step.op


def save(program: Program, model: nn.Module, config: Any, folder: Path) -> None:
    """Write model.json: the configuration of the model, and the origin of every weight."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {name: origin.to_json() for name, origin in origins(program, names).items()}
    data = {"config": json.loads(config.to_json_string(use_diff=False)), "origins": found}
    (folder / FILE_NAME).write_text(json.dumps(data, indent=1) + "\n")


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Origin]]:
    """(configuration, origins) of an artifact. Raises UserError for one that has none."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(
            f"{folder} has no {FILE_NAME}, so it was made by an older smelt; compile it again"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = {name: Origin.from_json(entry) for name, entry in data["origins"].items()}
        return dict(data["config"]), found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); compile the model again") from error
