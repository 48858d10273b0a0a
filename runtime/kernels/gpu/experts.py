"""A layer of routed experts on a GPU: choices sorted by expert, two grouped products, one sum.

    routing    choices of T tokens sorted by expert, cut into blocks of BLOCK_M (routing.py)
    gate_up    hidden [T * top_k, I] = act(gate) * up, in the order of the sorted choices
    down       parts [T, top_k, K] = routing weight * down(hidden), each choice at its own place
    sum        over top_k, by torch, so that Inductor fuses it with what adds the residual

Against `experts` of runtime/ops: gate, up and their activation stay in float32 until `hidden` is
rounded to x's dtype, where the reference rounds each of them; parts are rounded to x's dtype as
there; their sum is rounded once and not after each expert. With bfloat16 results differ from the
reference by a few units in the last place of the largest part, and are closer to float32's.

The number of programs is that of the worst routing; those without a block return at once. One
configuration serves both products, because they share the blocks: BLOCK_M and GROUP_M; GATE_N and
GATE_K with num_warps and num_stages of the first; DOWN_N, DOWN_K, DOWN_WARPS and DOWN_STAGES.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import triton_op

from smelt.runtime.ops.gated_activation import ACTIVATIONS

from . import routing
from .experts_gemm import down_dense, gate_up_dense
from .launch import WIDEN, Size, Variant, cdiv, launch, regime
from .roofline import Cost
from .rounding import NAMES
from .tuning import Config, capability, choose

TABLE = "experts"
# With so many experts a choice most of them get few tokens, however long the step is.
SPARSE = 8


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer: experts E, choices of a token, hidden size K and width I of an expert."""

    experts: int
    top_k: int
    k: int
    width: int

    def shape_classes(self, step: str) -> list[str]:
        """Of the tables, for steps of "few", "some" or "many" tokens, the most specific first."""
        general = [step] if self.experts < SPARSE * self.top_k else [f"{step}/sparse", step]
        return [f"{step}/{self.experts}x{self.top_k}x{self.k}x{self.width}", *general]


MIXTRAL_8X7B = Layer(8, 2, 4096, 14336)
QWEN3_30B_A3B = Layer(128, 8, 2048, 768)


def entry(table: str, shape: str, found: int) -> Config:
    """What `table` has on capability `found` for a shape class of `Layer.shape_classes`."""
    step, _, sizes = shape.partition("/")
    if "x" in sizes:
        return choose(table, Layer(*map(int, sizes.split("x"))).shape_classes(step), found)
    return choose(table, [shape, step], found)


def first_product(config: Config) -> Config:
    """A layer's configuration as the gate_up kernel takes it."""
    return Config(_constants(config, "GATE_"), config.num_warps, config.num_stages)


def second_product(config: Config) -> Config:
    """A layer's configuration as the down kernel takes it."""
    found = config.constants
    return Config(_constants(config, "DOWN_"), int(found["DOWN_WARPS"]), int(found["DOWN_STAGES"]))


def _constants(config: Config, prefix: str) -> dict[str, Any]:
    names = {"BLOCK_M": "BLOCK_M", "GROUP_M": "GROUP_M", "SUMS": "SUMS"}
    names |= {f"{prefix}N": "BLOCK_N", f"{prefix}K": "BLOCK_K", f"{prefix}SPLIT": "SPLIT"}
    found = config.constants
    return {to: found[name] for name, to in names.items() if name in found}


@triton_op("smelt::experts_triton", mutates_args=())
def experts_triton(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
    rows: int,
) -> torch.Tensor:
    """x [T, K]; index int64 and weight [T, top_k]; gate_up [E, 2I, K]; down [E, K, I] -> [T, K].

    T is at most `rows`, unless that is 0.
    """
    layer = Layer(gate_up.shape[0], index.shape[1], gate_up.shape[2], down.shape[2])
    config = choose(TABLE, layer.shape_classes(regime(rows)), capability(x.device))
    return run_layer(
        *(x, index, weight, kind, rows, layer, config),
        first=(gate_up_dense, (gate_up.contiguous(),), {}),
        second=(down_dense, (down.contiguous(),), {}),
    )


# A product's kernel, its weights as the kernel takes them, and constants that overrule the table's.
Product = tuple[Any, tuple[torch.Tensor, ...], Mapping[str, Any]]


