"""The portable part of an artifact: the program before providers are chosen.

Saved as an ExportedProgram whose weights are graph inputs and which holds no example inputs, so
that nothing in it is pickled; beside it a JSON file with the inputs' roles and the facts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

import smelt.runtime.ops  # noqa: F401 - registers the operators
from smelt.passes.program import Dialect, Facts, Input, Program, Role
from smelt.passes.weights import Step, TensorSpec, WeightPlan
from smelt.runtime.archive import check
from smelt.runtime.batch import BatchLayout, CacheSpec, step_input_names
from smelt.runtime.errors import SmeltError

from .lower import constant_name, dynamic_shapes, example_inputs

GRAPH, FACTS = "program.pt2", "program.json"


def export_with_inputs(program: Program, device: str) -> tuple[ExportedProgram, dict[str, str]]:
    """Export a cached program with every weight as an input, weights first.

    Returns the export and {input name: planned weight name}.
    """
    assert program.caches is not None
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    names: dict[str, str] = {}
    for node in program.placeholders(Role.WEIGHT):
        name = constant_name(program.inputs[node.name].name)
        names[name] = program.inputs[node.name].name
        copied[node] = graph.placeholder(name)
    by_name = {program.inputs[n.name].name: n for n in program.placeholders()}
    for name in step_input_names(program.caches):
        new = graph.placeholder(name)
        if name in by_name:
            copied[by_name[name]] = new
    for node in program.graph.nodes:
        if node not in copied:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    module = fx.GraphModule(torch.nn.Module(), graph)
    specs = [program.weights.specs[planned] for planned in names.values()]
    empties = tuple(torch.empty(s.shape, dtype=s.dtype, device=device) for s in specs)
    shapes = (*({} for _ in empties), *dynamic_shapes(program.caches))
    with torch.no_grad():
        exported = torch.export.export(
            module,
            (*empties, *example_inputs(program.caches, device)),
            dynamic_shapes=shapes,
            strict=False,
        )
    for node in exported.graph.nodes:
        # Paths of the machine that compiled have no place in an artifact.
        node.meta.pop("stack_trace", None)
    exported._example_inputs = None
    return exported, names


def save(exported: ExportedProgram, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported, path)


def save_portable(program: Program, folder: Path) -> None:
    """Write program.pt2 and program.json."""
    exported, names = export_with_inputs(program, "cpu")
    save(exported, folder / GRAPH)
    assert program.caches is not None and program.layout is not None
    facts = {
        "weights": {
            name: {
                "tensor": planned,
                "shape": list(program.weights.specs[planned].shape),
                "dtype": str(program.weights.specs[planned].dtype).removeprefix("torch."),
            }
            for name, planned in names.items()
        },
        "facts": {**vars(program.facts), "module_counts": dict(program.facts.module_counts)},
        "cache": program.caches.to_json(),
        "layout": program.layout.to_json(),
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def load_portable(folder: Path) -> Program:
    """The CACHED program of an artifact, its weights read by canonical name.

    Raises SmeltError when the files are damaged or hold anything pickled.
    """
    check(folder / GRAPH)
    try:
        data = json.loads((folder / FACTS).read_text())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.load(folder / GRAPH)
        return _program(exported, data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        line = str(error).split("\n")[0]
        raise SmeltError(f"{folder}: the portable program is damaged ({line})") from error


def _program(exported: ExportedProgram, data: Mapping[str, Any]) -> Program:
    plan = WeightPlan()
    inputs: dict[str, Input] = {}
    module = fx.GraphModule(exported.graph_module, exported.graph)
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        entry = data["weights"].get(node.name)
        if entry is not None:
            spec = TensorSpec(tuple(entry["shape"]), getattr(torch, entry["dtype"]))
            plan.load(entry["tensor"], entry["tensor"], spec.shape, spec.dtype)
            inputs[node.name] = Input(Role.WEIGHT, entry["tensor"])
        elif node.name.startswith("kv_cache"):
            inputs[node.name] = Input(Role.CACHE, node.name)
        elif node.name in ("input_ids", "position_ids"):
            inputs[node.name] = Input(Role.TOKEN, node.name)
        else:
            inputs[node.name] = Input(Role.BATCH, node.name)
    facts = Facts(**data["facts"])
    program = Program(module, inputs, plan, facts, Dialect.CACHED)
    program.caches = CacheSpec.from_json(data["cache"])
    program.layout = BatchLayout.from_json(data["layout"])
    program.clean()
    return program


class LaidOutSource:
    """Canonical weights of an artifact whose file holds them in a provider's layout."""

    def __init__(self, weights: Mapping[str, torch.Tensor], layout_steps: list[Step]) -> None:
        self._weights = weights
        self._maker = {name: step for step in layout_steps for name in step.inputs}

    def tensor(self, name: str) -> torch.Tensor:
        if name in self._weights:
            return self._weights[name]
        from smelt.passes.layouts import INVERSES

        step = self._maker[name]
        laid_out = [self._weights[n] for n in step.outputs]
        canonical = INVERSES[step.op](*laid_out, **step.args)
        return canonical[step.inputs.index(name)]
