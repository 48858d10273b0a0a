"""The assembly that makes float16 of words of quantized rows, executed here instruction by
instruction: triton's interpreter, in which other tests run, takes a plain branch."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from smelt.runtime.kernels.gpu import cache_tiles
from smelt.runtime.kernels.gpu.launch import INTERPRETED
from smelt.runtime.ops.cache_format import dequantize_rows, quantize_rows

Words = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]
CODES = np.arange(256, dtype=np.uint32)
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


class Machine:
    """Registers of 32 bits, or of 16 within them, and what PTX says of a dozen instructions."""

    def __init__(self, inputs: dict[str, Words | int]) -> None:
        self.registers = {name: np.asarray(value, np.uint32) for name, value in inputs.items()}

    def run(self, text: str) -> None:
        for line in text.strip().strip("{}").split(";"):
            words = line.split(maxsplit=1)
            if words and words[0] != ".reg":
                operands = re.findall(r"\{[^}]*\}|[^,\s]+", words[1])
                self.step(words[0], operands[0], operands[1:])

    def value(self, name: str) -> Words:
        if name.startswith("{"):
            low, high = (self.value(n) for n in re.findall(r"\$\d+", name))
            return low & 0xFFFF | high << 16
        number = re.fullmatch(r"0[xX][0-9a-fA-F]+|\d+", name)
        return np.uint32(int(name, 0)) if number else self.registers[name]  # type: ignore[return-value]

    def step(self, name: str, to: str, operands: list[str]) -> None:
        a, *rest = (self.value(operand) for operand in operands)
        if name == "mov.b32":
            result = a
        elif name == "prmt.b32":
            source, selector = a.astype(np.uint64) | rest[0].astype(np.uint64) << 32, int(rest[1])
            places = [selector >> 4 * i & 15 for i in range(4)]
            assert max(places) < 8
            chosen = [(source >> np.uint64(8 * p) & 255) << 8 * i for i, p in enumerate(places)]
            result = sum(chosen).astype(np.uint32)  # type: ignore[union-attr]
        elif name == "lop3.b32":
            assert int(rest[2]) == 0xEA
            result = a & rest[0] | rest[1]
        elif name == "and.b32":
            result = a & rest[0]
        elif name in ("shr.u32", "shr.b32"):
            result = a >> rest[0]
        elif name == "cvt.rn.f16x2.e4m3x2":
            halves = [E4M3[(a >> 8 * i & 255).astype(np.int64)].half().numpy() for i in range(2)]
            low, high = (half.view(np.uint16).astype(np.uint32) for half in halves)
            result = low | high << 16
        else:
            kind, _, last = name.partition(".")
            assert last.endswith("f16x2")
            x, *y = (np.ascontiguousarray(v).view(np.float16) for v in (a, *rest))
            with np.errstate(invalid="ignore"):
                if kind == "sub":
                    made = x - y[0]
                elif kind == "mul":
                    made = x * y[0]
                else:
                    assert kind == "fma"
                    made = (x.astype(np.float64) * y[0] + y[1]).astype(np.float16)
            result = made.astype(np.float16).view(np.uint32)
        if to.startswith("{"):
            for i, part in enumerate(re.findall(r"\$\d+", to)):
                self.registers[part] = result >> 16 * i & 0xFFFF
        else:
            self.registers[to] = np.asarray(result, np.uint32)


def halves(text: tl.constexpr, outputs: int, *inputs: Words | int) -> list[np.ndarray]:  # type: ignore[type-arg]
    """What the assembly gives for all words at once, an output a float16 array."""
    shape = np.shape(inputs[0])
    full = [np.broadcast_to(np.asarray(x, np.uint32), shape).copy() for x in inputs]
    machine = Machine({f"${outputs + i}": x for i, x in enumerate(full)})
    machine.run(text.value)
    made = [machine.registers[f"${i}"].astype(np.uint16).view(np.float16) for i in range(outputs)]
    return [np.asarray(x) for x in made]


def test_int8_words() -> None:
    for place in range(4):
        words = CODES << 8 * place | 0x5A3C99 << 8 * ((place + 1) % 4) & 0xFFFFFFFF
        words = words.astype(np.uint32)
        got = halves(cache_tiles._INT8_WORD, 4, words, 0x64006400)
        for i in range(4):
            assert np.array_equal(got[i], (words >> 8 * i & 255).astype(np.float16))


def test_int4_words() -> None:
    words = (np.arange(1 << 16, dtype=np.uint32) * 0x9E3779B1).astype(np.uint32)
    got = halves(cache_tiles._INT4_WORD, 8, words, 0x64006400, 0x2C002C00, 0xD400D400)
    for number, place in zip(got, (0, 4, 1, 5, 2, 6, 3, 7), strict=True):
        assert np.array_equal(number, (words >> 4 * place & 15).astype(np.float16))
    assert {int(x) for x in np.unique(got[0])} == {*range(16)}


def test_fp8_words() -> None:
    """Both kinds, on all pairs of codes but NaN's."""
    codes = CODES[(CODES & 127) != 127]
    low, high = (x.ravel() for x in np.meshgrid(codes, codes))
    lower, upper = low | high << 8, high | low << 8
    want = [E4M3.half().numpy()[x] for x in (low, high, high, low)]
    native = halves(cache_tiles._FP8_WORD, 4, lower, upper)
    by_bits = halves(cache_tiles._FP8_WORD_BITS, 4, lower, upper, 0x5C005C00)
    for i in range(4):
        assert np.array_equal(native[i].view(np.uint16), want[i].view(np.uint16))
        assert np.array_equal(by_bits[i].view(np.uint16), want[i].view(np.uint16))


