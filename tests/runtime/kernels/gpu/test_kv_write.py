"""Rotation, quantization and the cache write in one launch: bit for bit what torch gives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.guarded import DEVICE, GUARD, among_poison, guarded_outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.kernels.gpu.kv_write import candidates, cost, rope_write_triton
from smelt.runtime.ops.cache_format import CACHE_FORMATS, QUANTIZED, quantize_rows, row_bytes
from smelt.runtime.ops.rope import rope

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SPECIAL = (0.0, -0.0, 3.1, -2.0, 1e-7, -3e-9, 7e4, float("inf"), float("-inf"), float("nan"))


@dataclass(frozen=True)
class Case:
    """A step over a cache of 3 blocks. rotary: None without cos and sin. fused: q, k and v are
    slices of one projection."""

    tokens: int = 5
    heads: int = 4
    groups: int = 2
    size: int = 16
    rotary: int | None = 16
    interleaved: bool = False
    dtype: torch.dtype = BF16
    angles: torch.dtype = BF16
    format: str = "auto"
    cache: torch.dtype = BF16
    block_size: int = 4
    fused: bool = True
    seed: int = 0


class Step:
    """Random inputs of a case. special: some rows hold one of SPECIAL, once or throughout."""

    def __init__(self, case: Case, special: bool = False) -> None:
        self.case, make = case, torch.Generator().manual_seed(case.seed)
        self.make = make
        T, H, G, D = case.tokens, case.heads, case.groups, case.size
        fused = torch.randn(T, H + 2 * G, D, generator=make)
        fused *= 2.0 ** torch.randint(-12, 7, (T, H + 2 * G, 1), generator=make)
        fused += torch.randint(-1, 2, (T, H + 2 * G, 1), generator=make) * 2.0
        for row in fused.flatten(0, 1) if special else ():
            value = SPECIAL[int(torch.randint(len(SPECIAL), (), generator=make))]
            start = int(torch.randint(D, (), generator=make))
            row[start:] = value
            if start % 2:
                row[start + 1 :] = -value
        fused = fused.to(case.dtype)
        self.q, self.k, self.v = fused[:, :H], fused[:, H : H + G], fused[:, H + G :]
        if not case.fused:
            self.q, self.k, self.v = (x.contiguous() for x in (self.q, self.k, self.v))
        self.cos = self.sin = None
        if case.rotary is not None:
            angles = torch.randn(2, T, case.rotary, generator=make).clamp(-1, 1)
            self.cos, self.sin = angles.to(case.angles)
        slots = torch.randperm(max(3 * case.block_size, T), generator=make)[:T]
        slots[torch.rand(T, generator=make) < 0.2] = -1
        slots[slots >= 3 * case.block_size] = -1
        self.slots = slots
        width = row_bytes(D, case.format, torch.uint8)
        shape = (3, 2, case.block_size, G, width)
        if case.format == "auto":
            self.kv_cache = torch.full(shape, float("nan"), dtype=case.cache)
        else:
            self.kv_cache = torch.randint(0, 256, shape, generator=make, dtype=torch.uint8)

    def run(self) -> torch.Tensor:
        """The operator on DEVICE, with poison around and between what it is given; `kv_cache` is
        as it leaves it."""
        case = self.case
        q, k, v = self.q, self.k, self.v
        if case.fused:
            fused = among_poison(torch.cat((q, k, v), 1))
            q, k, v = fused.split((case.heads, case.groups, case.groups), 1)
        else:
            q, k, v = (among_poison(x) for x in (q, k, v))
        cos, sin = (x if x is None else among_poison(x) for x in (self.cos, self.sin))
        cache, slots = among_poison(self.kv_cache), among_poison(self.slots)
        around = around_of(cache)
        with guarded_outputs():
            out = rope_write_triton(q, k, v, cos, sin, cache, slots, case.interleaved, case.format)
            assert out.data_ptr() != q.data_ptr() or out.numel() == 0
        assert torch.equal(around_of(cache), around), "written beside the cache"
        self.kv_cache = cache.cpu()
        return out.cpu()

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, cache) by the references, with the cache as it is before the step."""
        q, k, v = self.q, self.k, self.v
        if self.cos is not None and self.sin is not None:
            q = rope(q, self.cos, self.sin, self.case.interleaved)
            k = rope(k, self.cos, self.sin, self.case.interleaved)
        cache, size = self.kv_cache.clone(), self.case.block_size
        for token, slot in enumerate(self.slots.tolist()):
            for which, x in enumerate((k, v)):
                if slot >= 0 and self.case.format == "auto":
                    cache[slot // size, which, slot % size] = x[token].to(cache.dtype)
                elif slot >= 0:
                    rows = quantize_rows(x[token], self.case.format)
                    cache[slot // size, which, slot % size] = rows
        return q, cache

    def check(self) -> None:
        q, cache = self.expected()
        same(self.run(), q)
        same(self.kv_cache, cache)


def around_of(x: torch.Tensor) -> torch.Tensor:
    """The bytes that lie before and behind a tensor of `among_poison`."""
    whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return torch.cat((whole[:GUARD], whole[GUARD + x.numel() :])).view(torch.uint8).clone()


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but that any NaN equals any other."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)
    if found.is_floating_point():
        known = ~expected.isnan()
        assert torch.equal(found.signbit()[known], expected.signbit()[known]), "-0 is not 0"


CASES = st.builds(
    Case,
    tokens=st.sampled_from([0, 1, 2, 5, 11]),
    heads=st.sampled_from([1, 3, 4, 8]),
    groups=st.sampled_from([1, 2, 5]),
    size=st.sampled_from([6, 16, 17, 20, 32]),
    rotary=st.sampled_from([None, 2, 4, 6]),
    interleaved=st.booleans(),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    angles=st.sampled_from([BF16, FP16, FP32]),
    format=st.sampled_from(CACHE_FORMATS),
    cache=st.sampled_from([BF16, FP16, FP32]),
    block_size=st.sampled_from([4, 5, 16]),
    fused=st.booleans(),
    seed=st.integers(0, 2**20),
)


@settings(max_examples=60, deadline=None)
@given(CASES)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_equal_to_the_references(case: Case) -> None:
    Step(case).check()


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([1, 2, 15, 16]), st.sampled_from([None, 2]))
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rows_of_special_values(
    format: str, dtype: torch.dtype, seed: int, size: int, rotary: int | None
) -> None:
    rotary = None if size == 1 else rotary
    case = Case(6, 1, 2, size, rotary, False, dtype, dtype, format, seed=seed)
    Step(case, special=True).check()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("angles", [BF16, FP32])
def test_whole_heads_are_rotated(
    interleaved: bool, dtype: torch.dtype, angles: torch.dtype
) -> None:
    for size in (16, 24):
        Step(Case(7, 4, 2, size, size, interleaved, dtype, angles, cache=dtype)).check()


@pytest.mark.parametrize("format", QUANTIZED)
def test_halves_are_rounded_to_even(format: str) -> None:
    """Multiples of half a step between 0 and the top, where rounding up would differ."""
    top = {"int8": 255.0, "int4": 15.0, "fp8": 448.0}[format]
    step = Step(Case(8, 1, 2, 16, None, dtype=FP32, format=format))
    values = torch.arange(8 * 16).reshape(8, 1, 16).remainder(31) / 2
    if format == "fp8":  # two and a half bits of fraction
        values = 2.0 ** (values / 4).floor() * (1 + torch.arange(16) / 16)
    values[..., 0], values[..., 1] = 0.0, top
    step.k[:] = step.v[:] = values
    step.slots = torch.arange(8)
    step.check()
    at = QUANTIZED[format].value_bytes(16)
    scales = step.kv_cache[:2, ..., at : at + 2].contiguous().view(FP16)
    assert (scales == 1).all(), "the values are not the halves they are meant to be"


def test_a_slot_of_minus_one_writes_nothing() -> None:
    step = Step(Case(format="int8", tokens=3))
    step.slots = torch.full((3,), -1)
    before = step.kv_cache.clone()
    assert not step.run().isnan().any()
    assert torch.equal(step.kv_cache, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "int5"}, "unknown format"),
        ({"q": torch.zeros(5, 4, 16, dtype=FP16)}, "not one 16 or 32 bit"),
        ({"v": torch.zeros(5, 2, 8, dtype=BF16)}, "k and v have heads"),
        ({"sin": None}, "come together"),
        ({"sin": torch.zeros(5, 16)}, "cos is"),
        ({"cos": torch.zeros(5, 18, dtype=BF16), "sin": torch.zeros(5, 18, dtype=BF16)}, "angles"),
        ({"kv_cache": torch.zeros(3, 2, 4, 2, 15, dtype=BF16)}, "a cache of"),
        ({"kv_cache": torch.zeros(3, 2, 4, 2, 16, dtype=torch.uint8)}, "a cache of"),
        ({"kv_cache": torch.zeros(3, 2, 4, 16, 2, dtype=BF16).mT}, "not contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    step = Step(Case())
    names = ("q", "k", "v", "cos", "sin", "kv_cache")
    inputs = {name: change.get(name, getattr(step, name)) for name in names}
    with pytest.raises(ValueError, match=message):
        rope_write_triton(*inputs.values(), step.slots, False, change.get("format", "auto"))


class Layer(torch.nn.Module):
    def forward(
        self, qkv: torch.Tensor, angles: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        q, k, v = qkv.split((4, 2, 2), 1)
        turned = torch.ops.smelt.rope_write_triton(
            q, k, v, angles, angles, kv_cache, slots, False, "int8"
        )
        return turned + 1


def test_it_exports_with_any_number_of_tokens_and_blocks() -> None:
    def inputs(tokens: int, blocks: int) -> tuple[torch.Tensor, ...]:
        cache = torch.zeros(blocks, 2, 4, 2, 20, dtype=torch.uint8)
        made = (torch.randn(tokens, 8, 16), torch.randn(tokens, 16), cache, torch.arange(tokens))
        return tuple(x.to(DEVICE) for x in made)

    tokens, blocks = torch.export.Dim("tokens"), torch.export.Dim("blocks")
    shapes = ({0: tokens}, {0: tokens}, {0: blocks}, {0: tokens})
    program = torch.export.export(Layer(), inputs(5, 3), dynamic_shapes=shapes, strict=False)
    found = [node for node in program.graph.nodes if "rope_write_triton" in str(node.target)]
    assert len(found) == 1
    step = inputs(9, 7)
    other = step[2].clone()
    expected = Layer()(*step[:2], other, step[3])
    torch.testing.assert_close(program.module()(*step), expected)
    assert other.any() and torch.equal(step[2], other)


def test_cost_counts_each_byte_once() -> None:
    # Llama-8B, one token: 32 + 8 + 8 heads of 128 read, cos, sin and slot; q and the cache written.
    assert cost(1, 32, 8, 128, 128).bytes == 48 * 256 + 512 + 8 + 32 * 256 + 16 * 256
    assert cost(3, 32, 8, 128, 0, "int4").bytes == 3 * (48 * 256 + 8 + 32 * 256 + 16 * 68)


def test_candidates() -> None:
    for shape in ("int8", "auto/128"):
        tried = candidates(shape, 90)
        assert 4 <= len(tried) <= 10 and len({str(config) for config in tried}) == len(tried)
