"""Helpers to walk and match graphs; the only file of the passes that touches torch's matchers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import fx

aten = torch.ops.aten

# Operators that only rename or reinterpret a value; a walk up a chain may pass through them.
CASTS = {
    aten.to.dtype,
    aten.to.device,
    aten._to_copy.default,
    aten.to.dtype_layout,
    aten.type_as.default,
}
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.contiguous.default,
    aten.permute.default,
    aten.expand.default,
}


def is_call(node: Any, *targets: Any) -> TypeGuard[Any]:
    """Whether `node` is a call of one of `targets`. To the type checker it is then anything: fx
    types arguments as a union of all values a graph can hold."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def skip(node: Any, targets: set[Any]) -> Any:
    """Walk up through single-input operators in `targets`."""
    while is_call(node, *targets):
        node = node.args[0]
    return node


def uncast(node: Any) -> Any:
    """The value before dtype and device conversions."""
    return skip(node, CASTS)


def operands(node: fx.Node) -> tuple[Any, Any]:
    return node.args[0], node.args[1]


def split_operands(node: fx.Node, test: Callable[[Any], bool]) -> tuple[Any, Any] | None:
    """(the operand that passes `test`, the other one) of a commutative call, or None."""
    left, right = operands(node)
    if test(left):
        return left, right
    if test(right):
        return right, left
    return None


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def past_casts(node: fx.Node) -> fx.Node:
    """Walk down while the only user is a conversion."""
    user = only_user(node)
    while user is not None and is_call(user, *CASTS):
        node, user = user, only_user(user)
    return node


def shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def dtype(node: Any) -> torch.dtype:
    value = node.meta["val"].dtype
    assert isinstance(value, torch.dtype)
    return value


def getitem(node: fx.Node, index: int) -> fx.Node:
    """A tuple element read at the graph's insertion point."""
    item = node.graph.call_function(operator.getitem, (node, index))
    item.meta = {**node.meta, "val": node.meta["val"][index]}
    return item


def graph_text(graph: fx.Graph) -> str:
    """The graph as numbered SSA lines with shapes and dtypes, stable across runs and versions.

    Symbolic sizes are named by first appearance, so that a golden text does not depend on torch's
    numbering of symbols.
    """
    symbols: dict[str, str] = {}

    def size(value: Any) -> str:
        text = str(value)
        if isinstance(value, int):
            return text
        return symbols.setdefault(text, f"s{len(symbols)}")

    def describe(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            name = str(value.dtype).removeprefix("torch.")
            return f"{name}[{', '.join(size(s) for s in value.shape)}]"
        if isinstance(value, tuple | list):
            return f"({', '.join(describe(v) for v in value)})"
        return "int" if isinstance(value, torch.SymInt | int) else type(value).__name__

    names: dict[fx.Node, str] = {}
    lines = []
    for node in graph.nodes:
        names[node] = f"%{len(names)}"
        args = ", ".join(
            [str(fx.node.map_arg(a, lambda n: _Name(names[n]))) for a in node.args]
            + [
                f"{k}={fx.node.map_arg(v, lambda n: _Name(names[n]))}"
                for k, v in node.kwargs.items()
            ]
        )
        if node.op == "placeholder":
            lines.append(f"{names[node]}: {describe(node.meta['val'])} = input {node.name}")
        elif node.op == "output":
            lines.append(f"return {args}")
        else:
            target = (
                str(node.target)
                if not callable(node.target) or hasattr(node.target, "_schema")
                else getattr(node.target, "__name__", str(node.target))
            )
            lines.append(f"{names[node]}: {describe(node.meta.get('val'))} = {target}({args})")
    return "\n".join(lines) + "\n"


class _Name(str):
    def __repr__(self) -> str:
        return str(self)
