"""Activations to int8 and e4m3, bit by bit against the references; e4m3's codes both ways."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers.guarded import DEVICE, among_poison, guarded_outputs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from smelt.runtime.kernels.gpu import e4m3, quantize, rounding, tuning
from smelt.runtime.kernels.gpu.launch import WIDEN
from smelt.runtime.ops.linear_fp8 import round_activations, to_e4m3
from smelt.runtime.ops.linear_w8a8 import quantize_rows, usable_scale

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CODES = torch.arange(256, dtype=torch.uint8)


@triton.jit
def _round_trip(x, bits, coded, narrowed, DTYPE: tl.constexpr, WIDEN: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    value = tl.load(x + at)
    tl.store(coded + at, e4m3.to_e4m3(value, False))
    tl.store(bits + at, e4m3.from_e4m3(tl.load(coded + at), "fp32", False))
    short = rounding.narrow(value, DTYPE, WIDEN)
    tl.store(narrowed + at, rounding.wide(short, WIDEN))


def every_float() -> torch.Tensor:
    """float32 of every sign, exponent and leading mantissa bits, with ties and their neighbours."""
    top = torch.arange(1 << 12, dtype=torch.int64) << 20
    low = torch.tensor([0, 1, 0x7FFFF, 0x80000, 0x80001, 0xFFFFF, 0x7FFF, 0x8000, 0x18000])
    bits = (top[:, None] + low).flatten()
    bits = F.pad(bits, (0, -len(bits) % 1024))
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)


@pytest.mark.skipif(not WIDEN, reason="these branches run in the interpreter")
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_conversions_of_every_kind_of_float(name: str) -> None:
    x = every_float()
    coded = torch.empty(len(x), dtype=torch.uint8)
    back, narrowed = torch.empty_like(x), torch.empty_like(x)
    _round_trip[(len(x) // 1024,)](x, back, coded, narrowed, DTYPE=name, WIDEN=True)
    expected = to_e4m3(x)
    assert torch.equal(coded & 0x7F, expected.view(torch.uint8) & 0x7F)
    number = ~x.isnan()
    assert torch.equal(coded[number], expected.view(torch.uint8)[number])
    torch.testing.assert_close(back, expected.float(), rtol=0, atol=0, equal_nan=True)
    short = x.to(rounding.DTYPES[name]).float()
    torch.testing.assert_close(narrowed, short, rtol=0, atol=0, equal_nan=True)


def run_ptx(text: str, register: int, dtype: torch.dtype) -> list[int]:
    """The instructions of the assembly in e4m3.py, on one register of four codes."""
    halves = torch.int16

    def value(token: str) -> int:
        return held[token] if token in held else int(token, 0)

    def floats(bits: int) -> torch.Tensor:
        pair = torch.tensor([bits & 0xFFFF, bits >> 16])
        return torch.where(pair > 0x7FFF, pair - 0x10000, pair).to(halves).view(dtype).double()

    held = {"$2": register}
    for line in re.findall(r"^ *([a-z][\w.]*) +(\S.*);$", text, re.M):
        name, parts = line[0], [p.strip() for p in line[1].split(",")]
        to, args = parts[0], parts[1:]
        if name == "mov.b32":
            held[to] = value(args[0])
        elif name == "prmt.b32":
            source = value(args[0]) | value(args[1]) << 32
            picks = [value(args[2]) >> 4 * i & 7 for i in range(4)]
            held[to] = sum((source >> 8 * p & 0xFF) << 8 * i for i, p in enumerate(picks))
        elif name == "shr.b32":
            held[to] = value(args[0]) >> value(args[1])
        elif name == "and.b32":
            held[to] = value(args[0]) & value(args[1])
        elif name == "lop3.b32":
            assert args[3] == "0xEA"  # (a & b) | c
            held[to] = value(args[0]) & value(args[1]) | value(args[2])
        else:
            assert name.startswith("fma.rn.")
            a, b, c = (floats(value(t)) for t in args)
            # Exact in float64: eleven bits times eleven bits, and a sum that loses none that count.
            bits = (a * b + c).to(dtype).view(halves).to(torch.int64) & 0xFFFF
            held[to] = int(bits[0] | bits[1] << 16)
    return [held[f"${i}"] >> s & 0xFFFF for i in (0, 1) for s in (0, 16)]


@pytest.mark.parametrize(
    ("text", "dtype"), [(e4m3.TO_BF16, torch.bfloat16), (e4m3.TO_FP16, torch.float16)]
)
def test_assembly_widens_every_code_exactly(text: tl.constexpr, dtype: torch.dtype) -> None:
    expected = CODES.view(torch.float8_e4m3fn).to(dtype)
    for first in range(256):
        codes = [first, (first * 7 + 1) % 256, 0x7F, (255 - first) % 256]
        register = sum(c << 8 * i for i, c in enumerate(codes))
        found = np.array(run_ptx(text.value, register, dtype), dtype=np.uint16).view(np.int16)
        torch.testing.assert_close(
            torch.from_numpy(found).view(dtype), expected[codes], rtol=0, atol=0, equal_nan=True
        )
        # Signs of zeros too.
        for bits, code in zip(found.astype(np.int64), codes, strict=True):
            assert code & 0x7F == 0x7F or (bits < 0) == (code > 0x7F)


def draw_rows(lead: tuple[int, ...], k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of very different sizes; some hold NaN or infinity, some are zero, some nearly so."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, k, generator=source)
    x *= 10.0 ** torch.randint(-3, 4, (*lead, 1), generator=source)
    flat = x.reshape(-1, k)
    for row in range(0, len(flat), 3):
        column = int(torch.randint(k, (1,), generator=source))
        flat[row, column] = [float("nan"), float("inf"), float("-inf"), 1e-45][row // 3 % 4]
    flat[1::4] *= 0
    return among_poison(x.to(dtype))


def on_device(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.to(DEVICE)


def assert_same(q: torch.Tensor, scale: torch.Tensor, want: torch.Tensor, s: torch.Tensor) -> None:
    torch.testing.assert_close(scale.cpu(), s, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(q.cpu().float(), want, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(), (0,), (1,), (7,), (2, 3)]),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**31),
)
@example((7,), 128, torch.bfloat16, False, 0)
@example((7,), 600, torch.bfloat16, True, 1)
def test_int8(lead: tuple[int, ...], k: int, dtype: torch.dtype, static: bool, seed: int) -> None:
    x = draw_rows(lead, k, dtype, seed)
    input_scale = torch.tensor([0.013]) if static else None
    with guarded_outputs():
        q, scale = torch.ops.smelt.quantize_int8_triton(x, on_device(input_scale))
    want, s = quantize_rows(x.cpu(), input_scale)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    assert_same(q, scale, want.nan_to_num(0.0), s)


def quantized_fp8(
    x: torch.Tensor, input_scale: torch.Tensor | None, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and scales as `round_activations` makes them on its way."""
    k = x.shape[-1]
    wide = x.float()
    if input_scale is None and block:
        parts = F.pad(wide, (0, -k % block)).unflatten(-1, (-1, block))
    else:
        parts = wide.unsqueeze(-2)
    scale = usable_scale(parts.abs().amax(-1, keepdim=True), 448.0)
    if input_scale is not None:
        scale = input_scale.expand_as(scale)
    scale = torch.where(torch.isfinite(parts).all(-1, keepdim=True), scale, float("nan"))
    return to_e4m3(parts / scale).flatten(-2)[..., :k], scale.squeeze(-1)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(0,), (1,), (7,), (2, 3)]),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([0, 16, 128]),
    st.integers(0, 2**31),
)
@example((7,), 130, torch.bfloat16, False, 128, 0)
@example((7,), 128, torch.bfloat16, True, 128, 0)
def test_fp8(
    lead: tuple[int, ...], k: int, dtype: torch.dtype, static: bool, block: int, seed: int
) -> None:
    x = draw_rows(lead, k, dtype, seed)
    input_scale = torch.tensor([0.013]) if static else None
    with guarded_outputs():
        q, scale = torch.ops.smelt.quantize_fp8_triton(x, on_device(input_scale), block)
    q, scale, x = q.cpu(), scale.cpu(), x.cpu()
    want, s = quantized_fp8(x, input_scale, block)
    assert q.dtype == torch.float8_e4m3fn and scale.shape == s.shape
    assert_same(q, scale, want.float(), s)
    # And as the reference's product sees it.
    spread = scale if scale.shape[-1] == 1 else scale.repeat_interleave(block, -1)[..., :k]
    mode = "static" if static else "dynamic"
    seen = round_activations(x, input_scale, mode, block)
    torch.testing.assert_close(q.float() * spread, seen, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [0.1, 0.013, 3.7e-5, 11.3])
