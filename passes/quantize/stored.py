"""Weight-plan steps over the quantized weights of other projects' checkpoints.

A checkpoint's packed tensors are first unpacked to one *integer form*, whatever their layout:

q       uint8 [N, K] with values 0..15 (4 bits), int8 [N, K] (8 bits, stored unsigned values minus
        128), or float8_e4m3fn [N, K];
scales  [ceil(N / rows), ceil(K / group)] in the checkpoint's own dtype;
zeros   of q's dtype, [N, groups]; absent where symmetric: 8 for 4 bits, 0 otherwise;
order   int [K]: the group of each feature; absent where that is k / group.

One `dequantize_stored` step makes the weight of the plain model from it, so that tracing, fusion
and the comparison with the original see an ordinary linear. Its arguments say what the step reads:
a pass that has an operator for the form takes the integers instead (`prequantized.py`).

Layouts: AutoAWQ's GEMM (eight columns a word, interleaved), GPTQ (eight or four rows a word),
compressed-tensors' pack_to_int32 (along a row, values offset to be unsigned).
"""

from __future__ import annotations

import json
from typing import Any

import torch

from smelt.passes.weights import Step, WeightPlan, operation
from smelt.runtime.errors import SmeltError
from smelt.runtime.ops.packing import pack

# Column of a word's eight that AutoAWQ's nibble i holds: nibbles are interleaved for its kernel.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def _nibbles(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, W] -> uint8 [R, W, 32 / bits], lowest bits first."""
    shifts = range(0, 32, bits)
    mask = (1 << bits) - 1
    return torch.stack([((words >> s) & mask).to(torch.uint8) for s in shifts], -1)


def _signed(q: torch.Tensor, bits: int) -> torch.Tensor:
    """8-bit values become int8 around 0; 4-bit ones stay as they are."""
    return (q.to(torch.int16) - 128).to(torch.int8) if bits == 8 else q


def _awq_columns(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N/8] -> uint8 [R, N]."""
    nibbles = _nibbles(words, 4)
    columns = [AWQ_COLUMNS.index(i) for i in range(8)]
    return torch.stack([nibbles[..., i] for i in columns], -1).flatten(1)


@operation("unpack_awq")
def _unpack_awq(qweight: torch.Tensor, qzeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """qweight int32 [K, N/8], qzeros int32 [G, N/8] -> uint8 [N, K], uint8 [N, G]."""
    return _awq_columns(qweight).T.contiguous(), _awq_columns(qzeros).T.contiguous()


@operation("unpack_gptq")
def _unpack_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, *, bits: int, offset: int
) -> tuple[torch.Tensor, ...]:
    """qweight int32 [K*bits/32, N], qzeros int32 [G, N*bits/32] -> q [N, K], zeros [N, G].

    offset 1: the zero points of the first GPTQ format were stored minus one. One was subtracted
    from whole words, so that a zero of 0 borrows from its neighbour, and is added to whole words.
    """
    one = sum(1 << s for s in range(0, 32, bits))
    zeros = _nibbles(qzeros + offset * one, bits).flatten(1)
    q = _nibbles(qweight.T, bits).flatten(1)
    return _signed(q, bits).contiguous(), _signed(zeros.T, bits).contiguous()


@operation("unpack_rows")
def _unpack_rows(packed: torch.Tensor, *, bits: int, k: int) -> tuple[torch.Tensor, ...]:
    """compressed-tensors' weight_packed int32 [N, ceil(K*bits/32)] -> q [N, K]."""
    return (_signed(_nibbles(packed, bits).flatten(1)[:, :k], bits).contiguous(),)


@operation("unpack_columns")
def _unpack_columns(packed: torch.Tensor, *, bits: int, n: int) -> tuple[torch.Tensor, ...]:
    """compressed-tensors' weight_zero_point int32 [ceil(N*bits/32), G] -> zeros [N, G]."""
    q = _nibbles(packed.T, bits).flatten(1)[:, :n]
    return (_signed(q, bits).T.contiguous(),)


