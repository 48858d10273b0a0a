"""Move the rotary embedding into the kernel that writes the cache."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import fx

from smelt.runtime.ops.rope import rope

from ..base import Exact, Pass, PassResult
from ..dialect import smelt_name
from ..program import Dialect, Program
from ..rewrite import only_user


class FuseRopeWrite(Pass):
    """Queries and keys are turned while keys and values are written.

    Before                                          After
        q' = rope(q, cos, sin)                          q' = smelt.rope_write_triton(q, k, v, cos,
        k' = rope(k, cos, sin)                                  sin, kv_cache, slot_mapping, ...)
        q'' = smelt.rope_write_triton(q', k', v,
                None, None, kv_cache, slot_mapping)

    Legal when both are turned by the same factors and nothing else reads what is turned. Exact: the
    kernel's products and roundings are those of the reference. It pays in decoding: one launch a
    layer in place of three, and keys are written once.
    """

    name = "fuse-rope-write"
    summary = "the rotary embedding moves into the kernel that writes keys and values"
    requires = Dialect.CACHED
    after = ("choose-providers",)
    numerics = Exact()

    def run(self, program: Program, options: Any) -> PassResult:
        result = PassResult()
        for node in program.calls():
            if smelt_name(node) != "rope_write_triton" or node.args[3] is not None:
                continue
            q, k = node.args[:2]
            if not (_is_rope(q) and _is_rope(k)):
                continue
            result.matched += 1
            reason = _refusal(q, k)
            if reason is not None:
                result.decline(node, reason)
                continue
            cos, sin, interleaved = q.args[1:]
            before = (q.args[0], k.args[0], node.args[2], cos, sin)
            node.args = (*before, *node.args[5:7], interleaved, node.args[8])
            program.revalue(node)
            result.rewritten += 1
        return result


def _is_rope(node: Any) -> TypeGuard[Any]:
    return isinstance(node, fx.Node) and (node.target is rope or smelt_name(node) == "rope")


def _refusal(q: fx.Node, k: fx.Node) -> str | None:
    if q.args[1:] != k.args[1:]:
        return "queries and keys are turned by different factors"
    if any(only_user(node) is None for node in (q, k)):
        return "something else reads what is turned"
    return None
