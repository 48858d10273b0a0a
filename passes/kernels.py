"""What computes an operator on a target, and why nothing faster does: the one table that choosing
providers, planning and inspecting read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """provider: "cpu" (our C++), "inductor", "aten" or "reference". reason: why it computes the
    operator. limit: why nothing faster does; None where nothing faster is known."""

    provider: str
    reason: str
    limit: str | None = None


# Inductor fuses their references as well as a kernel of ours would. docs/passes.md has the numbers.
INLINED = ("rms_norm", "rope", "gated_activation")
WEIGHT_ONLY = ("linear_int2", "linear_int3", "linear_int4", "linear_int8")
_BLOCKED = "C++ over the blocked layout"
_CPU = {
    "linear": Kernel("cpu", "matrix-vector kernel for few rows, aten.linear for many"),
    "linear_int4": Kernel("cpu", _BLOCKED),
    "linear_int3": Kernel(
        "cpu", _BLOCKED, "unpacking 3 bits costs what the bytes save: int4 decodes as fast"
    ),
    "linear_int2": Kernel("cpu", _BLOCKED),
    "linear_int8": Kernel(
        "cpu", _BLOCKED, "inputs stay as they are, so no integer products: smoothquant has them"
    ),
    "linear_w8a8": Kernel("cpu", f"integer dot products, {_BLOCKED}"),
    "linear_fp8": Kernel(
        "cpu",
        f"{_BLOCKED}, e4m3 widened to float32",
        "the CPU has no fp8 arithmetic: int8 (smoothquant, or rtn --format int8) is faster",
    ),
    "experts": Kernel("cpu", "C++ over the rows each expert got"),
    "experts_quantized": Kernel("cpu", f"the rows each expert got, {_BLOCKED}"),
    "cached_attention": Kernel("cpu", "C++ over the paged cache"),
    "cached_attention_quantized": Kernel("cpu", "C++ over the paged cache"),
}


def kernel_for(operator: str, target: str) -> Kernel:
    """The kernel for a smelt:: operator, or "linear" over a 16-bit weight, on "cpu" or another
    target. An operator without a kernel is computed by its reference."""
    if operator in INLINED:
        return Kernel("inductor", "traced into ATen and fused with its neighbours")
    if target == "cpu":
        return _CPU.get(operator, Kernel("reference", "no kernel yet"))
    if operator == "linear":
        return Kernel("aten", "cuBLAS")
    if operator in WEIGHT_ONLY:
        no_kernel = f"no {target} kernel yet: the weight is dequantized in every step"
        return Kernel("inductor", "dequantized and multiplied", no_kernel)
    return Kernel("reference", "no kernel yet", f"no {target} kernel yet")
