"""What the attention kernels are compiled for: shapes of layers, constants, numbers of pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from smelt.runtime.ops.cache_format import CACHE_FORMATS, QUANTIZED

from .e4m3 import NATIVE_FROM
from .launch import INTERPRETED, WIDEN, Size, cdiv
from .tuning import Config, capability

# Sequences with more tokens in a step are the prefill kernel's.
MAX_TOKENS = 16
# No piece of a sequence's keys is longer, however many programs there are already: one sequence
# may be much longer than the others.
LONGEST_PIECE = 8192
# Multiprocessors, where kernels are interpreted.
INTERPRETED_SMS = 6
LARGEST_HEAD = 256


@dataclass(frozen=True)
class Shape:
    """H query heads of D features, G kv heads, slots of a block, the cache's format; dtypes of
    queries and cache, each "bf16", "fp16" or "fp32"."""

    heads: int
    kv_heads: int
    size: int
    block_size: int
    format: str = "auto"
    dtype: str = "bf16"
    cache_dtype: str = "bf16"

    @property
    def ratio(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads

    @property
    def row(self) -> int:
        """Elements of a row of the cache, or bytes of a quantized one."""
        return self.size if self.format == "auto" else QUANTIZED[self.format].row_bytes(self.size)

    @property
    def block_d(self) -> int:
        """Columns of a tile that holds all features."""
        return max(16, triton.next_power_of_2(self.size))

    @property
    def columns(self) -> int:
        """Of a tile of the decode kernel: a token's query heads, at least the 8 that tensor cores
        have, and no more than there are registers for."""
        most = 32 if self.format == "auto" else 16
        return min(most, max(8, triton.next_power_of_2(self.ratio)))

    @property
    def compute(self) -> str:
        """What products are made of. Over quantized rows the decode kernel's are float16 always."""
        if self.format != "auto":
            return self.dtype
        return "fp32" if "fp32" in (self.dtype, self.cache_dtype) else self.cache_dtype

    def classes(self, kind: str = "") -> list[str]:
        """Of the tables, the most specific first. kind: "tree/", or nothing."""
        stored = "32bit" if self.compute == "fp32" else "16bit"
        stored = stored if self.format == "auto" else self.format
        d = self.block_d
        return [f"{kind}{name}" for name in (f"{stored}/{d}", f"any/{d}", stored, "any")]


def unsupported(shape: Shape) -> str | None:
    """Why the kernels cannot serve a shape; None where they can."""
    if shape.format not in CACHE_FORMATS:
        return f"unknown cache format {shape.format!r}, known: {', '.join(CACHE_FORMATS)}"
    if shape.heads % shape.kv_heads:
        return f"{shape.heads} query heads are no multiple of {shape.kv_heads} kv heads"
    if shape.size > LARGEST_HEAD:
        return f"heads of {shape.size} features, the kernels take at most {LARGEST_HEAD}"
    words = 8 if shape.format == "int4" else 4
    if shape.format != "auto" and shape.size % words:
        return f"an {shape.format} cache needs a head size divisible by {words}, not {shape.size}"
    if shape.block_size != triton.next_power_of_2(shape.block_size):
        return f"blocks of {shape.block_size} slots, the kernels need a power of two"
    return None


def constants(
    shape: Shape, scale: float, window: int, softcap: float, found: int, interpreted: bool
) -> dict[str, Any]:
    """Of both kernels, on capability `found`."""
    return {
        "RATIO": shape.ratio,
        "KV_HEADS": shape.kv_heads,
        "BLOCK_SIZE": shape.block_size,
        "SIZE": shape.size,
        "ROW": shape.row,
        "BLOCK_D": shape.block_d,
        "FORMAT": shape.format,
        "SCALE": scale,
        "WINDOW": window,
        "SOFTCAP": softcap,
        "MAX_TOKENS": MAX_TOKENS,
        "COMPUTE": shape.compute,
        "DTYPE": shape.dtype,
        "WIDEN": WIDEN and interpreted,
        "NATIVE": found >= NATIVE_FROM,
        "ASSEMBLY": not interpreted,
    }


def pieces(heads: Size, keys: Size, window: int, sms: int, config: Config) -> Size:
    """Into how many pieces a sequence's keys are cut at most.

    heads: kv heads of all sequences; keys: that the table has room for. As many as give each
    multiprocessor the PROGRAMS it holds at once, since a second round would be a short one; none is
    longer than LONGEST_PIECE or shorter than PIECE.
    """
    if window > 0:
        keys = torch.sym_min(keys, window + MAX_TOKENS)
    resident = sms * int(config.constants["PROGRAMS"])
    wanted = torch.sym_max(resident // torch.sym_max(1, heads), cdiv(keys, LONGEST_PIECE))
    return torch.sym_max(1, torch.sym_min(wanted, cdiv(keys, int(config.constants["PIECE"]))))


def multiprocessors(device: torch.device) -> int:
    """Of a device; a constant where kernels are interpreted."""
    if INTERPRETED or capability(device) == 0:
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def of_kernel(config: Config) -> Config:
    """A configuration of the decode kernel without what only its launch reads."""
    own = {name: value for name, value in config.constants.items() if name != "PROGRAMS"}
    return Config(own, config.num_warps, config.num_stages)
