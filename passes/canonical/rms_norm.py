"""Recognise root-mean-square normalisation by its structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..base import Close, Pass, PassResult
from ..program import Program
from ..rewrite import aten, dtype, is_call, only_user, past_casts, shape, split_operands, uncast


@dataclass(frozen=True)
class _Match:
    x: fx.Node
    weight: fx.Node | None
    eps: float
    offset: float
    end: fx.Node


class _NearMiss(Exception):
    """The structure starts like a norm and then differs; the text says where."""


class CanonicalizeRmsNorm(Pass):
    """x * rsqrt(mean(x^2) + eps) * weight becomes one node.

    Before                                          After
        w = aten.to.dtype(x, float32)                   y = smelt.rms_norm(x, weight, eps, offset)
        v = aten.mean(aten.pow(w, 2), [-1], True)
        n = aten.mul(w, aten.rsqrt(aten.add(v, eps)))
        y = aten.mul(weight, aten.to.dtype(n, dtype))

    Legal when the mean is over the last dimension and intermediate values have no other readers.
    The weight may be absent, cast first, or stored minus one (Gemma: offset = 1). Close and not
    exact in 16 bit: the product with the weight is rounded once, where some models round twice.
    Pays because quantization folds its scales into norms, which it has to find.
    """

    name = "canonicalize-rms-norm"
    summary = "pow, mean, rsqrt and mul become smelt::rms_norm"
    after = ("remove-noops",)
    numerics = Close()

    def expect(self, program: Program) -> int | None:
        return program.facts.module_counts.get("rms_norm", 0)

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        for node in program.calls(aten.rms_norm.default):
            x, weight = node.args[0], node.args[2] if len(node.args) > 2 else None
            if len(node.args[1]) != 1:  # type: ignore[arg-type]
                result.decline(node, f"the mean is over {len(node.args[1])} dimensions")  # type: ignore[arg-type]
                continue
            given = node.args[3] if len(node.args) > 3 else None
            eps = float(given) if isinstance(given, float) else torch.finfo(dtype(x)).eps
            assert isinstance(x, fx.Node)
            self._replace(program, _Match(x, weight, eps, 0.0, node))  # type: ignore[arg-type]
            result.matched += 1
            result.rewritten += 1
        for node in program.calls(aten.rsqrt.default):
            try:
                match = _match(program, node)
            except _NearMiss as reason:
                result.decline(node, str(reason))
                continue
            if match is not None:
                result.matched += 1
                result.rewritten += 1
                self._replace(program, match)
        return result

    def _replace(self, program: Program, match: _Match) -> None:
        with program.graph.inserting_after(match.end):
            new = program.call(
                torch.ops.smelt.rms_norm.default,
                (match.x, match.weight, match.eps, match.offset),
                like=match.end,
            )
        program.replace(match.end, new)
        if dtype(match.end) != dtype(new):
            with program.graph.inserting_after(new):
                cast = program.call(aten.to.dtype, (new, dtype(match.end)), like=match.end)
            new.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)


def _match(program: Program, rsqrt: fx.Node) -> _Match | None:
    """The norm around `rsqrt`; None when it is something else, _NearMiss when nearly one."""
    total = rsqrt.args[0]
    if not is_call(total, aten.add.Tensor) or not isinstance(total.args[1], float):
        return None
    eps = total.args[1]
    mean = total.args[0]
    if not is_call(mean, aten.mean.dim):
        return None
    square = mean.args[0]
    power = is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2
    product = is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1]
    if not power and not product:
        return None
    wide = square.args[0]
    assert isinstance(wide, fx.Node)
    if is_call(wide, aten.sub.Tensor) and is_call(uncast(wide.args[1]), aten.mean.dim):
        return None  # a variance: layer norm
    if list(mean.args[1]) not in ([-1], [len(shape(wide)) - 1]):
        raise _NearMiss(f"the mean is over dimensions {mean.args[1]}, not the last")
    scaled = only_user(rsqrt)
    if scaled is None or not is_call(scaled, aten.mul.Tensor):
        raise _NearMiss("the inverse root has another reader than the product")
    pair = split_operands(scaled, lambda n: n is rsqrt)
    if pair is None or uncast(pair[1]) is not uncast(wide):
        raise _NearMiss("the inverse root multiplies something else than the normalised value")
    x = uncast(wide)
    end = past_casts(scaled)
    weighted = only_user(end)
    weight: fx.Node | None = None
    offset = 0.0
    if weighted is not None and is_call(weighted, aten.mul.Tensor):
        pair = split_operands(weighted, lambda n: n is end)
        found = _norm_weight(program, pair[1]) if pair else None
        if found is not None and shape(found[0]) == shape(x)[-1:]:
            weight, offset = found
            end = past_casts(weighted)
    return _Match(x, weight, eps, offset, end)


def _norm_weight(program: Program, value: Any) -> tuple[fx.Node, float] | None:
    """(weight placeholder, offset) of `weight` or `offset + weight`, casts allowed."""
    value = uncast(value)
    offset = 0.0
    if is_call(value, aten.add.Tensor) and isinstance(value.args[1], float | int):
        offset = float(value.args[1])
        value = uncast(value.args[0])
    return (value, offset) if program.weight_name(value) is not None else None