def test_ties_are_divided_as_ieee_does(scale: float) -> None:
    """Halfway between two results, where a product with 1 / scale falls to the wrong side."""
    input_scale = torch.tensor([scale])
    halves = torch.arange(-128, 128) + 0.5
    codes = CODES.view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    between = (codes[1:] + codes[:-1]) / 2
    for points, quantized in ((halves, "int8"), (between, "fp8")):
        x = (points * input_scale).to(torch.float32)[None]
        if quantized == "int8":
            found = torch.ops.smelt.quantize_int8_triton(x.to(DEVICE), input_scale.to(DEVICE))
            assert_same(*found, *quantize_rows(x, input_scale))
        else:
            found = torch.ops.smelt.quantize_fp8_triton(x.to(DEVICE), input_scale.to(DEVICE), 0)
            want, s = quantized_fp8(x, input_scale, 0)
            assert_same(*found, want.float(), s)


def test_strided_input_is_taken() -> None:
    x = torch.randn(6, 80)[:, ::2]
    q, scale = torch.ops.smelt.quantize_int8_triton(x.to(DEVICE), None)
    want, s = quantize_rows(x, None)
    assert_same(q, scale, want, s)


@pytest.mark.parametrize("block", [8, 24])
def test_blocks_that_tiles_cannot_have(block: int) -> None:
    with pytest.raises(ValueError, match="powers of two"):
        torch.ops.smelt.quantize_fp8_triton(torch.randn(2, 48, device=DEVICE), None, block)


