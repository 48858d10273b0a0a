"""The reference of every smelt:: operator against torch's own functions, its fake against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from smelt.runtime.ops import packing
from smelt.runtime.ops.gated_activation import ACTIVATIONS, activate
from smelt.runtime.ops.linear import GROUPED_BITS
from smelt.runtime.ops.packing import (
    block,
    block_int8,
    dequantize,
    dequantize_int8,
    pack,
    unblock,
    unblock_int8,
    unpack,
)

smelt = torch.ops.smelt
H, G, D = 4, 2, 8


def heads(count: int, groups: int = H) -> torch.Tensor:
    return torch.randn(count, groups, D)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """torch's attention over packed heads with a bool mask [T, L]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_attention_is_causal_and_windowed(window: int) -> None:
    q, k, v = heads(9), heads(9, G), heads(9, G)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    mask = (distance >= 0) & (distance < (window or 100))
    found = smelt.attention(q, k, v, 0.3, window, 0.0, None)
    torch.testing.assert_close(found, sdpa(q, k, v, mask))


def test_attention_with_softcap_and_sinks_spelled_out() -> None:
    q, k, v, sinks = heads(5), heads(5), heads(5), torch.randn(H)
    scores = torch.einsum("thd,lhd->htl", q, k) * 0.3
    scores = 2.0 * torch.tanh(scores / 2.0)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    total = scores.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None]
    expected = torch.einsum("htl,lhd->thd", scores.exp() / total, v)
    torch.testing.assert_close(smelt.attention(q, k, v, 0.3, 0, 2.0, sinks), expected)


class Paged:
    """Two sequences in a pool of blocks of 4 that interleave."""

    def __init__(self) -> None:
        self.cache = torch.full((8, 2, 4, G, D), 9.0)
        self.table = torch.tensor([[6, 1, 4], [3, 5, 0]], dtype=torch.int32)

    def slots(self, sequence: int, start: int, stop: int) -> torch.Tensor:
        at = torch.arange(start, stop)
        return self.table[sequence, at // 4].long() * 4 + at % 4

    def step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: list[tuple[int, int]],
        window: int = 0,
        tree: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """spans: (first, last) position each sequence brings; an empty one brings nothing."""
        slots = torch.cat([self.slots(i, *span) for i, span in enumerate(spans)])
        starts = torch.tensor([0, *(stop - start for start, stop in spans)]).cumsum(0)
        lengths = torch.tensor([stop for _, stop in spans], dtype=torch.int32)
        return smelt.cached_attention(
            q,
            k,
            v,
            self.cache,
            slots,
            starts.int(),
            lengths,
            self.table,
            0.3,
            window,
            0.0,
            None,
            tree,
        )


@pytest.mark.parametrize("window", [0, 3])
def test_cached_attention_in_pieces_equals_attention_over_the_whole(window: int) -> None:
    one = [heads(10), heads(10, G), heads(10, G)]
    two = [heads(7), heads(7, G), heads(7, G)]
    whole = [smelt.attention(*x, 0.3, window, 0.0, None) for x in (one, two)]
    paged, found = Paged(), ([], [])
    pieces = [((0, 5), (0, 0)), ((5, 6), (0, 6)), ((6, 10), (6, 7))]
    for a, b in pieces:
        tensors = [
            torch.cat((x[a[0] : a[1]], y[b[0] : b[1]])) for x, y in zip(one, two, strict=True)
        ]
        out = paged.step(*tensors, [a, b], window)
        cut = a[1] - a[0]
        found[0].append(out[:cut])
        found[1].append(out[cut:])
    torch.testing.assert_close(torch.cat(found[0]), whole[0])
    torch.testing.assert_close(torch.cat(found[1]), whole[1])
    assert (paged.cache[2] == 9.0).all() and (paged.cache[7] == 9.0).all(), "foreign blocks"


def test_cached_attention_writes_keys_and_values_to_their_slots_only() -> None:
    paged = Paged()
    k, v = heads(3, G), heads(3, G)
    slots = torch.tensor([25, -1, 27])
    sizes = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    before = paged.cache.clone()
    smelt.cached_attention(
        heads(3), k, v, paged.cache, slots, *sizes, paged.table[:1], 0.3, 0, 0.0, None, None
    )
    before[6, 0, 1], before[6, 1, 1] = k[0], v[0]
    before[6, 0, 3], before[6, 1, 3] = k[2], v[2]
    assert torch.equal(paged.cache, before)


def test_rows_outside_every_sequence_give_zeros() -> None:
    paged = Paged()
    q, k, v = heads(4), heads(4, G), heads(4, G)
    slots = torch.tensor([24, 25, -1, -1])
    sizes = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    out = smelt.cached_attention(
        q, k, v, paged.cache, slots, *sizes, paged.table[:1], 0.3, 0, 0.0, None, None
    )
    assert out[:2].any() and not out[2:].any()


def test_a_tree_mask_says_which_new_tokens_a_row_sees() -> None:
    """Two branches behind three tokens: the second branch does not see the first."""
    q, k, v = heads(5), heads(5, G), heads(5, G)
    paged = Paged()
    paged.step(q[:3], k[:3], v[:3], [(0, 3), (0, 0)])
    tree = torch.eye(2, dtype=torch.bool)
    found = paged.step(q[3:], k[3:], v[3:], [(3, 5), (0, 0)], tree=tree)
    mask = torch.ones(5, 5).tril().bool()
    mask[4, 3] = False
    torch.testing.assert_close(found, sdpa(q, k, v, mask)[3:])


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float) -> None:
    x, weight = torch.randn(3, 16), torch.randn(16)
    expected = F.rms_norm(x, (16,), weight + offset, 1e-5)
    torch.testing.assert_close(smelt.rms_norm(x, weight, 1e-5, offset), expected)
    torch.testing.assert_close(
        smelt.rms_norm(x, None, 1e-5, offset), F.rms_norm(x, (16,), None, 1e-5)
    )


