"""Compute logits only where the engine wants them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..base import Exact, Pass, PassResult
from ..program import Program, Role
from ..rewrite import aten, is_call, shape

_ROWWISE = {
    aten.slice.Tensor,
    aten.select.int,
    aten.linear.default,
    aten.view.default,
    aten.reshape.default,
    aten.to.dtype,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten.layer_norm.default,
    torch.ops.smelt.rms_norm.default,
    torch.ops.smelt.linear_int2.default,
    torch.ops.smelt.linear_int3.default,
    torch.ops.smelt.linear_int4.default,
    torch.ops.smelt.linear_int8.default,
}


class KeepLogitsRows(Pass):
    """Pick the wanted rows before the last norm and the output layer.

    Before                                          After
        n = smelt.rms_norm(x, w)   x: [1, T, K]         r = aten.index_select(x, 1, logits_rows)
        y = aten.linear(n, head)                        n = smelt.rms_norm(r, w)
        -> [T, V]                                       y = aten.linear(n, head)      -> [R, V]

    Legal for the operators at the end that treat each row by itself; the walk up from the output
    stops at the first that does not, or that has another reader. Pays most in prefill: of a
    1024-token prompt one row of logits is wanted, and the output layer of a small model is a third
    of its work.
    """

    name = "keep-logits-rows"
    summary = "a logits_rows input selects rows before the last norm and the output layer"
    numerics = Exact()

    def expect(self, program: Program) -> int | None:
        return 1

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        if any(program.inputs[n.name].name == "logits_rows" for n in program.placeholders()):
            return result
        chain = _rowwise_tail(program)
        if not any(is_call(n, aten.linear.default) or "linear_int" in n.name for n in chain):
            last = chain[-1] if chain else next(n for n in program.graph.nodes if n.op == "output")
            result.decline(last, "no output layer found between the last layer and the logits")
            return result
        first = chain[-1]
        (source,) = _moving_inputs(program, first)
        rows = program.dynamic_input((3,), torch.int64, (0,), "logits_rows")
        rows_node = program.add_input("logits_rows", Role.BATCH, rows)
        with program.graph.inserting_before(first):
            dim = _token_dim(source)
            kept = program.call(aten.index_select.default, (source, dim, rows_node), like=first)
            count = program.call(aten.sym_size.int, (rows_node, 0), like=first)
        first.replace_input_with(source, kept)
        tokens = set(program.calls(aten.sym_size.int)) - {count}
        for node in reversed(chain):
            for size in tokens & set(node.all_input_nodes):
                node.replace_input_with(size, count)
            program.revalue(node)
        result.matched = result.rewritten = 1
        return result


def _rowwise_tail(program: Program) -> list[fx.Node]:
    """From the output upwards: the calls that treat rows independently and have one reader."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    value = output.args[0]
    node = value[0] if isinstance(value, list | tuple) else value
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _ROWWISE:
        if len(node.users) != 1:
            break
        moving = _moving_inputs(program, node)
        if len(moving) != 1 or _cuts_tokens(node, moving[0]):
            break
        chain.append(node)
        node = moving[0]
    return chain


def _moving_inputs(program: Program, node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if _moves_with_tokens(program, n)]


def _token_dim(node: fx.Node) -> int:
    return next(i for i, size in enumerate(shape(node)) if isinstance(size, torch.SymInt))


def _cuts_tokens(node: fx.Node, source: fx.Node) -> bool:
    """Whether a slice or select takes some of the tokens, so that rows change their numbers."""
    if not is_call(node, aten.slice.Tensor, aten.select.int):
        return False
    dim = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(dim, int)
    whole = is_call(node, aten.slice.Tensor) and shape(node) == shape(source)
    return dim % len(shape(source)) == _token_dim(source) and not whole


def _moves_with_tokens(program: Program, node: fx.Node) -> bool:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or program.weight_name(node) is not None:
        return False
    return any(isinstance(size, torch.SymInt) for size in value.shape)
