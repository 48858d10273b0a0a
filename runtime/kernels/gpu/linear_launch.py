"""How the quantized linears are launched: the tiles for a shape, the split of K, the outputs.

A table's entry has, beside the constants of its kernel, the number CTAS of programs that keep a
device's memory busy: with fewer, K is cut into parts (see linear_epilogue.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from smelt.runtime.ops.gated_activation import ACTIVATIONS

from .e4m3 import NATIVE_FROM
from .launch import INTERPRETED, WIDEN, Variant, cdiv, launch, regime
from .linear_epilogue import sum_splits
from .linear_tiles import linear_few, linear_tiles, linear_transposed
from .roofline import CARDS
from .rounding import DTYPES, NAMES
from .tuning import Config, capability, choose

# A part of K is worth a program of its own from this many tiles along K.
LEAST_STEPS = 2
E4M3 = torch.float8_e4m3fn
# Data-centre Blackwell adds products of e4m3 in float32. Ada and Hopper do not; consumer Blackwell,
# whose instructions are Ada's, is taken not to.
FULL_FROM, FULL_TO = 100, 120
# What is written, for torch and for triton. The codes of e4m3 are written as bytes, which every
# capability can store.
STORED = {"int8": torch.int8, "e4m3": torch.uint8}
POINTERS = {torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.float32: "*fp32"}

# Tiles worth timing: (BLOCK_M, BLOCK_N, features along K, warps, stages).
_TILES = {
    "few": (
        (16, 16, 256, 4, 4),
        (16, 16, 512, 4, 4),
        (16, 16, 1024, 8, 3),
        (16, 32, 256, 4, 3),
        (16, 32, 256, 4, 4),
        (16, 32, 512, 4, 3),
        (16, 32, 512, 4, 4),
        (16, 32, 512, 8, 4),
        (16, 64, 256, 4, 4),
        (16, 64, 512, 4, 4),
    ),
    "some": (
        (64, 32, 128, 4, 4),
        (64, 32, 256, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 64, 128, 4, 3),
        (64, 64, 128, 4, 5),
        (64, 64, 256, 4, 4),
        (64, 128, 128, 4, 4),
        (64, 128, 128, 8, 4),
    ),
    "many": (
        (64, 128, 64, 8, 4),
        (128, 64, 64, 8, 4),
        (128, 64, 128, 8, 4),
        (128, 128, 32, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 128, 4, 3),
        (128, 128, 128, 8, 4),
        (128, 256, 128, 8, 4),
        (256, 128, 128, 8, 4),
    ),
}
# Programs that keep the memory busy: one on every multiprocessor.
_CTAS = {card.capability: card.sms for card in CARDS.values()}


@dataclass(frozen=True)
class Finish:
    """What becomes of a linear's scaled sums.

    gate: "" or an activation, when the first half of the weight's rows are gates of the second.
    dtype: "bf16", "fp16" or "fp32", to which results are rounded. form: "same", or "int8" or "e4m3"
    for the next linear, with output_scale float32 [1] or a scale for every output_block features.
    """

    gate: str
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    dtype: str
    form: str = "same"
    output_scale: torch.Tensor | None = None
    output_block: int = 0

    def __post_init__(self) -> None:
        if self.gate not in ("", *ACTIVATIONS):
            raise ValueError(f"unknown activation {self.gate!r}, known: {', '.join(ACTIVATIONS)}")
        if self.gate and self.residual is not None:
            raise ValueError("a linear with a gate takes no residual")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, not one of {', '.join(DTYPES)}")
        block = self.group
        if block and not (16 <= block <= 256 and block & (block - 1) == 0):
            raise ValueError(f"output_block is {block}, not a power of two from 16 to 256")
        if self.form != "same" and self.output_scale is None and not block:
            raise ValueError("no tile sees a whole row: pass an output_scale or an output_block")

    @property
    def group(self) -> int:
        """Output features that share a scale; 0 without scales or with a static one."""
        return self.output_block if self.output_scale is None else 0

    @property
    def stored(self) -> torch.dtype:
        """Of the output as kernels write it."""
        return STORED.get(self.form, DTYPES[self.dtype])

    def constants(self) -> dict[str, Any]:
        """Of kernels that end in `finish`."""
        return {
            "GATE": self.gate,
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "FORMAT": self.form,
            "OUT_GROUP": self.group,
            "DTYPE": self.dtype,
            "WIDEN": WIDEN,
        }


@dataclass(frozen=True)
class Linear:
    """Which linear is launched: KIND and BLOCK of linear_tiles.py, for steps of at most `rows`
    tokens (0: any number), with n outputs of k inputs."""

    kind: str
    rows: int
    n: int
    k: int
    block: int = 0

    @property
    def kernel(self) -> Any:
        """Of linear_tiles.py."""
        if regime(self.rows) == "few":
            return linear_few
        return linear_transposed if self.kind == "weight" else linear_tiles

    def config(self, table: str, finish: Finish, found: int) -> tuple[Config, int]:
        """(configuration, parts K is cut into) on capability `found`."""
        step = regime(self.rows)
        classes = [f"{step}/{self.n}x{self.k}"]
        if finish.gate and finish.group:
            classes.append(f"{step}/gated/{finish.group}")
        if finish.gate:
            classes.append(f"{step}/gated")
        elif self.block:
            classes.append(f"{step}/block")
        shipped = choose(table, [*classes, step], found)
        constants = dict(shipped.constants)
        if self.block:
            # A tile along K, or a piece of one, lies inside one block.
            constants["BLOCK_K"] = min(constants["BLOCK_K"], self.block & -self.block)
        deep = constants["BLOCK_K"] * constants.get("PARTS", 1)
        wanted = constants.pop("CTAS") // cdiv(self.n, constants["BLOCK_N"])
        parts = max(1, min(wanted, cdiv(self.k, deep) // LEAST_STEPS))
        if finish.group and parts == 1:
            constants["BLOCK_N"] = finish.group
        constants |= {"SPLIT": parts, "EVEN_K": self.k % deep == 0}
        if step != "few":
            inside = self.block > 0 and self.block % constants["BLOCK_N"] == 0
            constants["UNIFORM"] = inside and (not finish.gate or self.n % self.block == 0)
        return Config(constants, shipped.num_warps, shipped.num_stages), parts

    def constants(self, grouped: bool, operand: str, found: int) -> dict[str, Any]:
        """Of its kernel. grouped: activations have a scale a block; operand: as add_product's."""
        return {
            "KIND": self.kind,
            "BLOCK": self.block,
            "X_GROUPS": grouped,
            "X_SCALED": self.kind != "weight" and not grouped,
            "W_SCALED": self.block == 0,
            "OPERAND": operand,
            "PROMOTE": not FULL_FROM <= found < FULL_TO,
            "NATIVE": found >= NATIVE_FROM,
        }


