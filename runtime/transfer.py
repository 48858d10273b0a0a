"""Between host and device without waiting for the device.

A plain copy to a CUDA device waits until everything that was launched before is done. Here what
goes over lies in pinned memory, which the device fetches in its own time, a step's inputs all in
one buffer; what comes back is waited for alone. On the CPU nothing is copied that need not be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

# Device memory is handed out at such multiples, so that views in a buffer are as aligned as tensors
# of their own: compiled kernels load 16 bytes at a time.
ALIGN = 256


def send(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.tensor(values, dtype=dtype, device=device)`."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    host = torch.tensor(values, dtype=dtype, pin_memory=True)
    return host.to(device, non_blocking=True)


def read(values: torch.Tensor, meanwhile: Callable[[], None] | None = None) -> list[Any]:
    """`values.tolist()`; `meanwhile` is called once the copy is on its way.

    The copy goes before what `meanwhile` launches, so reading does not wait for that.
    """
    if values.device.type != "cuda":
        if meanwhile is not None:
            meanwhile()
        found: list[Any] = values.tolist()
        return found
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    there = torch.cuda.Event()
    there.record()
    if meanwhile is not None:
        meanwhile()
    there.synchronize()
    return read(host)


@dataclass(frozen=True)
class Packing:
    """Tensors side by side in one buffer of bytes, each at a multiple of ALIGN."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """First byte and number of bytes of each."""
        places: list[tuple[int, int]] = []
        at = 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            count = math.prod(shape) * dtype.itemsize
            places.append((at, count))
            at += -(-count // ALIGN) * ALIGN
        return places

    @cached_property
    def nbytes(self) -> int:
        return sum(-(-count // ALIGN) * ALIGN for _, count in self._places)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in `buffer`, uint8 of `nbytes` or more."""
        pairs = zip(self._places, self.shapes, self.dtypes, strict=True)
        return [
            buffer[at : at + count].view(dtype).view(shape) for (at, count), shape, dtype in pairs
        ]


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Those that lie on the host moved to `device` in one copy; the others are given back."""
    host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if not host:
        return list(tensors)
    packing = Packing(tuple(tuple(t.shape) for t in host), tuple(t.dtype for t in host))
    # Pinned memory comes from torch's cache, which waits for the copy before it is used again.
    pinned = torch.empty(packing.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for view, tensor in zip(packing.views(pinned), host, strict=True):
        view.copy_(tensor)
    moved = iter(packing.views(pinned.to(device, non_blocking=True)))
    return [next(moved) if tensor.device.type == "cpu" else tensor for tensor in tensors]


class HostCopy:
    """What a buffer of `packing` on the device is filled from.

    It keeps what was written before, zeros at first, and is not written while it is being copied.
    """

    def __init__(self, packing: Packing, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._bytes = torch.zeros(packing.nbytes, dtype=torch.uint8, pin_memory=pinned)
        self._arrays = [view.numpy() for view in packing.views(self._bytes)]
        self._sent = torch.cuda.Event() if pinned else None

    def arrays(self) -> list[np.ndarray]:
        """The tensors, to write into; waits for the copy before."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._arrays

    def send(self, buffer: torch.Tensor) -> None:
        buffer.copy_(self._bytes, non_blocking=True)
        if self._sent is not None:
            self._sent.record()