def test_exports() -> None:
    class Quantize(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            a = torch.ops.smelt.quantize_int8_triton(x, None)
            b = torch.ops.smelt.quantize_fp8_triton(x, None, 128)
            return (*a, *b)

    tokens = torch.export.Dim("T", min=2, max=4096)
    x = torch.randn(5, 300, dtype=torch.bfloat16, device=DEVICE)
    program = torch.export.export(Quantize(), (x,), dynamic_shapes=({0: tokens},), strict=False)
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert torch.ops.smelt.quantize_int8_triton.default in called
    assert torch.ops.smelt.quantize_fp8_triton.default in called
    values = [n.meta["val"] for n in program.graph.nodes if n.target in called[:1]]
    assert [tuple(v.shape[1:]) for v in values[0]] == [(300,), (1,)]
    other = torch.randn(9, 300, dtype=torch.bfloat16, device=DEVICE)
    for found, want in zip(program.module()(other), Quantize()(other), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("kernel", ["quantize", "add_rms_norm", "gated_activation"])
@pytest.mark.parametrize("found", [0, 80, 86, 90, 100, 120])
def test_tables_have_every_size(kernel: str, found: int) -> None:
    for k in (64, 128, 2560, 4096, 16384):
        for whole in (False, True):
            constants = quantize.row_config(kernel, k, 0, whole, found).constants
            assert set(constants) == {"ROWS", "BLOCK"}
            assert constants["BLOCK"] >= k or not whole
            # A short row shares a program with others, or threads would be idle.
            assert found == 0 or constants["ROWS"] * constants["BLOCK"] >= 1024


def test_one_program_takes_whole_blocks() -> None:
    assert quantize.row_config("quantize", 64, 128, False, 90).constants["BLOCK"] == 128
    assert quantize.row_config("quantize", 14336, 128, False, 90).constants["BLOCK"] == 2048
    assert quantize.row_config("quantize", 14336, 0, True, 90).constants["BLOCK"] == 16384


def test_cost_counts_each_byte_once() -> None:
    assert quantize.cost(10, 256, 1, "int8").bytes == 10 * (512 + 256 + 4)
    assert quantize.cost(10, 256, 1, "e4m3", 128).bytes == 10 * (512 + 256 + 8)
    assert quantize.cost(10, 256, 2, "same").bytes == 10 * 3 * 512


@pytest.mark.parametrize("size", ["short", "middle", "long"])
def test_candidates_differ(size: str) -> None:
    found = [config.to_json() for config in quantize.candidates(size, 90)]
    assert 3 <= len(found) <= 10 and all(found.count(c) == 1 for c in found)
    assert all(tuning.Config(**c) for c in found)