def run_layer(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    kind: str,
    rows: int,
    layer: Layer,
    config: Config,
    first: Product,
    second: Product,
) -> torch.Tensor:
    """x [T, K] -> [T, K]: sort, both products, and the sum over a token's choices."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"unknown activation {kind!r}, known: {', '.join(ACTIVATIONS)}")
    block_m = int(config.constants["BLOCK_M"])
    order, blocks = routing.sort_by_expert(index, layer.experts, block_m, rows)
    hidden = x.new_empty((order.shape[0], layer.width))
    splits = int(config.constants.get("DOWN_SPLIT", 1))
    parts = x.new_empty(
        (index.shape[0], layer.top_k * splits, layer.k),
        dtype=x.dtype if splits == 1 else torch.float32,
    )
    sizes: dict[str, Any] = {
        **{"K": layer.k, "WIDTH": layer.width},
        **{"DTYPE": NAMES[x.dtype], "WIDEN": WIDEN},
    }

    kernel, weights, constants = first
    config_of = _overruled(first_product(config), constants)
    launch(
        *(kernel, _grid(blocks, layer.width, config_of)),
        *(x.contiguous(), *weights, order, blocks, hidden),
        **sizes,
        TOP_K=layer.top_k,
        KIND=kind,
        config=config_of,
    )
    kernel, weights, constants = second
    config_of = _overruled(second_product(config), constants)
    launch(
        *(kernel, (*_grid(blocks, layer.k, config_of), splits)),
        *(hidden, *weights, weight.contiguous(), order, blocks, parts),
        **sizes,
        config=config_of,
    )
    return parts.sum(1).to(x.dtype)


def _overruled(config: Config, constants: Mapping[str, Any]) -> Config:
    return Config({**config.constants, **constants}, config.num_warps, config.num_stages)


def _grid(blocks: torch.Tensor, features: int, config: Config) -> tuple[Size]:
    return (blocks.shape[0] * cdiv(features, int(config.constants["BLOCK_N"])),)


def cost(tokens: int, layer: Layer, chosen: int | None = None, bits: float = 16.0) -> Cost:
    """Of one step of a bfloat16 model. chosen: experts with tokens, as many as can be if None.

    bits: of a weight, its share of scales and zeros included.
    """
    choices = tokens * layer.top_k
    chosen = min(choices, layer.experts) if chosen is None else chosen
    matrix = 3 * layer.k * layer.width
    hidden, parts = 2 * 2 * choices * layer.width, 2 * 2 * choices * layer.k
    return Cost(
        int(chosen * matrix * bits / 8) + hidden + parts + 2 * 2 * tokens * layer.k,
        2 * choices * matrix,
    ) + routing.cost(choices, layer.experts, 16)


def candidates(shape: str, found: int) -> list[Config]:
    """What `smelt tune` tries for a shape class on a capability: the table's and around it."""
    base = entry(TABLE, shape, found)
    steps: tuple[Mapping[str, int], ...] = (
        *({"GATE_N": 16}, {"GATE_N": 64}, {"GATE_K": 64}, {"GATE_K": 256}),
        *({"DOWN_N": 64}, {"DOWN_K": 64}, {"GROUP_M": 1}),
    )
    if shape.startswith("many"):
        steps = (
            *({"BLOCK_M": 64}, {"BLOCK_M": 128}, {"GATE_N": 64}, {"GATE_N": 128}),
            *({"DOWN_N": 64}, {"DOWN_N": 256}, {"GROUP_M": 4}, {"GROUP_M": 16}),
        )
    made = [Config({**base.constants, **step}, base.num_warps, base.num_stages) for step in steps]
    return [base, *(config for config in made if config != base)]


def variants(found: int) -> Iterator[Variant]:
    """Both products of a dense and a sparse layer in every regime."""
    for layer in (MIXTRAL_8X7B, QWEN3_30B_A3B):
        for rows in (16, 64, 0):
            config = choose(TABLE, layer.shape_classes(regime(rows)), found)
            sizes = {"K": layer.k, "WIDTH": layer.width, "DTYPE": "bf16", "WIDEN": False}
            name = f"experts {layer.shape_classes(regime(rows))[0]}"
            tensors = {
                **dict.fromkeys(("x", "gate_up", "hidden", "down", "parts"), "*bf16"),
                **{"weight": "*fp32", "order": "*i32", "blocks": "*i32"},
            }
            for kernel, constants, product in (
                (gate_up_dense, {"TOP_K": layer.top_k, "KIND": "silu"}, first_product(config)),
                (down_dense, {}, second_product(config)),
            ):
                yield Variant(
                    *(f"{name} {kernel.__name__}", kernel, tensors, {**sizes, **constants}),
                    config=product,
                    aligned=frozenset(tensors),
                    tensor_cores=True,
                )
