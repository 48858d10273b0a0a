"""What each dialect allows, as code; run after every pass, so that a violation names the pass."""

from __future__ import annotations

import operator

import torch
from torch import fx

from smelt.runtime.errors import SmeltError

from .program import Dialect, Program, Role, module_path

smelt = torch.ops.smelt

_TRACED = {"attention", "experts", "sequence_length"}
_SEMANTIC = _TRACED | {"rms_norm", "rope", "gated_activation"}
_PACKED = {
    *("linear_int2", "linear_int3", "linear_int4", "linear_int8", "linear_w8a8", "linear_fp8"),
    "experts_quantized",
}
_QUANTIZED = _SEMANTIC | _PACKED
_CACHED = (_QUANTIZED - {"attention"}) | {"cached_attention", "cached_attention_quantized"}
_LOWERED = (_CACHED - {"sequence_length"}) | {
    "linear",
    "experts_dense",
    "cached_attention_reference",
    "cached_attention_quantized_reference",
    *(f"{name}_blocked" for name in _PACKED),
    # Those of runtime/kernels/gpu, which are registered only where they are used.
    *("linear_int4_triton", "linear_int8_triton", "linear_w8a8_triton", "linear_fp8_triton"),
    *("linear_fp8_weight_triton", "quantize_int8_triton", "quantize_fp8_triton"),
    *("linear_w8a8_requantized_triton", "linear_fp8_requantized_triton"),
    *("add_rms_norm_triton", "add_rms_norm_int8_triton", "add_rms_norm_fp8_triton"),
    *("gated_activation_triton", "gated_activation_int8_triton", "gated_activation_fp8_triton"),
    *("experts_triton", "experts_int4_triton", "rope_write_triton", "paged_attention_triton"),
}

ALLOWED: dict[Dialect, set[str]] = {
    Dialect.ATEN: _TRACED,
    Dialect.SEMANTIC: _SEMANTIC,
    Dialect.QUANTIZED: _QUANTIZED,
    Dialect.CACHED: _CACHED,
    Dialect.LOWERED: _LOWERED,
}
CACHE_OPERATORS = {
    "cached_attention",
    "cached_attention_reference",
    "cached_attention_quantized",
    "cached_attention_quantized_reference",
    "rope_write_triton",
    "paged_attention_triton",
}


class DialectError(SmeltError):
    """A pass left a program that its dialect does not allow."""


def verify(program: Program) -> None:
    """Raise DialectError naming node and module path for the first violation found."""
    allowed = ALLOWED[program.dialect]
    for node in program.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise _violation(program, node, f"a {node.op} node; everything is an input or a call")
        if node.op != "output" and "val" not in node.meta:
            raise _violation(program, node, "no meta['val'], so its shape is unknown")
        if node.op == "call_function":
            _check_call(program, node, allowed)
        if node.op == "placeholder":
            _check_input(program, node)


def _check_call(program: Program, node: fx.Node, allowed: set[str]) -> None:
    name = smelt_name(node)
    if name is not None and name not in allowed:
        raise _violation(program, node, f"smelt::{name} is not part of {program.dialect.name}")
    if name is None and not _is_aten(node) and program.dialect is not Dialect.LOWERED:
        raise _violation(program, node, f"{node.target} is neither an ATen nor a smelt operator")
    if (
        program.dialect is Dialect.LOWERED
        and name in _SEMANTIC | {"cached_attention", "cached_attention_quantized"}
        and "provider" not in node.meta
    ):
        raise _violation(program, node, f"smelt::{name} has no provider")


def _check_input(program: Program, node: fx.Node) -> None:
    entry = program.inputs.get(node.name)
    if entry is None:
        raise _violation(program, node, "an input without a role")
    if entry.role is Role.WEIGHT:
        spec = program.weights.specs.get(entry.name)
        value = node.meta["val"]
        if spec is None:
            raise _violation(
                program, node, f"weight {entry.name!r}, which no step of the plan writes"
            )
        if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
            raise _violation(
                program,
                node,
                f"weight {entry.name!r} as {tuple(value.shape)} {value.dtype}, "
                f"planned as {spec.shape} {spec.dtype}",
            )
    if entry.role is Role.CACHE:
        for user in node.users:
            if smelt_name(user) not in CACHE_OPERATORS:
                raise _violation(
                    program,
                    user,
                    "a cache read by something other than a cache operator: Inductor loses the "
                    "offset of a mutated view and copies the whole cache for an index write",
                )


def smelt_name(node: fx.Node) -> str | None:
    """ "rms_norm" for a call of smelt::rms_norm, None for other operators."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "smelt":
        return str(node.target._schema.name.split("::")[1])
    return None


def _is_aten(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target.namespace in ("aten", "prims"))
    return node.target is operator.getitem or getattr(node.target, "__module__", "") in (
        "_operator",
        "math",
        "torch",
        "torch.fx.experimental.symbolic_shapes",
    )


def _violation(program: Program, node: fx.Node, what: str) -> DialectError:
    where = module_path(node)
    return DialectError(
        f"{program.dialect.name} program: {node.name}{f' in {where}' if where else ''}: {what}"
    )
