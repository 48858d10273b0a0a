"""How linear_int4.py and linear_int8.py launch their kernels: tiles for a shape, the split of K.

A table has entries for "few", "some" and "many" tokens and for float32 activations, "fp32", which
are for tests. More special are "few/gated", for weights with a gate, and "few/narrow", where there
are fewer tiles than CTAS, the programs that keep a device's memory busy. With CTAS in the entry
that is taken, K is cut into parts until there are about as many programs (weight_epilogue.py).

A step along K is SLICES of BLOCK_K features, or one. TAIL is 0 where K is whole steps, 1 where it
is whole slices, 2 where it is neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from smelt.runtime.ops.gated_activation import ACTIVATIONS, activate

from .launch import WIDEN, Variant, cdiv, launch, regime
from .roofline import CARDS
from .rounding import DTYPES, NAMES
from .tuning import Config, choose
from .weight_epilogue import add_parts

# A part of K is worth a program of its own from this many steps along K.
LEAST_STEPS = 2
# Features of a step, or of a slice of it, where a kernel has but one size.
STEP = 128


@dataclass(frozen=True)
class Layer:
    """A linear for steps of at most `rows` tokens (0: any number), n outputs of k features.

    gate: "" or an activation, when the first half of the weight's 2n rows are gates of the second.
    operand, dtype: names of x's dtype and the result's. constants: more of the kernels'.
    block: features that a step's slice may have at most, 0 for no bound.
    """

    table: str
    kernels: Mapping[str, Any]
    rows: int
    n: int
    k: int
    gate: str
    operand: str
    dtype: str
    constants: Mapping[str, Any]
    block: int = 0

    @property
    def kernel(self) -> Any:
        return self.kernels["few" if regime(self.rows) == "few" else "many"]

    def config(self, found: int) -> Config:
        """Tiles on capability `found`, with SPLIT, the parts that K is cut into."""
        step = regime(self.rows)
        shapes = [f"{step}/{self.n}x{self.k}", *([f"{step}/gated"] if self.gate else []), step]
        if self.operand == "fp32":
            shapes = [f"{step}/fp32"]
        config = choose(self.table, shapes, found)
        tiles = cdiv(self.n, config.constants["BLOCK_N"])
        if tiles < config.constants["CTAS"] and shapes[-2:] == [shapes[0], step]:
            config = choose(self.table, [shapes[0], f"{step}/narrow", step], found)
            tiles = cdiv(self.n, config.constants["BLOCK_N"])
        constants = {**config.constants, **self.constants}
        if self.block:
            constants["BLOCK_K"] = min(constants["BLOCK_K"], self.block)
        slice_size = constants.get("BLOCK_K", STEP)
        size = slice_size * constants.get("SLICES", 1)
        parts = min(constants.pop("CTAS") // tiles, cdiv(self.k, size) // LEAST_STEPS)
        tail = 0 if self.k % size == 0 else 1 if self.k % slice_size == 0 else 2
        constants |= {"SPLIT": max(1, parts), "TAIL": tail, "OPERAND": self.operand}
        return Config(constants, config.num_warps, config.num_stages)

    def after(self, bias: bool, residual: bool) -> dict[str, Any]:
        """Constants of what follows the sums."""
        return {
            "GATE": self.gate,
            "HAS_BIAS": bias,
            "HAS_RESIDUAL": residual,
            "DTYPE": self.dtype,
            "WIDEN": WIDEN,
        }


def check(gate: str, residual: torch.Tensor | None) -> None:
    """Raises ValueError for an unknown activation, or a residual beside a gate."""
    if gate not in ("", *ACTIVATIONS):
        raise ValueError(f"unknown activation {gate!r}, known: {', '.join(ACTIVATIONS)}")
    if gate and residual is not None:
        raise ValueError("a linear with a gate takes no residual")


def launch_layer(
    layer: Layer,
    found: int,
    x: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """x [..., K] -> [..., N]. weights: the kernel's other inputs by name, scales among them."""
    config = layer.config(found)
    parts = config.constants["SPLIT"]
    lead, n = x.shape[:-1], layer.n
    m = math.prod(lead)
    out = torch.empty((*lead, n), dtype=DTYPES[layer.dtype], device=x.device)
    spare = weights["scales"]
    after = {
        "bias": spare if bias is None else bias,
        "residual": spare if residual is None else residual.contiguous(),
        "M": m,
        "N": n,
        **layer.after(bias is not None, residual is not None),
    }
    grid = (
        cdiv(m, config.constants["BLOCK_M"]) * cdiv(n, config.constants["BLOCK_N"]),
        parts,
    )
    target = out
    if parts > 1:
        width = 2 * n if layer.gate else n
        target = torch.empty((parts, m, width), dtype=torch.float32, device=x.device)
    launch(
        layer.kernel,
        grid,
        x=x.contiguous(),
        K=layer.k,
        out=target,
        config=config,
        **weights,
        **after,
    )
    if parts > 1:
        added = choose(layer.table, ["add"], found)
        grid = (cdiv(m, added.constants["ROWS"]), cdiv(n, added.constants["BLOCK"]))
        launch(add_parts, grid, parts=target, out=out, SPLIT=parts, config=added, **after)
    return out


