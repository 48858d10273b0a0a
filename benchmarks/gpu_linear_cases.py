"""Cases of linear layers: every weight format on the shapes of Llama-8B and Qwen3-4B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from smelt.runtime.kernels.gpu.roofline import Cost
from smelt.runtime.ops.gated_activation import activate
from smelt.runtime.ops.linear_fp8 import dequantize_fp8
from smelt.runtime.ops.packing import dequantize, dequantize_int8

from .gpu_cases import (
    BF16,
    Case,
    Goal,
    Maker,
    Model,
    Scale,
    Trial,
    bound_of,
    kernel_module,
    operators,
)
from .gpu_measure import Call

GATE = "silu"
FP8_BLOCK = 128
Peers = dict[str, Callable[[], Call]]


@dataclass(frozen=True)
class Layer:
    """A linear of n outputs and k inputs for so many tokens; a gated one has weights of 2n rows."""

    tokens: int
    n: int
    k: int
    gated: bool = False

    @property
    def width(self) -> int:
        """Rows of the weight."""
        return 2 * self.n if self.gated else self.n

    @property
    def gate(self) -> str:
        return GATE if self.gated else ""

    def __str__(self) -> str:
        gated = "gated " if self.gated else ""
        return f"{gated}{self.n} x {self.k}, {self.tokens} tokens"

    def finish(self, y: torch.Tensor) -> torch.Tensor:
        """What the layer makes of its products [T, width]."""
        if not self.gated:
            return y
        return activate(y[:, : self.n], GATE) * y[:, self.n :]


def _cublas(x: torch.Tensor, weight: Call) -> Peers:
    """The same products over a bfloat16 weight, without the gate."""

    def build() -> Call:
        dense = weight().to(BF16)
        return lambda: F.linear(x, dense)

    return {"cublas_bf16": build}


def _bf16(layer: Layer, scale: Scale, maker: Maker) -> Trial:
    x = maker.normal(layer.tokens, layer.k)
    w = maker.normal(layer.width, layer.k, scale=layer.k**-0.5)
    moved = 2 * (x.numel() + w.numel() + layer.tokens * layer.n)
    return Trial(
        lambda: F.linear(x, w),
        lambda: Cost(moved, 2 * layer.tokens * w.numel()),
        lambda: F.linear(x.float(), w.float()),
    )


def _int4(layer: Layer, scale: Scale, maker: Maker) -> Trial:
    ops, k, group = operators("linear_int4"), layer.k, scale.group(layer.k)
    x = maker.normal(layer.tokens, k)
    q = maker.integers(0, 256, layer.width, k // 2, dtype=torch.uint8)
    step = 0.2 * k**-0.5
    scales = maker.uniform(layer.width, k // group, low=step / 2, high=step, dtype=BF16)
    zeros = maker.integers(0, 16, layer.width, k // group, dtype=torch.uint8)
    tiled = kernel_module("int4_layout").lay_out_int4(q, scales, zeros, k)
    rows = bound_of(layer.tokens)

    def weight() -> torch.Tensor:
        return dequantize(q, scales, zeros, 4, k)

    def int4pack() -> Call:
        packed = torch._convert_weight_to_int4pack(q, 8)
        both = torch.stack((scales, zeros.to(BF16)), -1).transpose(0, 1).contiguous()
        return lambda: torch._weight_int4pack_mm(x, packed, group, both)

    return Trial(
        lambda: ops.linear_int4_triton(x, *tiled, None, None, layer.gate, layer.width, rows),
        lambda: kernel_module("linear_int4").cost(layer.tokens, layer.n, k, group, layer.gated),
        lambda: layer.finish(F.linear(x.float(), weight())),
        peers={"weight_int4pack_mm": int4pack, **_cublas(x, weight)},
    )


def _int8(layer: Layer, scale: Scale, maker: Maker) -> Trial:
    ops, k = operators("linear_int8"), layer.k
    x = maker.normal(layer.tokens, k)
    q = maker.integers(-127, 128, layer.width, k, dtype=torch.int8)
    step = 0.014 * k**-0.5
    scales = maker.uniform(layer.width, 1, low=step / 2, high=step, dtype=BF16)
    rows = bound_of(layer.tokens)

    def weight() -> torch.Tensor:
        return dequantize_int8(q, scales)

    return Trial(
        lambda: ops.linear_int8_triton(x, q, scales, None, None, layer.gate, rows),
        lambda: kernel_module("linear_int8").cost(layer.tokens, layer.n, k, k, layer.gated),
        lambda: layer.finish(F.linear(x.float(), weight())),
        peers=_cublas(x, weight),
    )


def _w8a8(layer: Layer, scale: Scale, maker: Maker) -> Trial:
    ops, k = operators("linear_w8a8"), layer.k
    x = maker.integers(-127, 128, layer.tokens, k, dtype=torch.int8)
    x_scale = maker.uniform(layer.tokens, 1, low=0.01, high=0.02)
    q = maker.integers(-127, 128, layer.width, k, dtype=torch.int8)
    step = 0.014 * k**-0.5
    scales = maker.uniform(layer.width, low=step / 2, high=step)
    rows = bound_of(layer.tokens)
    wide = (x.float() * x_scale).to(BF16)

    def weight() -> torch.Tensor:
        return q.float() * scales[:, None]

    def int_mm() -> Call:
        turned = q.t()
        return lambda: torch._int_mm(x, turned)

    peers = _cublas(wide, weight)
    if layer.tokens > 16:  # fewer it does not take
        peers["int_mm"] = int_mm
    return Trial(
        lambda: ops.linear_w8a8_triton(x, x_scale, q, scales, None, None, layer.gate, "bf16", rows),
        lambda: kernel_module("linear_w8a8").cost(layer.tokens, layer.n, k, layer.gated),
        lambda: layer.finish(F.linear(x.float() * x_scale, weight())),
        peers=peers,
    )


def _e4m3(maker: Maker, *shape: int) -> torch.Tensor:
    return maker.normal(*shape, scale=40.0, dtype=torch.float32).to(torch.float8_e4m3fn)


def _fp8_scales(maker: Maker, layer: Layer, block: int) -> torch.Tensor:
    """Of a weight: [N, 1], or of blocks."""
    step = 0.025 * layer.k**-0.5
    shape = (layer.width, 1)
    if block:
        shape = (-(-layer.width // block), -(-layer.k // block))
    return maker.uniform(*shape, low=step / 2, high=step)


def _fp8(layer: Layer, scale: Scale, maker: Maker, block: int = 0) -> Trial:
    ops, k = operators("linear_fp8"), layer.k
    x = _e4m3(maker, layer.tokens, k)
    groups = -(-k // block) if block else 1
    x_scale = maker.uniform(layer.tokens, groups, low=0.02, high=0.03)
    q = _e4m3(maker, layer.width, k)
    scales = _fp8_scales(maker, layer, block)
    rows = bound_of(layer.tokens)

    def inputs() -> torch.Tensor:
        parts = x_scale.repeat_interleave(block, 1)[:, :k] if block else x_scale
        return x.float() * parts

    def weight() -> torch.Tensor:
        return dequantize_fp8(q, scales, block)

    def scaled_mm(fast: bool) -> Call:
        a, b = x_scale[:, :1].contiguous(), scales.new_full((1, layer.width), 0.01)
        turned = q.t()
        return lambda: torch._scaled_mm(x, turned, a, b, out_dtype=BF16, use_fast_accum=fast)

    def scaled_mm_tensor() -> Call:
        one, turned = scales.new_ones(()), q.t()
        return lambda: torch._scaled_mm(x, turned, one, one, out_dtype=BF16)

    return Trial(
        lambda: ops.linear_fp8_triton(
            x, x_scale, q, scales, None, None, layer.gate, block, "bf16", rows
        ),
        lambda: kernel_module("linear_fp8").cost(layer.tokens, layer.n, k, block, layer.gated),
        lambda: layer.finish(F.linear(inputs(), weight())),
        peers={
            "scaled_mm": partial(scaled_mm, False),
            "scaled_mm_fast_accum": partial(scaled_mm, True),
            "scaled_mm_tensor": scaled_mm_tensor,
            **_cublas(inputs().to(BF16), weight),
        },
    )


def _fp8_weight(layer: Layer, scale: Scale, maker: Maker) -> Trial:
    ops, k = operators("linear_fp8_weight"), layer.k
    x = maker.normal(layer.tokens, k)
    q = _e4m3(maker, layer.width, k)
    scales = _fp8_scales(maker, layer, 0)
    rows = bound_of(layer.tokens)

    def weight() -> torch.Tensor:
        return dequantize_fp8(q, scales, 0)

    return Trial(
        lambda: ops.linear_fp8_weight_triton(x, q, scales, None, None, layer.gate, 0, rows),
        lambda: kernel_module("linear_fp8_weight").cost(layer.tokens, layer.n, k, 0, layer.gated),
        lambda: layer.finish(F.linear(x.float(), weight())),
        peers=_cublas(x, weight),
    )


Build = Callable[[Layer, Scale, Maker], Trial]


def _case(kernel: str, build: Build, layer: Layer, scale: Scale, goal: Goal | None = None) -> Case:
    return Case("linears", kernel, str(layer), partial(build, layer, scale), goal)


def _layers(model: Model, tokens: int, fused: bool = True) -> list[Layer]:
    """The four linears of a decoder layer; fused: with the gate in the kernel."""
    up = Layer(tokens, model.ffn, model.hidden, True)
    return [
        up if fused else Layer(tokens, up.width, up.k),
        Layer(tokens, model.hidden, model.ffn),
        Layer(tokens, model.qkv, model.hidden),
        Layer(tokens, model.hidden, model.heads * model.head),
    ]


def linear_cases(scale: Scale) -> Iterator[Case]:
    """The most telling first: batch 1 of the two models, prefill, then what lies between."""
    int4, bf16, prefill = Goal("bound", 0.75), Goal("bound", 0.90), Goal("scaled_mm", 0.80)
    one, many = scale.tokens(1), scale.tokens(2048)
    llama, qwen3 = scale.llama, scale.qwen3
    for layer in _layers(llama, one):
        yield _case("linear_int4", _int4, layer, scale, int4)
    for layer in _layers(llama, one, fused=False):
        yield _case("linear_bf16 (cuBLAS)", _bf16, layer, scale, bf16)
    yield _case("linear_bf16 (cuBLAS)", _bf16, Layer(one, llama.vocab, llama.hidden), scale, bf16)
    for layer in _layers(llama, many):
        yield _case("linear_fp8", _fp8, layer, scale, prefill)
    for layer in _layers(llama, many)[:2]:
        yield _case("linear_int4", _int4, layer, scale)
        yield _case("linear_w8a8", _w8a8, layer, scale)
        yield _case("linear_fp8 128 x 128", partial(_fp8, block=FP8_BLOCK), layer, scale)
    for tokens in (scale.tokens(8), scale.tokens(64)):
        for layer in _layers(llama, tokens)[:3]:
            yield _case("linear_int4", _int4, layer, scale)
    for tokens in (one, scale.tokens(64)):
        for layer in _layers(llama, tokens)[:2]:
            yield _case("linear_fp8", _fp8, layer, scale)
            yield _case("linear_w8a8", _w8a8, layer, scale)
    for layer in _layers(llama, one)[:2]:
        yield _case("linear_int8", _int8, layer, scale)
        yield _case("linear_fp8_weight", _fp8_weight, layer, scale)
    for layer in _layers(qwen3, one):
        yield _case("linear_int4", _int4, layer, scale, int4)
    for layer in _layers(qwen3, one, fused=False):
        yield _case("linear_bf16 (cuBLAS)", _bf16, layer, scale, bf16)
    for layer in _layers(qwen3, many)[:2]:
        yield _case("linear_fp8", _fp8, layer, scale, prefill)
    for tokens in (scale.tokens(64), many):
        yield _case("linear_int8", _int8, _layers(llama, tokens)[1], scale)
        yield _case("linear_fp8_weight", _fp8_weight, _layers(llama, tokens)[1], scale)