@triton.jit
def _read(
    rows, out, FORMAT: tl.constexpr, COMPUTE: tl.constexpr, ROW: tl.constexpr, VALUES: tl.constexpr
):
    """Eight rows of 32 features, as a tile of one page: values, or numbers before scales."""
    at = tl.arange(0, 8).to(tl.int64)[None, :] * ROW
    words, upper = cache_tiles.load_words(rows, at, 0, 0, 8, 0, 32, 32, FORMAT)
    if VALUES:
        parameters = cache_tiles.load_parameters(rows, at, at >= 0, 32, FORMAT)
        x = cache_tiles.dequantize_rows(
            words, upper, parameters, COMPUTE, FORMAT, False, False, True
        )
    else:
        x = cache_tiles.dequantize(words, upper, FORMAT, False, False)
    x = cache_tiles.in_order(x.to(tl.float32), 1, FORMAT)
    tl.store(out + tl.arange(0, 8)[:, None] * 32 + tl.arange(0, 32)[None, :], x)


@pytest.mark.skipif(not INTERPRETED, reason="reads rows of the CPU")
@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_rows_of_every_kind_are_read(format: str) -> None:
    """Zeros, constants, tiny and huge numbers, NaN, and a row whose scale was rounded up, so that
    its last number is none of float16's; and the numbers as they lie there."""
    rows = torch.randn(8, 32)
    rows[0] = 0.0
    rows[1] = 0.1
    rows[2] *= 1e-7
    rows[3] = torch.linspace(-65504, 65504, 32)
    beyond = torch.stack([torch.linspace(first, 65504, 32) for first in range(0, -9000, -100)])
    reached = dequantize_rows(quantize_rows(beyond, format), format, 32).amax(1)
    assert reached.max() >= 65520
    rows[4] = beyond[reached.argmax()]
    rows[5, 3] = float("nan")
    rows[6] += 100
    packed = quantize_rows(rows, format)
    want = dequantize_rows(packed, format, 32)
    for compute, unit in (("fp32", 2.0**-23), ("fp16", 2.0**-11)):
        out = torch.empty(8, 32)
        _read[(1,)](packed, out, format, compute, packed.shape[1], True)
        assert out[5].isnan().all() and want[5].isnan().all()
        good = torch.arange(8) != 5
        limit = 65504.0 if compute == "fp16" else float("inf")
        exact = want.clamp(-limit, limit)
        assert out[good].isfinite().all()
        assert ((out - exact).abs() <= exact.abs() * unit + 2.0**-25)[good].all()
    numbers = torch.empty(8, 32)
    _read[(1,)](packed, numbers, format, "fp32", packed.shape[1], False)
    if format == "fp8":
        assert torch.equal(numbers, packed[:, :32].view(torch.float8_e4m3fn).float())
    elif format == "int8":
        assert torch.equal(numbers, packed[:, :32].float())
    else:
        pairs = torch.stack((packed[:, :16] & 15, packed[:, :16] >> 4), -1)
        assert torch.equal(numbers, pairs.flatten(1).float())
