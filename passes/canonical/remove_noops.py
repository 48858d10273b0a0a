"""Drop calls that give back what they were given."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..base import Exact, Pass, PassResult
from ..program import Dialect, Program
from ..rewrite import aten, dtype, is_call, shape

_END = 9223372036854775807


class RemoveNoops(Pass):
    """Replace identities by their input.

    Before                                   After
        a = aten.dropout(x, p, False)            (x)
        b = aten.to.dtype(a, float32)
        c = aten.mul(b, 1.0)

    Legal for: dropout and alias in evaluation, conversions to the dtype and device a value already
    has, multiplication by exactly one in one dtype, slices of everything, concatenation with
    nothing. Tracing leaves a dozen of them a layer; without them later passes match one form and
    not five.
    """

    name = "remove-noops"
    summary = "drop dropout, conversions to the same dtype, whole slices, products with one"
    requires = Dialect.ATEN
    numerics = Exact()

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        for node in program.calls():
            kept = _identity_of(node)
            if kept is not None:
                result.matched += 1
                result.rewritten += 1
                program.replace(node, kept)
        return result


def _identity_of(node: fx.Node) -> fx.Node | None:
    """The input that `node` returns unchanged, or None."""
    if is_call(node, aten.dropout.default) and not node.args[2]:
        return _node(node.args[0])
    if is_call(node, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default):
        return _node(node.args[0])
    if is_call(node, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default):
        x = _node(node.args[0])
        same = x is not None and dtype(x) == dtype(node) and _device(x) == _device(node)
        return x if same else None
    if is_call(node, aten.mul.Tensor) and node.args[1] == 1.0:
        x = _node(node.args[0])
        return x if x is not None and dtype(x) == dtype(node) else None
    if is_call(node, aten.slice.Tensor):
        return _whole_slice(node)
    if is_call(node, aten.cat.default):
        return _cat_with_nothing(node)
    if is_call(node, aten.view.default, aten.reshape.default):
        x = _node(node.args[0])
        return x if x is not None and shape(x) == shape(node) else None
    return None


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _device(node: fx.Node) -> Any:
    return node.meta["val"].device


def _whole_slice(node: fx.Node) -> fx.Node | None:
    start = node.args[2] if len(node.args) > 2 else 0
    end = node.args[3] if len(node.args) > 3 else _END
    step = node.args[4] if len(node.args) > 4 else 1
    whole = start in (0, None) and end in (_END, None) and step == 1
    return _node(node.args[0]) if whole else None


def _cat_with_nothing(node: fx.Node) -> fx.Node | None:
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    dim = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(dim, int)
    full = [p for p in parts if isinstance(p, fx.Node) and not _is_empty(p, dim)]
    alone = len(full) == 1 and len(parts) > 1 and dtype(full[0]) == dtype(node)
    return full[0] if alone else None


def _is_empty(node: fx.Node, dim: int) -> bool:
    """Whether a part adds nothing; torch lets a [0] stand among parts of any rank."""
    sizes = shape(node)
    return bool(sizes == (0,) or sizes[dim] == 0)
