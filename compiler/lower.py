"""Lower: a LOWERED program to something that runs.

The program is exported once more, which derives every shape anew, and goes to AOTInductor with its
constants left out: the runtime hands it memory-mapped weights. `torch.compile` and eager take the
same export.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from smelt.passes.program import Program, Role
from smelt.runtime.batch import CacheSpec, step_input_names
from smelt.runtime.errors import SmeltError

# Sizes of the example step. All differ and none is 1, so that no two symbols merge and none is
# taken for a constant.
EXAMPLE_T, EXAMPLE_B, EXAMPLE_M, EXAMPLE_R, EXAMPLE_W, EXAMPLE_BLOCKS = 8, 3, 5, 2, 6, 7


# Steps a CUDA program is compiled for, smallest first: most tokens in all, and most that one
# sequence brings; 0 is any number. Triton kernels for few rows and for many are different ones, and
# a compiled step cannot look at its own size.
BOUNDS = {"few": (16, 16), "some": (64, 16), "step": (0, 0)}


class LowerError(SmeltError):
    """Inductor or the C++ compiler refused the graph."""


def constant_name(planned: str) -> str:
    """Name of a planned weight inside a package: letters, digits and underscores."""
    return "w_" + "".join(c if c.isalnum() else "_" for c in planned)


def step_module(program: Program) -> tuple[fx.GraphModule, dict[str, str]]:
    """The step as a module: weights as parameters, inputs in the contract's order.

    Returns the module and {parameter name: planned weight name}. Parameters are untouched pages of
    the planned shapes; nothing reads them.
    """
    assert program.caches is not None
    graph = copy.deepcopy(program.graph)
    root = nn.Module()
    constants: dict[str, str] = {}
    inputs: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        entry = program.inputs[node.name]
        if entry.role is not Role.WEIGHT:
            inputs[entry.name] = node
            continue
        name = constant_name(entry.name)
        while constants.get(name, entry.name) != entry.name:
            name += "_"
        constants[name] = entry.name
        spec = program.weights.specs[entry.name]
        empty = torch.empty(spec.shape, dtype=spec.dtype, device=program.target)
        root.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        with graph.inserting_before(node):
            attribute = graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    _reorder_inputs(graph, inputs, step_input_names(program.caches))
    graph.lint()
    return fx.GraphModule(root, graph), constants


def bound_step(module: fx.GraphModule, rows: int, query: int) -> bool:
    """Tell the kernels of a step how many tokens it has at most, and one sequence of it.

    Returns whether there is a kernel that asks.
    """
    asked = False
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.name.startswith("smelt::"):
            continue
        for i, argument in enumerate(schema.arguments):
            if argument.name in ("rows", "max_query"):
                node.update_arg(i, rows if argument.name == "rows" else query)
                asked = True
    module.recompile()
    return asked


def _reorder_inputs(graph: fx.Graph, inputs: dict[str, fx.Node], order: list[str]) -> None:
    """Placeholders in contract order, one for each name; an input nothing reads gets one too."""
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        for name in order:
            new = graph.placeholder(name)
            old = inputs.get(name)
            if old is not None:
                new.meta = dict(old.meta)
                old.replace_all_uses_with(new)
                graph.erase_node(old)


def example_inputs(spec: CacheSpec, device: str) -> tuple[torch.Tensor, ...]:
    """A small step of the contract's dtypes, for export."""
    long, small = torch.int64, torch.int32
    out = [
        torch.zeros(EXAMPLE_T, dtype=long),
        torch.arange(EXAMPLE_T, dtype=long),
        torch.tensor([0, 3, 5, 8], dtype=small),
        torch.tensor([3, 2, 3], dtype=small),
        torch.ones(EXAMPLE_T, EXAMPLE_W, dtype=torch.bool),
    ]
    if spec.rope is not None:
        out.append(torch.arange(1, EXAMPLE_T + 1, dtype=long))
    for _ in spec.groups:
        out += [
            torch.arange(EXAMPLE_T, dtype=long),
            torch.zeros(EXAMPLE_B, EXAMPLE_M, dtype=small),
        ]
    out.append(torch.tensor([2, 7], dtype=long))
    return tuple(x.to(device) for x in out) + tuple(spec.allocate(EXAMPLE_BLOCKS, device))


def dynamic_shapes(spec: CacheSpec) -> tuple[dict[int, Any], ...]:
    """Which dimensions of `example_inputs` are symbolic."""
    tokens, dynamic = {0: Dim.DYNAMIC}, Dim.DYNAMIC
    out: list[dict[int, Any]] = [
        tokens,
        tokens,
        {0: dynamic},
        {0: dynamic},
        {0: dynamic, 1: dynamic},
    ]
    if spec.rope is not None:
        out.append(tokens)
    for _ in spec.groups:
        out += [tokens, {0: dynamic, 1: dynamic}]
    out.append({0: dynamic})
    return tuple(out) + tuple({0: dynamic} for _ in range(spec.layers))


def export_step(module: nn.Module, spec: CacheSpec, device: str) -> ExportedProgram:
    """Export a step module over the contract's inputs. Raises LowerError with the first line."""
    try:
        with torch.no_grad():
            return torch.export.export(
                module,
                example_inputs(spec, device),
                dynamic_shapes=dynamic_shapes(spec),
                strict=False,
            )
    except Exception as error:
        raise LowerError(f"the lowered graph does not export: {_first(error)}") from error


def compile_package(exported: ExportedProgram, path: Path, log: Path) -> None:
    """AOTInductor: write the package of a step without its constants to `path`.

    The C++ compiler's output goes to `log`. Raises LowerError with its first error line.
    """
    from torch._inductor import aoti_compile_and_package

    configs = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.use_runtime_constant_folding": False,
        "always_keep_tensor_constants": True,
        # Otherwise the number of threads of the machine that compiled is baked into every loop.
        "cpp.dynamic_threads": True,
    }
    try:
        with _quiet(log):
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs=configs)
    except Exception as error:
        raise LowerError(
            f"AOTInductor failed: {_first(error)} (full output in {log}); "
            "compile with --backend eager to go on without it"
        ) from error


def compile_steps(program: Program, folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Write a package for each of BOUNDS that a kernel asks about into folder/graphs.

    Returns (the manifest's `steps`, which constant each input is). Raises LowerError; the
    compiler's output is then in folder/compile.log.
    """
    assert program.caches is not None
    module, constants = step_module(program)
    log, steps = folder / "compile.log", []
    for name, (rows, query) in BOUNDS.items():
        if not bound_step(module, rows, query) and rows:
            continue  # no kernel asks: the one step serves all sizes
        file = f"graphs/{name}.pt2"
        compile_package(export_step(module, program.caches, program.target), folder / file, log)
        steps.append({"file": file, "max_tokens": rows, "max_query": query})
    log.unlink(missing_ok=True)
    return steps, constants


@contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Native output of compilers to a file: it would tear the progress display."""
    log.parent.mkdir(parents=True, exist_ok=True)
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            for fd, copy_ in zip((1, 2), saved, strict=True):
                os.dup2(copy_, fd)
                os.close(copy_)


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "?")