def launch_linear(
    table: str,
    linear: Linear,
    finish: Finish,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    qweight: torch.Tensor,
    scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (out [..., N], out_scale [..., G], a placeholder without `finish.group`)."""
    found = capability(x.device)
    config, parts = linear.config(table, finish, found)
    lead, n, group = x.shape[:-1], linear.n, finish.group
    m = math.prod(lead)
    if found < NATIVE_FROM:
        x, qweight = (t.view(torch.uint8) if t.dtype == E4M3 else t for t in (x, qweight))
    if x.shape[-1] != linear.k:
        raise ValueError(f"{x.shape[-1]} input features, the weight has {linear.k}")
    groups = cdiv(linear.k, linear.block) if linear.block else 1
    scales_a_row = 1 if x_scale is None else int(x_scale.shape[-1])
    if scales_a_row not in (1, groups):
        raise ValueError(f"x_scale has {scales_a_row} scales a row, not 1 or {groups}")
    grouped = scales_a_row > 1
    out = torch.empty((*lead, n), dtype=finish.stored, device=x.device)
    out_scale = scales
    if group:
        out_scale = torch.empty((*lead, cdiv(n, group)), dtype=torch.float32, device=x.device)
    after = {
        "x_scale": scales if x_scale is None else x_scale.contiguous(),
        "scales": scales,
        "bias": scales if finish.bias is None else finish.bias,
        "residual": scales if finish.residual is None else finish.residual.contiguous(),
        "out": out,
        "out_scale": out_scale,
        "output_scale": scales if finish.output_scale is None else finish.output_scale,
        "M": m,
        "N": n,
        **finish.constants(),
    }
    operand = "fp32" if INTERPRETED else NAMES.get(x.dtype, "bf16")
    constants = linear.constants(grouped, operand, found)
    main = {**after, **constants, "x": x.contiguous(), "qweight": qweight, "K": linear.k}
    tiles = cdiv(m, config.constants["BLOCK_M"]) * cdiv(n, config.constants["BLOCK_N"])
    if parts == 1:
        launch(linear.kernel, (tiles, 1), config=config, **main)
    else:
        width = 2 * n if finish.gate else n
        main["out"] = torch.empty((parts, m, width), dtype=sums_of(linear.kind), device=x.device)
        launch(linear.kernel, (tiles, parts), config=config, **main)
        added = sum_config(group, found)
        launch(
            sum_splits,
            (cdiv(m, added.constants["ROWS"]), cdiv(n, added.constants["BLOCK"])),
            parts=main["out"],
            SPLIT=parts,
            config=added,
            **after,
            **{name: constants[name] for name in ("X_SCALED", "W_SCALED", "NATIVE")},
        )
    return out.view(E4M3) if finish.form == "e4m3" else out, out_scale


def sums_of(kind: str) -> torch.dtype:
    """The dtype of sums over a part of K."""
    return torch.int32 if kind == "int8" else torch.float32


def sum_config(group: int, found: int) -> Config:
    """The configuration of `sum_splits`; group: output features that share a scale, or 0."""
    config = choose("sum_splits", ["any"], found)
    constants = {**config.constants, **({"BLOCK": group} if group else {})}
    return Config(constants, config.num_warps, config.num_stages)


def linear_candidates(kind: str, shape: str, found: int) -> list[Config]:
    """What `smelt tune` times for a shape class, "few" or "many/gated", on capability `found`."""
    step, _, rest = shape.partition("/")
    rounds, ctas = 2 if rest.startswith("gated") else 1, _CTAS.get(found, 132)
    limit = min((c.shared for c in CARDS.values() if c.capability == found), default=99 << 10)
    configs = []
    for block_m, block_n, block_k, warps, stages in _TILES[step]:
        loaded = block_m * block_k * (2 if kind == "weight" else 1) + rounds * block_n * block_k
        constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "CTAS": ctas if step != "many" else 0}
        if step == "few":
            # As many pieces of a tile along K as warps.
            constants |= {"BLOCK_K": block_k // warps, "PARTS": warps}
        else:
            constants |= {"BLOCK_K": block_k, "GROUP_M": 8 if step == "many" else 1}
        if loaded * stages <= limit:
            configs.append(Config(constants, warps, stages))
    return configs


def linear_variant(
    table: str, label: str, linear: Linear, finish: Finish, found: int, residual: bool = False
) -> Variant:
    """A linear's kernel as `launch_linear` compiles it, with its dtype for activations."""
    config, parts = linear.config(table, finish, found)
    codes = "*fp8e4nv" if found >= NATIVE_FROM else "*u8"
    wide = f"*{finish.dtype}"
    x, weight = {"int8": ("*i8", "*i8"), "e4m3": (codes, codes)}.get(linear.kind, (wide, codes))
    stored = finish.stored if parts == 1 else sums_of(linear.kind)
    signature = {
        "x": x,
        "qweight": weight,
        **dict.fromkeys(("bias", "residual"), wide),
        **dict.fromkeys(("x_scale", "scales", "out_scale", "output_scale"), "*fp32"),
        "out": POINTERS.get(stored, wide),
        **dict.fromkeys(("M", "N", "K"), "i32"),
    }
    grouped = linear.kind == "e4m3" and linear.block > 0
    constants = {
        **finish.constants(),
        **linear.constants(grouped, finish.dtype, found),
        "HAS_RESIDUAL": residual,
        "WIDEN": False,
    }
    return Variant(
        f"{table}/{label}/{regime(linear.rows)}/{linear.n}x{linear.k}",
        linear.kernel,
        signature,
        constants,
        config,
        frozenset(signature) - {"M"},
        tensor_cores=True,
    )


def sum_variant(kind: str, finish: Finish, found: int) -> Variant:
    """`sum_splits` over four parts."""
    signature = {
        "parts": POINTERS[sums_of(kind)],
        **dict.fromkeys(("bias", "residual"), "*bf16"),
        **dict.fromkeys(("x_scale", "scales", "out_scale", "output_scale"), "*fp32"),
        "out": POINTERS.get(finish.stored, f"*{finish.dtype}"),
        **dict.fromkeys(("M", "N"), "i32"),
    }
    constants = {
        **finish.constants(),
        "X_SCALED": kind != "weight",
        "W_SCALED": True,
        "SPLIT": 4,
        "WIDEN": False,
        "NATIVE": found >= NATIVE_FROM,
    }
    return Variant(
        f"sum_splits/{kind}-{finish.form}",
        sum_splits,
        signature,
        constants,
        sum_config(finish.group, found),
        frozenset(signature) - {"M"},
    )
