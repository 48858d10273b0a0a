"""Cancel views that undo each other."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..base import Exact, Pass, PassResult
from ..program import Program
from ..rewrite import aten, is_call


class SimplifyViews(Pass):
    """Remove a transpose of the same transpose, and a select of an unsqueeze.

    Before                                          After
        a = aten.unsqueeze(aten.transpose(x, 0, 1), 0)  (x)
        y = aten.transpose(aten.select(a, 0, 0), 0, 1)

    Always legal: both are views. Pays in reading: what the rotary pass turns back to the model's
    layout, attention would turn forth again.
    """

    name = "simplify-views"
    summary = "cancel transpose of transpose and select of unsqueeze"
    after = ("canonicalize-rope",)
    numerics = Exact()

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        for node in program.calls(aten.transpose.int, aten.select.int):
            kept = _undone(node)
            if kept is not None:
                result.matched += 1
                result.rewritten += 1
                program.replace(node, kept)
        return result


def _undone(node: fx.Node) -> fx.Node | None:
    inner = node.args[0]
    if is_call(node, aten.transpose.int) and is_call(inner, aten.transpose.int):
        same = set(node.args[1:]) == set(inner.args[1:])
        return inner.args[0] if same else None
    if is_call(node, aten.select.int) and is_call(inner, aten.unsqueeze.default):
        same = node.args[1:] == (0, 0) and inner.args[1] == 0
        return inner.args[0] if same else None
    return None