def gated_apart(sums: torch.Tensor, gate: str, dtype: torch.dtype) -> torch.Tensor:
    """sums float32 [..., 2I] of a gate and its second half -> [..., I] in dtype."""
    first, second = sums.chunk(2, -1)
    return (activate(first, gate) * second).to(dtype)


def layer_variant(
    layer: Layer,
    label: str,
    found: int,
    weights: Mapping[str, str],
    bias: bool = False,
    residual: bool = False,
) -> Variant:
    """The kernel as `launch_layer` compiles it. weights: triton's types of the other inputs."""
    config = layer.config(found)
    out = layer.dtype if config.constants["SPLIT"] == 1 else "fp32"
    signature = {
        **dict.fromkeys(("x", "residual"), f"*{layer.operand}"),
        **dict.fromkeys(("M", "N", "K"), "i32"),
        "bias": "*bf16",
        "out": f"*{out}",
        **weights,
    }
    return Variant(
        f"{layer.table}/{label}/{regime(layer.rows)}/{layer.n}x{layer.k}",
        layer.kernel,
        signature,
        {**layer.after(bias, residual), "WIDEN": False},
        config,
        frozenset(signature) - {"M"},
        # Activations of float32 are there to compare with: their products are exact, which those
        # of tensor cores are not, and may be slow.
        hot=layer.operand != "fp32",
        tensor_cores=layer.operand != "fp32",
    )


def add_variant(table: str, found: int) -> Variant:
    """`add_parts` of four parts in bfloat16."""
    signature = {
        "parts": "*fp32",
        **dict.fromkeys(("bias", "residual", "out"), "*bf16"),
        **dict.fromkeys(("M", "N"), "i32"),
    }
    constants = {"SPLIT": 4, "GATE": "", "HAS_BIAS": True, "HAS_RESIDUAL": True}
    return Variant(
        f"{table}/add",
        add_parts,
        signature,
        {**constants, "DTYPE": "bf16", "WIDEN": False},
        choose(table, ["add"], found),
        frozenset(signature) - {"M"},
    )


def programs(capability: int) -> int:
    """CTAS for `smelt tune`: a program for every multiprocessor of a card."""
    found = [card.sms for card in CARDS.values() if card.capability == capability]
    return max(found, default=128)


def name_of(x: torch.Tensor) -> str:
    """The name of x's dtype. Raises ValueError where no kernel takes it."""
    if x.dtype not in NAMES:
        raise ValueError(f"x is {x.dtype}: kernels take bfloat16, float16 and float32")
    return NAMES[x.dtype]
