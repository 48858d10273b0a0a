"""Where each channel of a value goes: the question behind folding a scale into a producer.

Dividing channel c of a producer (a norm, a linear) by a factor changes nothing if every linear that
reads the channel multiplies the matching column, and if all that lies between passes the factor on
untouched. Instead of matching patterns of views, slices and head reshapes, the producer's channel
numbers themselves are pushed through the graph: operators that only move data are run on a tensor
of channel numbers, the few that pass a factor on are known by name, and every other reader *blocks*
the channels that reach it, with a reason. What arrives at a linear says which channel each of its
columns reads.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from smelt.passes.dialect import smelt_name
from smelt.passes.program import module_path
from smelt.passes.rewrite import CASTS, is_call

from .linears import LINEAR

aten = torch.ops.aten

# How many tokens the channel numbers are repeated for: 2 shows an operator that mixes tokens.
TOKENS = 2
NOT_HERE = -1

_SAME = CASTS | {
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.neg.default,
}
# Homogeneous for positive factors: relu(x / s) = relu(x) / s.
_HOMOGENEOUS = {aten.relu.default}
_MOVES = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.expand.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.cat.default,
    aten.repeat_interleave.self_int,
    aten.index_select.default,
    operator.getitem,
}


@dataclass
class Reach:
    """What a producer's channels reach.

    columns: for each linear, int64 [K]: the producer's channel each of its columns reads.
    blocked: for each channel number, why its factor cannot be passed on.
    """

    columns: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    blocked: dict[int, str] = field(default_factory=dict)

    def block(self, channels: torch.Tensor, reason: str) -> None:
        for channel in channels.unique().tolist():
            if channel != NOT_HERE:
                self.blocked.setdefault(int(channel), reason)


def follow(producer: fx.Node) -> Reach:
    """Push the channel numbers of `producer`, whose last dimension holds its channels, forward."""
    reach = Reach()
    shape = concrete(producer.meta["val"].shape)
    numbers: dict[fx.Node, Any] = {producer: torch.arange(shape[-1]).expand(shape)}
    for node in _downstream(producer):
        labelled = [n for n in node.all_input_nodes if n in numbers]
        if not labelled:
            continue
        result = _step(node, numbers, reach)
        if result is not None:
            numbers[node] = result
    return reach


def concrete(shape: Any) -> tuple[int, ...]:
    """A shape with every symbolic size taken at T = TOKENS."""
    return tuple(_size(size) for size in shape)


def _size(value: Any) -> int:
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, TOKENS)))
    return int(value)


def _downstream(producer: fx.Node) -> list[fx.Node]:
    nodes = list(producer.graph.nodes)
    return nodes[nodes.index(producer) + 1 :]


def _step(node: fx.Node, numbers: dict[fx.Node, Any], reach: Reach) -> Any:
    """The channel numbers of `node`, or None where they end: at a linear, or blocked."""
    if node.target in _SAME or node.target in _HOMOGENEOUS:
        return numbers[node.args[0]]  # type: ignore[index]
    if node.target in _MOVES:
        move: Any = node.target
        return move(*_arguments(node.args, numbers), **_arguments(node.kwargs, numbers))
    if is_call(node, LINEAR):
        return _at_linear(node, numbers, reach)
    if is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return _through_product(node, numbers, reach)
    if smelt_name(node) == "gated_activation":
        gate, up = node.args[0], node.args[1]
        _block(reach, numbers, gate, f"it is the gate of {_where(node)}")
        return numbers.get(up)  # type: ignore[arg-type]
    if smelt_name(node) == "attention":
        return _through_attention(node, numbers, reach)
    for source in node.all_input_nodes:
        _block(reach, numbers, source, f"it is read by {_where(node)}")
    return None


def _at_linear(node: fx.Node, numbers: dict[fx.Node, Any], reach: Reach) -> None:
    for other in node.all_input_nodes:
        if other is not node.args[0]:
            _block(reach, numbers, other, f"{_where(node)} reads it as a weight")
    arrived = numbers.get(node.args[0])  # type: ignore[arg-type]
    if arrived is None:
        return
    columns = arrived.reshape(-1, arrived.shape[-1])
    if not (columns == columns[0]).all():
        reach.block(columns, f"{_where(node)} reads different channels for different tokens")
    elif (columns[0] == NOT_HERE).any():
        reach.block(columns, f"only some columns of {_where(node)} read it")
    else:
        reach.columns[node] = columns[0].clone()


def _through_product(node: fx.Node, numbers: dict[fx.Node, Any], reach: Reach) -> Any:
    """a * b passes on the factor of one operand; the other must not come from the producer."""
    left, right = node.args[0], node.args[1]
    if left in numbers and right in numbers:
        for side in (left, right):
            _block(reach, numbers, side, f"{_where(node)} multiplies it with itself")
        return None
    if right in numbers and is_call(node, aten.div.Tensor):
        _block(reach, numbers, right, f"{_where(node)} divides by it")
        return None
    known = numbers[left if left in numbers else right]  # type: ignore[index]
    return known.expand(concrete(node.meta["val"].shape))


def _through_attention(node: fx.Node, numbers: dict[fx.Node, Any], reach: Reach) -> Any:
    """Attention mixes the values of tokens channel by channel: a factor on v comes out of it.

    v [T, G, D] -> [T, H, D]; the H / G query heads of a kv head share its channels, and so a scale.
    """
    query, _key, value = node.args[:3]
    for source in node.all_input_nodes:
        if source is not value or source in node.args[:2]:
            _block(reach, numbers, source, f"{_where(node)} takes it as queries or keys")
    arrived = numbers.get(value)  # type: ignore[arg-type]
    if arrived is None or value in node.args[:2]:
        return None
    if not (arrived == arrived[:1]).all():
        reach.block(arrived, f"{_where(node)} mixes tokens of different channels")
        return None
    heads = concrete(query.meta["val"].shape)[1]  # type: ignore[union-attr]
    return arrived.repeat_interleave(heads // arrived.shape[1], 1)


def _block(reach: Reach, numbers: dict[fx.Node, Any], source: Any, reason: str) -> None:
    found = numbers.get(source)
    if found is None:
        return
    for part in found if isinstance(found, list | tuple) else (found,):
        reach.block(part, reason)


def _arguments(args: Any, numbers: dict[fx.Node, Any]) -> Any:
    """Node arguments as values to move: channel numbers, sizes, and NOT_HERE for other tensors."""

    def value(node: fx.Node) -> Any:
        if node in numbers:
            return numbers[node]
        val = node.meta["val"]
        if isinstance(val, torch.Tensor):
            if val.dtype in (torch.int64, torch.int32):  # an index: which rows is of no matter
                return torch.zeros(concrete(val.shape), dtype=val.dtype)
            return torch.full(concrete(val.shape), NOT_HERE)
        return _size(val)

    return fx.node.map_arg(args, value)


def _where(node: fx.Node) -> str:
    path = module_path(node)
    return f"{node.name} in {path}" if path else node.name
