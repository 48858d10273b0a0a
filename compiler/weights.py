"""Bind a traced program's weights to a checkpoint's tensors.

A checkpoint may name and cut its tensors otherwise than the module does (experts stored one by
one). transformers describes that as conversions; here they become steps of the weight plan.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from smelt.models.checkpoint import Checkpoint
from smelt.passes.weights import Step, TensorSpec, WeightPlan
from smelt.runtime.errors import UserError

from .stored import StoredModel


class ModuleSource:
    """The weights of a module in memory, by parameter name."""

    def __init__(self, module: nn.Module) -> None:
        self._state = module.state_dict()

    def tensor(self, name: str) -> torch.Tensor:
        return self._state[name].detach().cpu().contiguous()

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {n: TensorSpec(tuple(t.shape), t.dtype) for n, t in self._state.items()}


def checkpoint_specs(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    return {n: TensorSpec(e.shape, e.dtype) for n, e in checkpoint.entries.items()}


def stored_dtype(stored: Mapping[str, TensorSpec]) -> torch.dtype:
    """The dtype of most of the elements; float32 where there are none. A byte is no dtype to
    compute in."""
    sizes: dict[torch.dtype, int] = {}
    for spec in stored.values():
        if spec.dtype.is_floating_point and spec.dtype.itemsize > 1:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return max(sizes, key=lambda d: sizes[d], default=torch.float32)


Load = Callable[[WeightPlan, str], str]


def bind(
    plan: WeightPlan,
    stored: Mapping[str, TensorSpec],
    model: Any,
    where: str,
    quantized: StoredModel | None = None,
) -> None:
    """Rewrite every `load` step so that it reads tensors that exist in `stored`.

    model: the skeleton, asked for its class's conversions. quantized: the linears that the
    checkpoint holds packed; their weights are unpacked and dequantized. Raises UserError naming the
    first weight the checkpoint lacks or holds in another shape.
    """
    dtype = next(model.parameters()).dtype
    recipes = _recipes(quantized.specs(stored, dtype) if quantized else stored, model)

    def load(plan: WeightPlan, key: str) -> str:
        made = quantized.add(plan, key, stored, dtype) if quantized else None
        return made or _load(plan, key, stored[key])

    steps, plan.steps = plan.steps, []
    wanted = {name: plan.specs[name] for step in steps for name in step.outputs}
    plan.specs.clear()
    for step in steps:
        if step.op != "load":
            plan.steps.append(step)
            plan.specs.update({name: wanted[name] for name in step.outputs})
            continue
        _bind_one(plan, step.outputs[0], wanted[step.outputs[0]], recipes, load, where)


def _bind_one(
    plan: WeightPlan,
    name: str,
    spec: TensorSpec,
    recipes: Mapping[str, tuple[list[Any], dict[str, list[str]]]],
    load: Load,
    where: str,
) -> None:
    if name not in recipes:
        raise UserError(f"{where}: the checkpoint has no tensor for {name}; is it complete?")
    operations, groups = recipes[name]
    parts: list[list[str]] = []
    for keys in groups.values():
        parts.append([load(plan, key) for key in keys])
    try:
        current = _convert(plan, name, operations, parts)
    except RuntimeError as error:
        line = str(error).split("\n")[0]
        raise UserError(
            f"{where}: the checkpoint's tensors for {name} do not fit together ({line}); "
            "is it complete?"
        ) from error
    found = plan.specs[current]
    if found.shape != spec.shape:
        raise UserError(
            f"{where}: {name} has shape {list(found.shape)}, "
            f"config.json says {list(spec.shape)}; do they belong together?"
        )
    if not found.dtype.is_floating_point or found.dtype.itemsize < 2:
        raise UserError(
            f"{where}: {name} is stored as {found.dtype}, and config.json does not say that it is "
            "quantized; is it complete?"
        )
    dtype = str(spec.dtype).removeprefix("torch.")
    if current == name:
        return
    if found.dtype == spec.dtype and plan.steps[-1].outputs == (current,):
        step = plan.steps.pop()
        plan.specs.pop(current)
        plan.steps.append(Step(step.op, (name,), step.inputs, step.args))
        plan.specs[name] = found
        return
    plan.add("cast", [name], [current], dtype=dtype)


def _load(plan: WeightPlan, key: str, spec: TensorSpec) -> str:
    name = f"checkpoint:{key}"
    return name if name in plan.specs else plan.load(name, key, spec.shape, spec.dtype)


def _convert(plan: WeightPlan, name: str, operations: list[Any], parts: list[list[str]]) -> str:
    """Apply transformers' conversion operations as plan steps; returns the resulting name."""
    for operation in operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist":
            parts = [
                [plan.add("stack", [f"{name}.{i}"], keys, dim=operation.dim)[0]]
                for i, keys in enumerate(parts)
            ]
        elif kind == "Concatenate":
            flat = [key for keys in parts for key in keys]
            parts = [list(plan.add("cat", [f"{name}.joined"], flat, dim=operation.dim))]
        elif kind == "Transpose" and not operation.check_dims:
            dims = {"dim0": operation.dim0, "dim1": operation.dim1}
            parts = [
                [plan.add("transpose", [f"{name}.t"], [key], **dims)[0] for key in keys]
                for keys in parts
            ]
        else:
            raise UserError(f"{name}: its checkpoint needs conversion {kind}, not supported yet")
    if len(parts) != 1 or len(parts[0]) != 1:
        raise UserError(f"{name}: its checkpoint has {sum(map(len, parts))} tensors, expected one")
    return parts[0][0]


def _recipes(
    stored: Mapping[str, TensorSpec], model: Any
) -> dict[str, tuple[list[Any], dict[str, list[str]]]]:
    """Per module parameter: (conversion operations, {source pattern: checkpoint keys in order})."""
    renamings, converters = conversions(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, tuple[list[Any], dict[str, list[str]]]] = {}
    for key in sorted(stored, key=_natural):
        name, operations, pattern = key, [], ""
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        for converter in converters:
            renamed, matched = converter.rename_source_key(name)
            if matched is not None:
                name, operations, pattern = renamed, list(converter.operations), matched
                break
        if name not in parameters:
            for candidate in (name.removeprefix(prefix + "."), f"{prefix}.{name}"):
                if candidate in parameters:
                    name = candidate
        entry = found.setdefault(name, (operations, defaultdict(list)))
        entry[1][pattern].append(key)
        if len(entry[1][pattern]) > 1 and not operations:
            raise UserError(
                f"the checkpoint has {name} twice, as {' and '.join(entry[1][pattern])}"
            )
    for names in _tied(model):
        present = [name for name in names if name in found]
        found.update({name: found[present[0]] for name in names if present and name not in found})
    for name, (operations, groups) in found.items():
        order = _pattern_order(converters, operations, groups)
        found[name] = (operations, {p: groups[p] for p in order})
    return found


def _tied(model: Any) -> list[list[str]]:
    """Names that stand for one parameter; an export knows a tied weight by any one of them."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _pattern_order(
    converters: list[Any], operations: list[Any], groups: dict[str, Any]
) -> list[str]:
    for converter in converters:
        if list(converter.operations) == operations and set(groups) <= set(
            converter.source_patterns
        ):
            return [p for p in converter.source_patterns if p in groups]
    return list(groups)


def conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """(renamings, converters) that transformers knows for the model's class."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return [], []
    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    return [t for t in transforms if not isinstance(t, WeightConverter)], converters


def _natural(key: str) -> list[Any]:
    """Sort key under which experts.10 comes after experts.9."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", key)]
