"""Recognise rotary position embedding applied to queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..base import Close, Pass, PassResult
from ..program import Program
from ..rewrite import aten, dtype, is_call, only_user, operands, past_casts, shape, uncast


@dataclass(frozen=True)
class _Match:
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    end: fx.Node


class CanonicalizeRope(Pass):
    """x * cos + rotate(x) * sin becomes one node, over tables shared by all layers.

    Before                                          After
        a = aten.mul(x, cos)      x: [1, H, T, D]       r = smelt.rope(x', cos', sin', interleaved)
        r = aten.cat([-x[D/2:], x[:D/2]], -1)           x': [T, H, D]; cos', sin': [T, D'], taken
        y = aten.add(a, aten.mul(r, sin))               once where the angles are computed

    Halves (Llama) and interleaved pairs (Cohere) are recognised; where only the first D' features
    turn and the rest is concatenated behind them (GPT-NeoX, Phi), one node covers both. Legal when
    cos and sin have no head dimension. Pays because the tables leave the layers, and because a
    kernel that fuses rotation with the cache write has one node to look for.
    """

    name = "canonicalize-rope"
    summary = "rotary products become smelt::rope; cos and sin tables are taken once a step"
    after = ("remove-noops",)
    numerics = Close()

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        tables: dict[fx.Node, fx.Node] = {}
        for node in program.calls(aten.add.Tensor):
            match = _match(node)
            if match is None:
                continue
            result.matched += 1
            reason = _refusal(match)
            if reason is not None:
                result.decline(node, reason)
                continue
            cos = _table(program, match.cos, tables)
            sin = _table(program, match.sin, tables)
            _replace(program, match, cos, sin)
            result.rewritten += 1
        return result


def _match(add: fx.Node) -> _Match | None:
    left, right = operands(add)
    for plain, turned in ((left, right), (right, left)):
        if not is_call(plain, aten.mul.Tensor) or not is_call(turned, aten.mul.Tensor):
            continue
        x, cos = operands(plain)
        rotated, sin = operands(turned)
        kind = _rotation_of(rotated, x)
        if kind is not None and isinstance(cos, fx.Node) and isinstance(sin, fx.Node):
            return _with_rest(_Match(x, cos, sin, kind, add))
    return None


def _rotation_of(node: Any, x: Any) -> bool | None:
    """False for rotated halves of x, True for interleaved pairs, None for anything else."""
    if is_call(node, aten.cat.default) and len(node.args[0]) == 2:
        minus, plus = node.args[0]
        if is_call(minus, aten.neg.default) and _slice(minus.args[0], x) == (shape(x)[-1] // 2, 1):
            return False if _slice(plus, x) == (0, 1) else None
    if is_call(node, aten.flatten.using_ints) and _stacks_last(node.args[0], x):
        minus, plus = node.args[0].args[0]
        if is_call(minus, aten.neg.default) and _slice(minus.args[0], x) == (1, 2):
            return True if _slice(plus, x) == (0, 2) else None
    return None


def _stacks_last(node: Any, x: Any) -> bool:
    """Whether `node` stacks pairs behind the last dimension: any other gives halves."""
    if not is_call(node, aten.stack.default) or len(node.args[0]) != 2:
        return False
    return len(node.args) > 1 and node.args[1] in (-1, len(shape(x)))


def _slice(node: Any, x: Any) -> tuple[int, int] | None:
    """(start, step) when `node` slices the last dimension of x."""
    if not is_call(node, aten.slice.Tensor) or node.args[0] is not x:
        return None
    if node.args[1] not in (-1, len(shape(x)) - 1):
        return None
    return node.args[2], node.args[4] if len(node.args) > 4 else 1


def _with_rest(match: _Match) -> _Match:
    """Widen a match over the features that do not turn, when they are joined right behind."""
    end = past_casts(match.end)
    user = only_user(end)
    part = uncast(match.x)
    if user is None or not is_call(user, aten.cat.default) or not is_call(part, aten.slice.Tensor):
        return match
    whole = part.args[0]
    pieces: Any = user.args[0]
    if len(pieces) != 2 or pieces[0] is not end or _slice(part, whole) != (0, 1):
        return match
    if shape(user) != shape(whole):
        return match
    if _slice(uncast(pieces[1]), whole) != (shape(part)[-1], 1):
        return match
    return _Match(whole, match.cos, match.sin, match.interleaved, user)


def _refusal(match: _Match) -> str | None:
    if len(shape(match.x)) != 4 or shape(match.x)[0] != 1:
        return f"expected [1, H, T, D], found {list(shape(match.x))}"
    for table in (match.cos, match.sin):
        if len(shape(table)) != 4 or shape(table)[1] != 1:
            return f"cos or sin differs between heads: {list(shape(table))}"
    return None


def _table(program: Program, node: fx.Node, tables: dict[fx.Node, fx.Node]) -> fx.Node:
    """[1, 1, T, D'] -> [T, D'], made once for a table and placed right behind it."""
    source = node.args[0] if is_call(node, aten.unsqueeze.default) else node
    assert isinstance(source, fx.Node)
    if source not in tables:
        flat = source
        while len(shape(flat)) > 2:
            with program.graph.inserting_after(flat):
                flat = program.call(aten.select.int, (flat, 0, 0), like=source)
        tables[source] = flat
    return tables[source]


def _replace(program: Program, match: _Match, cos: fx.Node, sin: fx.Node) -> None:
    with program.graph.inserting_before(match.end):
        heads = program.call(aten.select.int, (match.x, 0, 0), like=match.end)
        packed = program.call(aten.transpose.int, (heads, 0, 1), like=match.end)
        args = (packed, cos, sin, match.interleaved)
        turned = program.call(torch.ops.smelt.rope.default, args, like=match.end)
        if dtype(turned) != dtype(match.end):
            turned = program.call(aten.to.dtype, (turned, dtype(match.end)), like=match.end)
        back = program.call(aten.transpose.int, (turned, 0, 1), like=match.end)
        back = program.call(aten.unsqueeze.default, (back, 0), like=match.end)
    program.replace(match.end, back)
