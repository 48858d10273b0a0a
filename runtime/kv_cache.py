"""The paged cache's memory: how many blocks an engine gets, and the tensors themselves."""

from __future__ import annotations

import math
import mmap
import sys
from pathlib import Path

import torch

from .batch import BatchLayout, CacheSpec
from .errors import UserError

DEFAULT_FRACTION = 0.4
# Without a wish, memory for so many sequences of full context is enough; more would lie unused.
FULL_SEQUENCES = 8


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on this device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil  # not on Linux: macOS and Windows have no /proc

    return int(psutil.virtual_memory().available)


def cache_blocks(
    spec: CacheSpec,
    layout: BatchLayout,
    device: torch.device,
    *,
    tokens: int | None = None,
    fraction: float | None = None,
) -> int:
    """Blocks of the paged cache. tokens: hold exactly so many (rounded up to blocks).

    fraction: of free memory, `DEFAULT_FRACTION` if None; never more than `FULL_SEQUENCES` whole
    contexts take. Raises `UserError` where not even one block fits.
    """
    size = spec.block_size
    if tokens is not None and fraction is not None:
        raise UserError("--kv-cache-tokens and --kv-cache-fraction are both given: use one")
    if tokens is not None:
        if tokens < 1:
            raise UserError(f"--kv-cache-tokens is {tokens}: give 1 or more")
        needed, free = tokens * spec.bytes_per_token(), free_memory(device)
        if needed > free:
            raise UserError(
                f"--kv-cache-tokens {tokens} needs {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free: give fewer"
            )
        return -(-tokens // size)
    fraction = DEFAULT_FRACTION if fraction is None else fraction
    if not 0 < fraction <= 1:
        raise UserError(f"--kv-cache-fraction is {fraction}: give a number above 0, at most 1")
    fitting = int(free_memory(device) * fraction) // (size * spec.bytes_per_token())
    if fitting < 1:
        raise UserError(
            f"no cache block fits into {fraction:g} of the free memory: "
            "free some, or raise --kv-cache-fraction"
        )
    context = -(-layout.max_position // size)
    return min(fitting, context * min(layout.max_sequences, FULL_SEQUENCES))


def allocate_cache(spec: CacheSpec, blocks: int, device: torch.device) -> list[torch.Tensor]:
    """One zeroed tensor a layer, as `CacheSpec.allocate` gives.

    On the CPU the pages come from the kernel when they are first touched: a large cache costs
    nothing at start (`torch.zeros` would write all of it), and memory only as it fills.
    """
    if device.type != "cpu" or sys.platform == "win32":
        return spec.allocate(blocks, device)
    return [_zeros(shape, spec.torch_dtype) for shape in spec.shapes(blocks)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    pages = mmap.mmap(
        -1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    return torch.frombuffer(pages, dtype=dtype).view(shape)
