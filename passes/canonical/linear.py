"""Bring every matrix product with a weight into `aten.linear` with an [N, K] weight."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..base import Close, Pass, PassResult
from ..program import Dialect, Program
from ..rewrite import aten, is_call, shape


class CanonicalizeLinear(Pass):
    """GPT-2's Conv1D and bare products become linears; its views around them go.

    Before                                          After
        f = aten.view(x, [-1, K])                       y = aten.linear(x, w_t, b)
        m = aten.addmm(b, f, w)        w: [K, N]        w_t: transpose step in the weight plan
        y = aten.view(m, [1, T, N])

    Legal when the weight is a two-dimensional weight of the model. Pays because every later pass
    (fusion, quantization, providers) then knows one form of a linear layer.
    """

    name = "canonicalize-linear"
    summary = "addmm and mm with a weight become aten.linear, transposed in the weight plan"
    requires = Dialect.ATEN
    produces = Dialect.SEMANTIC
    numerics = Close()

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        for node in program.calls(aten.addmm.default, aten.mm.default, aten.matmul.default):
            bias = node.args[0] if is_call(node, aten.addmm.default) else None
            x, weight = node.args[-2:]
            name = program.weight_name(weight)
            if name is None or len(shape(weight)) != 2:
                continue
            result.matched += 1
            if bias is not None and (program.weight_name(bias) is None or len(shape(bias)) != 1):
                result.decline(node, "the added term is not a bias of the model")
                continue
            if node.kwargs:
                result.decline(node, f"the product is scaled by {dict(node.kwargs)}")
                continue
            assert isinstance(x, fx.Node)
            self._rewrite(program, node, x, name, bias)
            result.rewritten += 1
        return result

    def _rewrite(self, program: Program, node: fx.Node, x: fx.Node, name: str, bias: Any) -> None:
        (turned,) = program.weights.add("transpose", [name + ".t"], [name], dim0=0, dim1=1)
        weight = program.weight(turned)
        end = _restoring_view(node, x)
        source = x.args[0] if end is not node else x
        assert isinstance(source, fx.Node)
        with program.graph.inserting_after(end):
            linear = program.call(aten.linear.default, (source, weight, bias), like=node)
        program.replace(end, linear)


def _restoring_view(node: fx.Node, x: fx.Node) -> fx.Node:
    """The view after `node` that undoes the flattening before it, or `node` itself."""
    if not is_call(x, aten.view.default) or len(node.users) != 1:
        return node
    user = next(iter(node.users))
    before = x.args[0]
    flattened = shape(x)[-1] == shape(before)[-1]
    same = is_call(user, aten.view.default) and shape(user)[:-1] == shape(before)[:-1]
    return user if flattened and same else node