@operation("dequantize_stored")
def _dequantize_stored(
    q: torch.Tensor,
    scales: torch.Tensor,
    *extras: torch.Tensor,
    kinds: list[str],
    group: int,
    rows: int,
    dtype: str,
    layer: str,
    form: dict[str, Any],
) -> tuple[torch.Tensor, ...]:
    """The weight [N, K] in `dtype` of an integer form; kinds names `extras` ("zeros", "order").

    Computed in float32. form says to passes what the checkpoint is; the arithmetic ignores it.
    Raises SmeltError naming the layer for a scale that is NaN or infinite.
    """
    given = dict(zip(kinds, extras, strict=True))
    _check_scales(scales, layer)
    n, k = q.shape
    of_feature = given.get("order")
    if of_feature is None:
        of_feature = torch.arange(k, device=q.device) // group

    def of_weight(x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-(-n // rows), -(-k // group)).float()
        if rows != 1:
            x = x[torch.arange(n, device=q.device) // rows]
        return x[:, of_feature.long()]

    wide = q.float()
    if "zeros" in given:
        wide -= of_weight(given["zeros"])
    elif q.dtype == torch.uint8:
        wide -= 8
    wide *= of_weight(scales)
    return (wide.to(getattr(torch, dtype)),)


def _check_scales(scales: torch.Tensor, layer: str) -> None:
    if scales.is_meta:
        return
    bad = ~torch.isfinite(scales.float())
    if bad.any():
        raise SmeltError(
            f"{layer}: {int(bad.sum())} of its {scales.numel()} scales are NaN or infinite; "
            "is the checkpoint whole?"
        )


@operation("sort_features")
def _sort_features(q: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(q [N, K], order [K]) -> (q with its features sorted by group, int64 [K] that sorts them)."""
    by_group = torch.argsort(order.long(), stable=True)
    return q[:, by_group].contiguous(), by_group


@operation("groups_in_place")
def _groups_in_place(
    order: torch.Tensor, *parts: torch.Tensor, group: int
) -> tuple[torch.Tensor, ...]:
    """Scales and zeros [N, G] in the order in which the features meet their groups."""
    first = order[::group].long()
    return tuple(part[:, first].contiguous() for part in parts)


@operation("keep_int4")
def _keep_int4(
    q: torch.Tensor, scales: torch.Tensor, *zeros: torch.Tensor, layer: str
) -> tuple[torch.Tensor, ...]:
    """The canonical int4 form: q and zeros bit for bit, scales rounded to bfloat16."""
    _check_scales(scales, layer)
    points = zeros[0] if zeros else torch.full(scales.shape, 8, device=q.device)
    return pack(q, 4), scales.to(torch.bfloat16).contiguous(), points.to(torch.uint8)


@operation("keep_int8")
def _keep_int8(
    q: torch.Tensor, scales: torch.Tensor, *, groups: int, layer: str
) -> tuple[torch.Tensor, ...]:
    """The canonical int8 form: q bit for bit, scales rounded to bfloat16 and one a row at least."""
    _check_scales(scales, layer)
    scales = scales.reshape(-1, groups).expand(q.shape[0], groups)
    return q.contiguous(), scales.to(torch.bfloat16).contiguous()


@operation("keep_w8a8")
def _keep_w8a8(q: torch.Tensor, scales: torch.Tensor, *, layer: str) -> tuple[torch.Tensor, ...]:
    """The canonical form of int8 times int8: q bit for bit, scales exact, float32 [N]."""
    _check_scales(scales, layer)
    return q.contiguous(), scales.float().reshape(-1).expand(q.shape[0]).contiguous()


@operation("keep_fp8")
def _keep_fp8(
    q: torch.Tensor, scales: torch.Tensor, *, block: int, layer: str
) -> tuple[torch.Tensor, ...]:
    """The canonical fp8 form: q bit for bit, scales exact, float32 [N, 1] or one a block.

    Raises SmeltError naming the layer for weights that are NaN, which the kernel does not know.
    """
    _check_scales(scales, layer)
    if not q.is_meta and bool(((q.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise SmeltError(f"{layer}: some of its float8 weights are NaN; is the checkpoint whole?")
    wide = scales.float()
    if block:
        return q.contiguous(), wide.reshape(-(-q.shape[0] // block), -(-q.shape[1] // block))
    return q.contiguous(), wide.reshape(-1, 1).expand(q.shape[0], 1).contiguous()


DEQUANTIZE = "dequantize_stored"


def stored_parts(plan: WeightPlan, name: str) -> list[Step]:
    """The `dequantize_stored` steps that planned weight `name` is, or is joined from along N.

    Empty when any part of it is something else.
    """
    made = plan.producers()
    step = made[name]
    if step.op == DEQUANTIZE:
        return [step]
    if step.op != "cat" or step.args["dim"] != 0:
        return []
    parts = [made[part] for part in step.inputs]
    return parts if all(part.op == DEQUANTIZE for part in parts) else []


def stored_form(plan: WeightPlan, name: str) -> tuple[Any, ...] | None:
    """What two weights must share to become one quantized weight; None for an ordinary weight.

    A weight whose last block of scales is not full shares nothing: the next one's rows would have
    to start a block of their own.
    """
    step = plan.producers().get(name)
    if step is None or step.op != DEQUANTIZE:
        return None
    q, scales = (plan.specs[n].dtype for n in step.inputs[:2])
    args = step.args
    rows = args["form"]["rows"]
    alone = name if rows and plan.specs[name].shape[0] % rows else None
    form = json.dumps(args["form"], sort_keys=True)
    return (q, scales, tuple(args["kinds"]), args["group"], alone, form)
