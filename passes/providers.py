"""Choose, for every smelt:: node, what computes it on the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from smelt.runtime.errors import UserError
from smelt.runtime.ops.experts_quantized import BLOCK_ROWS
from smelt.runtime.ops.gated_activation import gated_activation
from smelt.runtime.ops.linear import linear_int2, linear_int3, linear_int4, linear_int8
from smelt.runtime.ops.norm import rms_norm
from smelt.runtime.ops.rope import rope

from . import layouts  # noqa: F401 - registers the plan's layout steps
from .base import Close, Pass, PassResult
from .dialect import CACHE_OPERATORS, smelt_name
from .gpu_providers import TRITON, no_triton_kernel, to_triton, triton_operators
from .kernels import Kernel, kernel_for
from .program import Dialect, Program, module_path
from .rewrite import aten, shape

# Operators whose reference Inductor fuses as well as a kernel of ours would: the reference is
# traced into the graph at lowering. docs/passes.md holds the measurement.
INLINED: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm,
    "rope": rope,
    "gated_activation": gated_activation,
}
INLINED_LINEARS: dict[str, Callable[..., Any]] = {
    "linear_int2": linear_int2,
    "linear_int3": linear_int3,
    "linear_int4": linear_int4,
    "linear_int8": linear_int8,
}
EXPERTS = ("experts", "experts_quantized")
# Linears that quantize their input: a kernel of ours or the reference, never dequantized.
QUANTIZED_INPUT = ("linear_w8a8", "linear_fp8")


# What may compute an operator, by its name.
_KNOWN: dict[str, tuple[str, ...]] = {
    "linear": ("aten", "cpu"),
    "cached_attention": ("cpu",),
    "cached_attention_quantized": ("cpu",),
    "experts": ("cpu",),
    "experts_quantized": ("cpu",),
    **dict.fromkeys(INLINED, ("inductor",)),
    **dict.fromkeys(INLINED_LINEARS, ("cpu", "inductor")),
    **dict.fromkeys(QUANTIZED_INPUT, ("cpu",)),
}
PROVIDERS = {
    name: (*known, *(["triton"] if name in TRITON else []), "reference")
    for name, known in _KNOWN.items()
}


@dataclass(frozen=True)
class ProviderOptions:
    """overrides: operator name to provider ("reference", "inductor", "cpu"), for debugging."""

    overrides: tuple[tuple[str, str], ...] = ()


class ChooseProviders(Pass):
    """Semantic operators become the kernels of a target.

    Before (cpu)                                After
        y = aten.linear(x, w)                       y = smelt.linear(x, w)             C++ kernel
        y = smelt.linear_int4(x, q, s, z)           y = smelt.linear_int4_blocked(...) C++ kernel,
                                                        weights laid out by a plan step
        y = smelt.rms_norm(x, w)                    y = rms_norm(x, w)   traced into ATen when
                                                        lowered, and fused by Inductor
    Before (cuda)                               After
        y = smelt.linear_int4(x, q, s, z)           y = smelt.linear_int4_triton(x, ...)
        o = smelt.cached_attention(q, k, v, c)      t = smelt.rope_write_triton(q, k, v, c, ...)
                                                    o = smelt.paged_attention_triton(t, c, ...)

    Legal when a provider supports the node's device, dtypes and shapes; the choice and its reason
    are recorded per node and written into the manifest. Layout steps are invertible, so that the
    same weights can be laid out for another target.
    """

    name = "choose-providers"
    summary = "each operator gets the kernel of the target; weights get that kernel's layout"
    requires = Dialect.CACHED
    produces = Dialect.LOWERED
    numerics = Close()
    Options = ProviderOptions

    def run(self, program: Program, options: ProviderOptions) -> PassResult:
        result = PassResult()
        overrides = dict(options.overrides)
        for operator, provider in overrides.items():
            _check_override(operator, provider, program.target)
        for node in program.calls():
            name = "linear" if node.target is aten.linear.default else smelt_name(node)
            if name is None or "provider" in node.meta:
                continue
            result.matched += 1
            kernel = _choose(program, node, name, overrides.get(name))
            result.notes.append(_note(program, node, name, kernel))
            _apply(program, node, name, kernel.provider)
            result.rewritten += 1
        return result


def _check_override(name: str, provider: str, target: str) -> None:
    """Raise UserError when no operator `name` exists or `provider` does not compute it."""
    if name not in PROVIDERS:
        raise UserError(f"--provider {name}: no such operator; known: {', '.join(PROVIDERS)}")
    if provider not in PROVIDERS[name]:
        raise UserError(
            f"--provider {name}={provider}: expected one of {', '.join(PROVIDERS[name])}"
        )
    if provider == "triton":
        triton_operators(target)


def _choose(program: Program, node: fx.Node, name: str, override: str | None) -> Kernel:
    """What computes one node."""
    if override is not None:
        refused = no_triton_kernel(program, node, name) if override == "triton" else None
        if refused is not None:
            raise UserError(f"--provider {name}=triton: {module_path(node)}: {refused}")
        return Kernel(override, "chosen by --provider")
    if name == "linear" and program.weight_name(node.args[1]) is None:
        return Kernel("aten", "the second operand is not a weight")
    kernel = kernel_for(name, program.target)
    reason = None
    if kernel.provider == "triton":
        reason = no_triton_kernel(program, node, name)
    elif name in EXPERTS:
        reason = _no_experts_kernel(program, node, name)
    if reason is None:
        return kernel
    return Kernel("inductor" if name in INLINED_LINEARS else "reference", reason)


def _note(program: Program, node: fx.Node, name: str, kernel: Kernel) -> dict[str, str]:
    """What is said of a node in the manifest; weight: the planned name of a linear's weight."""
    note = {
        "where": module_path(node) or node.name,
        "operator": name,
        "provider": kernel.provider,
        "reason": kernel.reason,
    }
    if kernel.limit is not None:
        note["limit"] = kernel.limit
    weight = program.weight_name(node.args[1]) if name.startswith("linear") else None
    return note if weight is None else {**note, "weight": weight}


