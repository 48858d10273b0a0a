"""What computes an operator on a target, and why nothing faster does: the one table that choosing
providers, planning and inspecting read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """provider: "cpu" (our C++), "triton", "inductor", "aten" or "reference". reason: why it
    computes the operator. limit: why nothing faster does; None where nothing faster is known."""

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


_CUDA = {
    "linear": Kernel("aten", "cuBLAS"),
    "linear_int4": Kernel("triton", "tensor cores, weights in the tiled layout widened in them"),
    "linear_int3": Kernel(
        "inductor", "dequantized and multiplied", "no kernel for 3 bits: int4 has one"
    ),
    "linear_int2": Kernel(
        "inductor", "dequantized and multiplied", "no kernel for 2 bits: int4 has one"
    ),
    "linear_int8": Kernel("triton", "tensor cores, weights widened in registers"),
    "linear_w8a8": Kernel("triton", "int8 tensor cores"),
    "linear_fp8": Kernel("triton", "fp8 tensor cores; before compute capability 8.9 in bfloat16"),
    "experts": Kernel("triton", "grouped products over the rows each expert got"),
    "experts_quantized": Kernel("triton", "grouped products over the rows each expert got"),
    "cached_attention": Kernel("triton", "flash-decoding and tiled prefill over the paged cache"),
    "cached_attention_quantized": Kernel(
        "triton", "flash-decoding and tiled prefill, dequantized in registers"
    ),
}
_TABLES = {"cpu": _CPU, "cuda": _CUDA}


def kernel_for(operator: str, target: str) -> Kernel:
    """The kernel for a smelt:: operator, or "linear" over a 16-bit weight, on "cpu" or "cuda". An
    operator without a kernel is computed by its reference."""
    if operator in INLINED:
        return Kernel("inductor", "traced into ATen and fused with its neighbours")
    return _TABLES[target].get(operator, Kernel("reference", "no kernel yet"))
