"""Merge linear layers that read the same value."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import fx

from ..base import Close, Pass, PassResult
from ..program import Program, module_path
from ..quantize.stored import stored_form
from ..rewrite import aten, dtype, shape


class FuseLinears(Pass):
    """Siblings over one input become one product and slices of it.

    Before                              After
        q = aten.linear(x, wq)              y = aten.linear(x, w)       w: cat of wq, wk, wv
        k = aten.linear(x, wk)              q = aten.slice(y, -1, 0, Nq)
        v = aten.linear(x, wv)              k = aten.slice(y, -1, Nq, Nq + Nk) ...

    Legal when the siblings stand in one module, have one dtype and, in a quantized checkpoint, one
    form, and all or none has a bias. q, k and v fuse, and gate and up. Close and not exact: another
    shape may sum in another order. Pays in decoding, where a step costs by the number of
    matrix-vector calls and the small k and v products do not fill the memory bus.
    """

    name = "fuse-linears"
    summary = "q, k, v and gate, up become one linear each; weights are concatenated in the plan"
    numerics = Close()

    def expect(self, program: Program) -> int | None:
        return program.facts.module_counts.get("sibling_linears", 0)

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        families: dict[tuple[Any, str], list[fx.Node]] = defaultdict(list)
        for node in program.calls(aten.linear.default):
            if program.weight_name(node.args[1]) is not None:
                parent = module_path(node).rpartition(".")[0]
                families[(node.args[0], parent)].append(node)
        for family in families.values():
            if len(family) < 2:
                continue
            result.matched += 1
            reason = _refusal(program, family)
            if reason is not None:
                result.decline(family[0], reason)
                continue
            _fuse(program, family)
            result.rewritten += 1
        return result


def _bias(node: fx.Node) -> fx.Node | None:
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) else None


def _refusal(program: Program, family: list[fx.Node]) -> str | None:
    if len({_bias(node) is None for node in family}) > 1:
        return "some of the siblings have a bias and some have none"
    if any(program.weight_name(b) is None for b in map(_bias, family) if b is not None):
        return "a bias is computed in the graph"
    if len({dtype(node.args[1]) for node in family}) > 1:
        return "the siblings' weights have different dtypes"
    names = [program.weight_name(node.args[1]) or "" for node in family]
    if len(set(names)) < len(family):
        return "two siblings share one weight"
    if len({stored_form(program.weights, name) for name in names}) > 1:
        return "the checkpoint holds the siblings in different quantized forms, or in uneven blocks"
    return None


def _fuse(program: Program, family: list[fx.Node]) -> None:
    names = [program.weight_name(node.args[1]) or "" for node in family]
    joined = _joined_name(names)
    (name,) = program.weights.add("cat", [joined], names, dim=0)
    biases = [_bias(node) for node in family]
    bias: fx.Node | None = None
    if biases[0] is not None:
        sources = [program.weight_name(b) or "" for b in biases]
        (bias_name,) = program.weights.add("cat", [_joined_name(sources)], sources, dim=0)
        bias = program.weight(bias_name)
    weight = program.weight(name)
    start = 0
    with program.graph.inserting_before(family[0]):
        whole = program.call(aten.linear.default, (family[0].args[0], weight, bias), family[0])
        pieces = []
        for node in family:
            width = shape(node)[-1]
            args = (whole, len(shape(node)) - 1, start, start + width)
            pieces.append(program.call(aten.slice.Tensor, args, like=node))
            start += width
    for node, piece in zip(family, pieces, strict=True):
        program.replace(node, piece)


def _joined_name(names: list[str]) -> str:
    """layers.0.self_attn.{q,k,v}_proj.weight -> layers.0.self_attn.q_k_v_proj.weight"""
    parts = [name.split("@")[0].split(".") for name in names]
    at = next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), -1)
    if at < 0:
        return names[0] + ".joined"
    leaves = [p[at] for p in parts]
    ending = "_" + leaves[0].rsplit("_", 1)[1] if "_" in leaves[0] else ""
    if not all(leaf.endswith(ending) for leaf in leaves):
        ending = ""
    stem = "_".join(leaf.removesuffix(ending) for leaf in leaves) + ending
    return ".".join([*parts[0][:at], stem, *parts[0][at + 1 :]])