def _no_experts_kernel(program: Program, node: fx.Node, name: str) -> str | None:
    """Why the kernel cannot take these experts, or their layout not keep them apart; None when it
    can."""
    args: Any = node.args
    if name == "experts":
        named = all(program.weight_name(weight) is not None for weight in args[3:5])
        return None if named else "an expert's matrix is not a weight"
    experts, block = args[11:13]
    for q, scales in (args[3:5], args[6:8]):
        rows, width = (
            program.weights.specs[program.weight_name(w) or ""].shape for w in (q, scales)
        )
        n = rows[0] // experts
        if n % BLOCK_ROWS:
            return f"an expert has {n} rows, which fill no blocks of {BLOCK_ROWS}"
        if block and n % block:
            return f"an expert's {n} rows end inside a block of {block} x {block} scales"
        features = _features(program, node, q)
        if not block and width[1] > 1 and features // width[1] % BLOCK_ROWS:
            return f"groups of {features // width[1]} features end inside a step of the kernel"
    return None


def _features(program: Program, node: fx.Node, q: Any) -> int:
    """K of gate_up, I of down."""
    if q is node.args[3]:
        return int(shape(node)[-1])
    args: Any = node.args
    return program.weights.specs[program.weight_name(args[3]) or ""].shape[0] // (2 * args[11])


