"""Recognise layer normalisation that a model spells out."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..base import Close, Pass, PassResult
from ..program import Program
from ..rewrite import aten, dtype, is_call, only_user, past_casts, shape, uncast


class CanonicalizeLayerNorm(Pass):
    """(x - mean(x)) * rsqrt(var(x) + eps) * weight becomes `aten.layer_norm`.

    Before                                          After
        d = aten.sub(x, aten.mean(x, [-1], True))       y = aten.layer_norm(x, [K], weight,
                                                                            None, eps)
        v = aten.mean(aten.pow(d, 2), [-1], True)
        y = aten.mul(weight, aten.mul(d, aten.rsqrt(v + eps)))

    `nn.LayerNorm` traces to `aten.layer_norm` as it is; this pass brings Cohere's own form there.
    Legal when the weight has the size of the last dimension; a weight of another shape (norms a
    head) is left alone. Pays as rms_norm does: quantization folds scales into it.
    """

    name = "canonicalize-layer-norm"
    summary = "mean, variance, rsqrt and mul become aten.layer_norm"
    after = ("remove-noops",)
    numerics = Close()

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult(matched=len(program.calls(aten.layer_norm.default)))
        for node in program.calls(aten.rsqrt.default):
            x, eps = _variance_of(node)
            if x is None:
                continue
            product = only_user(node)
            if product is None or not _normalises(product, node):
                result.decline(node, "the inverse root multiplies something else than x - mean(x)")
                continue
            end = past_casts(product)
            weighted = only_user(end)
            if weighted is None or not is_call(weighted, aten.mul.Tensor):
                result.decline(node, "no product with a weight follows the normalisation")
                continue
            weight = uncast(next((a for a in weighted.args if a is not end), None))
            if program.weight_name(weight) is None or shape(weight) != shape(x)[-1:]:
                result.decline(node, "the weight's shape is not the normalised one")
                continue
            result.matched += 1
            self._replace(program, x, weight, eps, past_casts(weighted))
            result.rewritten += 1
        return result

    def expect(self, program: Program) -> int | None:
        return program.facts.module_counts.get("layer_norm", 0)

    def _replace(self, program: Program, x: fx.Node, weight: Any, eps: float, end: fx.Node) -> None:
        args = (x, [shape(x)[-1]], weight, None, eps)
        with program.graph.inserting_after(end):
            new = program.call(aten.layer_norm.default, args, like=end)
        program.replace(end, new)
        if dtype(end) != dtype(new):
            raise ValueError(f"{end.name}: the norm's dtype changed from {dtype(end)}")


def _normalises(product: fx.Node, rsqrt: fx.Node) -> bool:
    """Whether `product` is x - mean(x), of the x whose variance was taken, times `rsqrt`."""
    if not is_call(product, aten.mul.Tensor):
        return False
    centred = _centred(next((a for a in product.args if a is not rsqrt), None))
    return centred is not None and centred is _variance_of(rsqrt)[0]


def _variance_of(rsqrt: fx.Node) -> tuple[Any, float]:
    """(x, eps) where `rsqrt` is 1/sqrt(var(x) + eps); (None, 0) otherwise."""
    total: Any = rsqrt.args[0]
    if not is_call(total, aten.add.Tensor) or not isinstance(total.args[1], float):
        return None, 0.0
    mean = total.args[0]
    if not _over_last(mean) or not is_call(mean.args[0], aten.pow.Tensor_Scalar):
        return None, 0.0
    squared = mean.args[0]
    return (_centred(squared.args[0]), total.args[1]) if squared.args[1] == 2 else (None, 0.0)


def _centred(node: Any) -> Any:
    """x where `node` is x - mean(x) over the last dimension, None otherwise."""
    if not is_call(node, aten.sub.Tensor) or not _over_last(node.args[1]):
        return None
    x = uncast(node.args[0])
    return x if x is uncast(node.args[1].args[0]) else None


def _over_last(node: Any) -> bool:
    """Whether `node` is a mean over the last dimension that keeps it."""
    if not is_call(node, aten.mean.dim) or node.args[2:3] != (True,):
        return False
    return list(node.args[1]) in ([-1], [len(shape(node)) - 1])