@pytest.mark.parametrize("width", [D, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_pairs_by_their_angle(width: int, interleaved: bool) -> None:
    x, angles = heads(6), torch.randn(6, width // 2)
    if interleaved:
        table = angles.repeat_interleave(2, -1)
        pairs = x[..., :width].unflatten(-1, (-1, 2))
    else:
        table = torch.cat((angles, angles), -1)
        pairs = x[..., :width].unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    back = torch.view_as_real(turned)
    back = back.flatten(-2) if interleaved else back.transpose(-1, -2).flatten(-2)
    expected = torch.cat((back, x[..., width:]), -1)
    torch.testing.assert_close(smelt.rope(x, table.cos(), table.sin(), interleaved), expected)


def test_activations() -> None:
    x, up = torch.randn(5, 7), torch.randn(5, 7)
    functions = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "relu": F.relu,
    }
    assert set(functions) == set(ACTIVATIONS)
    for kind, function in functions.items():
        torch.testing.assert_close(smelt.gated_activation(x, up, kind), function(x) * up)
    with pytest.raises(ValueError, match="unknown activation 'swish', known: silu, gelu"):
        activate(x, "swish")


def test_experts_equal_every_token_by_itself() -> None:
    x, gate_up, down = torch.randn(6, 8), torch.randn(4, 10, 8), torch.randn(4, 8, 5)
    index = torch.tensor([[0, 2], [2, 0], [1, 2], [0, 1], [2, 1], [0, 2]])
    weight = torch.rand(6, 2)
    expected = torch.zeros(6, 8)
    for token in range(6):
        for choice in range(2):
            e = index[token, choice]
            gate, up = (gate_up[e] @ x[token]).chunk(2)
            expected[token] += weight[token, choice] * (down[e] @ (F.silu(gate) * up))
    found = smelt.experts(x, index, weight, gate_up, down, "silu")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bits", GROUPED_BITS)
@pytest.mark.parametrize(("n", "k", "group"), [(16, 32, 8), (20, 24, 24), (7, 40, 8), (33, 6, 6)])
def test_grouped_layouts_go_there_and_back(n: int, k: int, group: int, bits: int) -> None:
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = torch.rand(n, k // group).bfloat16()
    zeros = torch.randint(0, 2**bits, (n, k // group), dtype=torch.uint8)
    packed = pack(q, bits)
    assert torch.equal(unpack(packed, bits, k), q)
    blocked = block(packed, scales, zeros, bits, k)
    back = unblock(*blocked, bits, n, k)
    assert all(map(torch.equal, back, (packed, scales, zeros)))

    wide = scales.float().repeat_interleave(group, 1)
    weight = (q.float() - zeros.float().repeat_interleave(group, 1)) * wide
    torch.testing.assert_close(dequantize(packed, scales, zeros, bits, k), weight)
    x, bias = torch.randn(3, k), torch.randn(n)
    canonical = getattr(smelt, f"linear_int{bits}")(x, packed, scales, zeros, bias)
    kernel = getattr(smelt, f"linear_int{bits}_blocked")(x, *blocked, bias, n)
    for found in (canonical, kernel):
        torch.testing.assert_close(found, F.linear(x, weight, bias), atol=1e-3, rtol=1e-3)


def test_many_rows_are_laid_out_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, bits = 100, 32, 4
    q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales, zeros = torch.rand(n, 2).bfloat16(), torch.randint(0, 16, (n, 2), dtype=torch.uint8)
    want = block(q, scales, zeros, bits, k)
    monkeypatch.setattr(packing, "AT_ONCE", 32)
    found = block(q, scales, zeros, bits, k)
    assert all(map(torch.equal, found, want))
    assert all(map(torch.equal, unblock(*found, bits, n, k), (q, scales, zeros)))


@pytest.mark.parametrize(("n", "k", "group"), [(16, 32, 8), (20, 24, 24), (33, 6, 6)])
def test_int8_layouts_go_there_and_back(n: int, k: int, group: int) -> None:
    q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scales = torch.rand(n, k // group).bfloat16()
    assert all(map(torch.equal, unblock_int8(*block_int8(q, scales), n), (q, scales)))
    weight = q.float() * scales.float().repeat_interleave(group, 1)
    torch.testing.assert_close(dequantize_int8(q, scales), weight)
    x, bias = torch.randn(3, k), torch.randn(n)
    for found in (
        smelt.linear_int8(x, q, scales, bias),
        smelt.linear_int8_blocked(x, *block_int8(q, scales), bias, n),
    ):
        torch.testing.assert_close(found, F.linear(x, weight, bias), atol=1e-3, rtol=1e-3)


def samples() -> dict[str, tuple[Any, ...]]:
    """One call of every operator."""
    x, table = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(3, D)
    q4 = torch.zeros(20, 8, dtype=torch.uint8)
    scales, zeros = torch.ones(20, 2, dtype=torch.bfloat16), torch.zeros(20, 2, dtype=torch.uint8)
    q8 = torch.zeros(20, 16, dtype=torch.int8)
    sizes = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    cache, blocks = torch.zeros(2, 2, 4, G, D), torch.zeros(1, 1, dtype=torch.int32)
    return {
        "attention": (heads(3), heads(3, G), heads(3, G), 1.0, 0, 0.0, None),
        "cached_attention": (
            *(heads(3), heads(3, G), heads(3, G), cache, torch.arange(3)),
            *(*sizes, blocks, 1.0, 0, 0.0, None, None),
        ),
        "cached_attention_reference": (
            *(heads(3), heads(3, G), heads(3, G), cache, torch.arange(3)),
            *(*sizes, blocks, 1.0, 0, 0.0, None, None),
        ),
        **{
            f"cached_attention_quantized{suffix}": (
                *(heads(3), heads(3, G), heads(3, G), torch.zeros(2, 2, 4, G, D + 4).byte()),
                *(torch.arange(3), *sizes, blocks, 1.0, 0, 0.0, None, None, "int8"),
            )
            for suffix in ("", "_reference")
        },
        "rms_norm": (x, None, 1e-5, 0.0),
        "rope": (heads(3), table, table, False),
        "sequence_length": (torch.arange(3), "longrope", 2),
        "gated_activation": (x, x, "silu"),
        **{
            f"experts{suffix}": (
                *(x.float(), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)),
                *(torch.randn(2, 6, 16), torch.randn(2, 16, 3), "silu"),
            )
            for suffix in ("", "_dense")
        },
        "linear": (x, torch.randn(20, 16, dtype=torch.bfloat16), None),
        "linear_int4": (x, q4, scales, zeros, None),
        "linear_int3": (x, q4[:, :6], scales, zeros, None),
        "linear_int2": (x, q4[:, :4], scales, zeros, None),
        "linear_int8": (x, q8, scales, None),
        "linear_int4_blocked": (x, *block(q4, scales, zeros, 4, 16), None, 20),
        "linear_int3_blocked": (x, *block(q4[:, :6], scales, zeros, 3, 16), None, 20),
        "linear_int2_blocked": (x, *block(q4[:, :4], scales, zeros, 2, 16), None, 20),
        "linear_int8_blocked": (x, *block_int8(q8, scales), None, 20),
    }


@pytest.mark.parametrize("name", samples())
def test_fakes_tell_the_truth(name: str) -> None:
    operator, args = getattr(smelt, name), samples()[name]
    real = operator(*args)
    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake = operator(*faked)
    real, fake = (x if isinstance(x, tuple) else (x,) for x in (real, fake))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_only_the_cache_is_written() -> None:
    for name in samples():
        schema = getattr(smelt, name).default._schema
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        assert written == (["kv_cache"] if name.startswith("cached_attention") else []), name