def _apply(program: Program, node: fx.Node, name: str, provider: str) -> None:
    node.meta["provider"] = provider
    if provider == "triton":
        to_triton(program, node, name)
    elif provider == "inductor" and name in INLINED | INLINED_LINEARS:
        node.target = (INLINED | INLINED_LINEARS)[name]
    elif name == "linear" and provider == "cpu":
        node.target = torch.ops.smelt.linear.default
        if len(node.args) < 3:
            node.args = (*node.args, None)
    elif name in CACHE_OPERATORS and provider == "reference":
        node.target = getattr(torch.ops.smelt, name + "_reference").default
    elif name in INLINED_LINEARS and provider == "cpu":
        _blocked(program, node, name)
    elif name == "experts" and provider == "cpu":
        node.target = torch.ops.smelt.experts_dense.default
    elif name == "experts_quantized" and provider == "cpu":
        _blocked_experts(program, node)
    elif name == "linear_w8a8" and provider == "cpu":
        _blocked_w8a8(program, node)
    elif name == "linear_fp8" and provider == "cpu":
        _blocked_fp8(program, node)


def _blocked(program: Program, node: fx.Node, name: str) -> None:
    """Point a quantized linear at the blocked layout of its weights."""
    x, *weights, bias = node.args
    names = [program.weight_name(w) or "" for w in weights]
    n = int(shape(node)[-1])
    outputs = [f"{w}.blocked" for w in names]
    kernel = getattr(torch.ops.smelt, name + "_blocked").default
    laid_out = program.weights.add(
        name.replace("linear", "block"), outputs, names, n=n, k=int(shape(x)[-1])
    )
    with program.graph.inserting_before(node):
        args = (x, *(program.weight(w) for w in laid_out), bias, n)
        new = program.call(kernel, args, like=node)
    new.meta["provider"] = "cpu"
    program.replace(node, new)
    program.graph.erase_node(node)


def _blocked_w8a8(program: Program, node: fx.Node) -> None:
    x, qweight, *rest = node.args
    name = program.weight_name(qweight) or ""
    sizes = {"n": int(shape(node)[-1]), "k": int(shape(x)[-1])}
    (packed,) = program.weights.add("block_w8a8", [f"{name}.blocked"], [name], **sizes)
    kernel = torch.ops.smelt.linear_w8a8_blocked.default
    _put_instead(program, node, kernel, lambda: (x, program.weight(packed), *rest))


def _blocked_fp8(program: Program, node: fx.Node) -> None:
    x, qweight, scales, *rest = node.args
    names = [program.weight_name(w) or "" for w in (qweight, scales)]
    n, block = int(shape(node)[-1]), rest[-1]
    laid_out = program.weights.add(
        "block_fp8", [f"{name}.blocked" for name in names], names, n=n, block=block
    )
    kernel = torch.ops.smelt.linear_fp8_blocked.default
    _put_instead(
        program, node, kernel, lambda: (x, *(program.weight(w) for w in laid_out), *rest, n)
    )


def _blocked_experts(program: Program, node: fx.Node) -> None:
    """Both matrices of the experts in the layout that linears of their format have."""
    format_, block = str(node.args[10]), node.args[12]
    arguments: list[Any] = list(node.args)
    for at in (3, 6):
        names = [program.weight_name(w) or "" for w in node.args[at : at + 3] if w is not None]
        sizes: dict[str, Any] = {"n": program.weights.specs[names[0]].shape[0]}
        sizes |= (
            {"block": block} if format_ == "fp8" else {"k": _features(program, node, node.args[at])}
        )
        outputs = [f"{name}.blocked" for name in names]
        arguments[at : at + len(names)] = program.weights.add(
            f"block_{format_}", outputs, names, **sizes
        )
    width = _features(program, node, node.args[6])

    def laid_out() -> tuple[Any, ...]:
        weights = [program.weight(w) if isinstance(w, str) else w for w in arguments[3:9]]
        return (*node.args[:3], *weights, *node.args[9:], width)

    _put_instead(program, node, torch.ops.smelt.experts_quantized_blocked.default, laid_out)


def _put_instead(
    program: Program, node: fx.Node, kernel: Any, arguments: Callable[[], tuple[Any, ...]]
) -> None:
    """Replace `node` by a call of the CPU's kernel; arguments are made where it stands."""
    with program.graph.inserting_before(node):
        new = program.call(kernel, arguments(), like=node)
    new.meta["provider"] = "cpu"
    program.replace(node, new)
    program.graph.erase_node(node)
