"""How the kernels of this folder are launched, compiled ahead, and tested without a device.

`launch` is used inside operators made by `torch.library.triton_op`, so that Inductor and
AOTInductor see the kernel and not an opaque call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch.library import wrap_triton

from .tuning import Config

# Kernels run in Python over CPU tensors. Decided when triton decorates them, so by the environment
# at import.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# As constants of kernels. Triton's interpreter multiplies the raw bits of bfloat16 operands in
# tl.dot, so they are widened to float32 first (`dot` in tiles.py).
WIDEN = INTERPRETED

Size = int | torch.SymInt

FEW_ROWS, SOME_ROWS = 16, 64


def launch(
    kernel: Any, grid: Sequence[Size], *args: Any, config: Config | None = None, **named: Any
) -> None:
    """Run a kernel over `grid` with a configuration's constants, warps and stages.

    A grid with a symbolic size is fine; one with a 0 does nothing.
    """
    if any(isinstance(size, int) and size == 0 for size in grid):
        return
    if INTERPRETED and any(_is_fake(value) for value in (*args, *named.values())):
        return  # shapes are being derived: the outputs are made already
    if config is not None:
        named = {**named, **config.constants}
        if not INTERPRETED:
            named |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    wrap_triton(kernel)[tuple(grid)](*args, **named)


def _is_fake(value: object) -> bool:
    return isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, torch.nn.Parameter)


def regime(rows: int) -> str:
    """The kernel for steps of at most `rows` tokens, 0 for any number: "few", "some" or "many".

    A compiled step cannot look at its own size, so programs are compiled for bounds.
    """
    if 0 < rows <= FEW_ROWS:
        return "few"
    return "some" if 0 < rows <= SOME_ROWS else "many"


def cdiv(a: Any, b: Any) -> Any:
    """Ceiling of a / b, for symbolic sizes as well."""
    return (a + b - 1) // b


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled for a device: what `make kernels` proves without one.

    signature: argument name to triton's type ("*bf16", "*u8", "i32", "fp32"); constants: value of
    each constexpr argument. aligned: arguments divisible by 16, pointers in bytes. hot: nothing may
    spill. tensor_cores: the loop must use them. wide_loads: global loads of 16 bytes a thread must
    be there.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    config: Config
    aligned: frozenset[str] = field(default_factory=frozenset)
    hot: bool = True
    tensor_cores: bool = False
    wide_loads: bool = True
