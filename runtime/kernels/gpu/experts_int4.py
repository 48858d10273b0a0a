"""A layer of routed experts with int4 weights and 16-bit activations on a GPU.

As experts.py, with weights in the layout of int4_layout.py: all experts' matrices one below the
other, [E * 2I, K] and [E * K, I].

Where few tokens leave the second product with few programs, DOWN_SPLIT of them share its inputs,
and their float32 sums are further parts of the sum over a token's choices.

Against `experts_quantized` of runtime/ops results differ as experts.py says, and where the table
has SUMS by weights that are not rounded to the dtype of x, because scales multiply float32 sums.
Elsewhere float16 makes scales float16, and those below 2^-14 lose some of their bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.library import triton_op

from .experts import (
    MIXTRAL_8X7B,
    QWEN3_30B_A3B,
    Layer,
    entry,
    first_product,
    run_layer,
    second_product,
)
from .experts import cost as layer_cost
from .experts_gemm_int4 import down_int4, gate_up_int4
from .int4_layout import CHUNK
from .launch import Variant, cdiv, regime
from .roofline import Cost
from .tuning import Config, capability, choose

TABLE = "experts_int4"
# Whose elements lie together in the layout.
ROWS = 16


@triton_op("smelt::experts_int4_triton", mutates_args=())
def experts_int4_triton(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor,
    gate_up_zeros: torch.Tensor,
    down: torch.Tensor,
    down_scales: torch.Tensor,
    down_zeros: torch.Tensor,
    kind: str,
    experts: int,
    width: int,
    rows: int,
) -> torch.Tensor:
    """x [T, K]; index int64 and weight [T, top_k] -> [T, K].

    gate_up and down as `lay_out_int4` gives them for [E * 2I, K] and [E * K, I], E = experts and
    I = width, both K and I multiples of 16. T is at most `rows`, unless that is 0.
    """
    layer = Layer(experts, index.shape[1], x.shape[1], width)
    if layer.k % ROWS or layer.width % ROWS:
        raise ValueError(
            f"int4 experts of hidden size {layer.k} and width {layer.width}: both must be "
            f"multiples of {ROWS}, for an expert begins with rows that lie together"
        )
    config = choose(TABLE, layer.shape_classes(regime(rows)), capability(x.device))
    first = constants_of(config, layer.k, gate_up_scales, gate_up_zeros)
    second = constants_of(config, width, down_scales, down_zeros)
    return run_layer(
        *(x, index, weight, kind, rows, layer, config),
        first=(gate_up_int4, (gate_up, gate_up_scales, gate_up_zeros), first),
        second=(down_int4, (down, down_scales, down_zeros), second),
    )


def constants_of(
    config: Config, k: int, scales: torch.Tensor, zeros: torch.Tensor
) -> dict[str, int | bool]:
    """Of the product of k inputs: what its kernel takes beside the table's constants."""
    groups, parts = scales.shape[0], scales.shape[0] // zeros.shape[0]
    # One group a row reaches over the whole last chunk.
    least = k // groups if groups > 1 else cdiv(k, CHUNK) * CHUNK
    group = CHUNK // parts if parts > 1 else least
    return {
        "PAIRS": scales[0].numel() // 2,
        "GROUP": group,
        "SUMS": bool(config.constants["SUMS"]) and parts == 1,
    }


def cost(tokens: int, layer: Layer, chosen: int | None = None, group: int = 128) -> Cost:
    """Of one step of a bfloat16 model. chosen: experts with tokens, as many as can be if None."""
    scale_and_zero = 16 + 16
    return layer_cost(tokens, layer, chosen, 4 + scale_and_zero / group)


def candidates(shape: str, found: int) -> list[Config]:
    """What `smelt tune` tries for a shape class on a capability: the table's and around it."""
    base = entry(TABLE, shape, found)
    steps: tuple[Mapping[str, int], ...] = (
        *({"GATE_N": 16}, {"GATE_N": 32}, {"GATE_N": 64}, {"BLOCK_M": 16}),
        *({"DOWN_SPLIT": 1}, {"DOWN_SPLIT": 2}, {"DOWN_SPLIT": 8}),
    )
    if shape.startswith("many"):
        # No larger blocks: for sm_100 triton 3.6 compiles them to a trap, which ends the process.
        steps = ({"BLOCK_M": 32}, {"BLOCK_M": 64}, {"GROUP_M": 4}, {"GROUP_M": 16})
    made = [Config({**base.constants, **step}, base.num_warps, base.num_stages) for step in steps]
    return [base, *(config for config in made if config != base)]


def variants(found: int) -> Iterator[Variant]:
    """Both products of a dense and a sparse layer in every regime, groups of 128."""
    for layer in (MIXTRAL_8X7B, QWEN3_30B_A3B):
        for rows in (16, 64, 0):
            config = choose(TABLE, layer.shape_classes(regime(rows)), found)
            name = f"experts_int4 {layer.shape_classes(regime(rows))[0]}"
            signature = {
                **dict.fromkeys(("x", "hidden", "scales"), "*bf16"),
                **dict.fromkeys(("gate_up", "down", "zeros"), "*i16"),
                **{"weight": "*fp32", "order": "*i32", "blocks": "*i32"},
                "parts": "*bf16" if config.constants["DOWN_SPLIT"] == 1 else "*fp32",
            }
            sizes = {"K": layer.k, "WIDTH": layer.width, "DTYPE": "bf16", "WIDEN": False}
            for kernel, outputs, constants, product in (
                (
                    *(gate_up_int4, 2 * layer.width, {"TOP_K": layer.top_k, "KIND": "silu"}),
                    first_product(config),
                ),
                (down_int4, layer.k, {}, second_product(config)),
            ):
                pairs = layer.experts * outputs // 2
                yield Variant(
                    *(f"{name} {kernel.__name__}", kernel, signature),
                    constants={**sizes, **constants, "PAIRS": pairs, "GROUP": 128},
                    config=product,
                    aligned=frozenset(signature),
                    tensor_cores=True,
                )
