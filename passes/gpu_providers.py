"""How nodes become calls of Triton kernels; `choose-providers` says which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from smelt.runtime.errors import UserError

from .program import Program
from .rewrite import dtype, getitem, shape

# As operators spell the dtype of a result.
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def triton_operators(target: str) -> Any:
    """torch.ops.smelt with the Triton operators registered.

    Raises UserError where triton is not installed, or no device could run its kernels.
    """
    try:
        from smelt.runtime.kernels.gpu import operators
    except ImportError as error:
        raise UserError(
            f"Triton kernels need triton ({error}): pip install 'smelt[cuda]', "
            "or choose another provider"
        ) from error
    if target == "cpu" and not operators.INTERPRETED:
        raise UserError(
            "--provider OPERATOR=triton is for --device cuda; on the CPU Triton's kernels run in "
            "its interpreter only (TRITON_INTERPRET=1), to test them"
        )
    return torch.ops.smelt


def to_triton(program: Program, node: fx.Node, name: str) -> None:
    """Replace `node`, a call of operator `name`, by its Triton kernels."""
    ops = triton_operators(program.target)
    with program.graph.inserting_before(node):
        new = _REWRITES[name](program, node, ops)
    new.meta["provider"] = "triton"
    program.replace(node, new)
    program.graph.erase_node(node)


def _call(program: Program, operator: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    new = program.call(operator.default, args, like=like)
    new.meta["provider"] = "triton"
    return new


def _linear_int4(program: Program, node: fx.Node, ops: Any) -> fx.Node:
    x, *weights, bias = node.args
    names = [program.weight_name(w) or "" for w in weights]
    n = int(shape(node)[-1])
    outputs = [f"{w}.tiled" for w in names]
    sizes = {"n": n, "k": int(shape(x)[-1])}
    tiled = program.weights.add("lay_out_int4", outputs, names, **sizes)
    args = (x, *(program.weight(w) for w in tiled), bias, None, "", n, 0)
    return _call(program, ops.linear_int4_triton, args, node)


def _linear_int8(program: Program, node: fx.Node, ops: Any) -> fx.Node:
    return _call(program, ops.linear_int8_triton, (*node.args, None, "", 0), node)


def _quantized(
    program: Program, operator: Any, args: tuple[Any, ...], like: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """(values, scales) of an input; linears over one input share them."""
    for node in args[0].users:
        if node.target is operator.default and node.args == args:
            found = {user.args[1]: user for user in node.users}
            return found[0], found[1]
    pair = _call(program, operator, args, like)
    values, scales = getitem(pair, 0), getitem(pair, 1)
    return values, scales


def _linear_w8a8(program: Program, node: fx.Node, ops: Any) -> fx.Node:
    x, qweight, scales, input_scale, bias = node.args
    values, own = _quantized(program, ops.quantize_int8_triton, (x, input_scale), node)
    kind = DTYPE_NAMES[dtype(node)]
    args = (values, own, qweight, scales, bias, None, "", kind, 0)
    return _call(program, ops.linear_w8a8_triton, args, node)


def _linear_fp8(program: Program, node: fx.Node, ops: Any) -> fx.Node:
    x, qweight, scales, input_scale, bias, activations, block = node.args
    if activations == "none":
        args: tuple[Any, ...] = (x, qweight, scales, bias, None, "", block, 0)
        return _call(program, ops.linear_fp8_weight_triton, args, node)
    own_block = block if activations == "dynamic" else 0
    quantize = ops.quantize_fp8_triton
    values, own = _quantized(program, quantize, (x, input_scale, own_block), node)
    kind = DTYPE_NAMES[dtype(node)]
    args = (values, own, qweight, scales, bias, None, "", block, kind, 0)
    return _call(program, ops.linear_fp8_triton, args, node)


def _attention(program: Program, node: fx.Node, ops: Any) -> fx.Node:
    """Two kernels: one writes keys and values, one attends over what is written."""
    args: Any = node.args
    q, k, v, cache, slots, query_start, seq_lens, table, scale, window, softcap, sinks, tree = args[
        :13
    ]
    form = args[13] if len(args) > 13 else "auto"
    written = (q, k, v, None, None, cache, slots, False, form)
    turned = _call(program, ops.rope_write_triton, written, node)
    heads = int(shape(k)[1])
    attend = (turned, cache, query_start, seq_lens, table, scale, window, softcap, sinks, tree)
    return _call(program, ops.paged_attention_triton, (*attend, form, heads, 0), node)


def _experts(program: Program, node: fx.Node, ops: Any) -> fx.Node:
    return _call(program, ops.experts_triton, (*node.args, 0), node)


def _experts_int4(program: Program, node: fx.Node, ops: Any) -> fx.Node:
    args: Any = node.args
    experts, k = args[11], int(shape(args[0])[-1])
    names = [program.weight_name(w) or "" for w in args[3:9]]
    rows = [program.weights.specs[names[at]].shape[0] for at in (0, 3)]
    width = rows[0] // (2 * experts)
    tiled: list[str] = []
    for at, n, features in ((0, rows[0], k), (3, rows[1], width)):
        own = names[at : at + 3]
        outputs = [f"{w}.tiled" for w in own]
        tiled += program.weights.add("lay_out_int4", outputs, own, n=n, k=features)
    weights = (program.weight(w) for w in tiled)
    given = (*args[:3], *weights, args[9], experts, width, 0)
    return _call(program, ops.experts_int4_triton, given, node)


def _rms_norm(program: Program, node: fx.Node, ops: Any) -> fx.Node:
    x, *rest = node.args
    return getitem(_call(program, ops.add_rms_norm_triton, (x, None, *rest), node), 1)


def _gated_activation(program: Program, node: fx.Node, ops: Any) -> fx.Node:
    return _call(program, ops.gated_activation_triton, node.args, node)


_REWRITES: dict[str, Callable[[Program, fx.Node, Any], fx.Node]] = {
    "linear_int4": _linear_int4,
    "linear_int8": _linear_int8,
    "linear_w8a8": _linear_w8a8,
    "linear_fp8": _linear_fp8,
    "cached_attention": _attention,
    "cached_attention_quantized": _attention,
    "experts": _experts,
    "experts_quantized": _experts_int4,
    "rms_norm": _rms_norm,
    "gated_activation": _gated_activation,
}
TRITON = tuple(_REWRITES)


def no_triton_kernel(program: Program, node: fx.Node, name: str) -> str | None:
    """Why the Triton kernels do not take this node; None where they do."""
    args: Any = node.args
    if name == "experts_quantized" and args[10] != "int4":
        return f"experts of {args[10]} have no Triton kernel"
    if name in ("experts", "experts_quantized"):
        weights = args[3:5] if name == "experts" else args[3:9]
        if any(program.weight_name(weight) is None for weight in weights):
            return "an expert's matrix is not a weight"
    if name in ("linear_int4", "linear_int8"):
        return _odd_groups(program, args[2], int(shape(args[0])[-1]), _GROUPS[name])
    if name == "experts_quantized":
        width = program.weights.specs[program.weight_name(args[3]) or ""].shape[0] // 2 // args[11]
        k = int(shape(args[0])[-1])
        if k % 16 or width % 16:
            return f"experts of {k} x {width} are no multiples of 16"
        return _odd_groups(program, args[4], k, _GROUPS["linear_int4"])
    if name == "linear_fp8" and args[6] and args[5] == "static":
        return "one scale for the input and blocks of scales for the weight: no Triton kernel"
    return None


# Groups of features that share a scale, as the kernels cut them: multiples of these from the last.
_GROUPS = {"linear_int4": (32, 64, 128), "linear_int8": (32,)}


def _odd_groups(program: Program, scales: Any, k: int, known: tuple[int, ...]) -> str | None:
    """Why groups of the size that `scales` [N, K/g] has do not fit the kernels."""
    groups = program.weights.specs[program.weight_name(scales) or ""].shape[1]
    size = k // groups
    if groups == 1 or size in known or size % known[-1] == 0:
        return None
    return f"groups of {size} features; the kernels have {', '.join(map(str, known))}, or one a row"
