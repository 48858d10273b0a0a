"""What the kernel part of the GPU benchmark is made of: a case is one kernel on one shape.

Cases build their tensors when asked, on the device, from random numbers; the same case is checked
against its reference in one section and timed in another.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import smelt.runtime.ops  # noqa: F401 - registers the operators
from smelt.runtime.kernels.gpu.launch import FEW_ROWS, SOME_ROWS
from smelt.runtime.kernels.gpu.roofline import Cost

from .gpu_measure import Call

BF16 = torch.bfloat16
# Of results rounded to bfloat16 once or twice, and summed in float32 in another order.
CLOSE = 0.02


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder: features of the residual stream and of the feed-forward layer, heads."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    layers: int
    vocab: int
    tied: bool

    @property
    def qkv(self) -> int:
        """Outputs of the fused projection before attention."""
        return (self.heads + 2 * self.kv_heads) * self.head


LLAMA_8B = Model("llama-8b", 4096, 14336, 32, 8, 128, 32, 128256, False)
QWEN3_4B = Model("qwen3-4b", 2560, 9728, 32, 8, 128, 36, 151936, True)
# Stand-ins that an interpreter gets through.
TINY_LLAMA = Model("llama-8b", 128, 256, 4, 2, 32, 2, 320, False)
TINY_QWEN3 = Model("qwen3-4b", 64, 192, 4, 2, 16, 2, 288, True)
_SMALL = {1: 1, 8: 3, 64: 20, 512: 18, 2048: 66, 4096: 50, 8192: 70, 32768: 90}


@dataclass(frozen=True)
class Scale:
    """The sizes a run has: real ones, or with `small` those of a smoke run."""

    small: bool

    @property
    def llama(self) -> Model:
        return TINY_LLAMA if self.small else LLAMA_8B

    @property
    def qwen3(self) -> Model:
        return TINY_QWEN3 if self.small else QWEN3_4B

    def tokens(self, count: int) -> int:
        """Tokens of a step, or of a context."""
        return _SMALL[count] if self.small else count

    def group(self, k: int) -> int:
        """Of int4, along k features."""
        return min(64 if self.small else 128, k)


class Maker:
    """Random tensors on a device."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> torch.Tensor:
        made = torch.randn(shape, generator=self._generator, device=self.device)
        return (made * scale).to(dtype)

    def uniform(
        self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        made = torch.rand(shape, generator=self._generator, device=self.device)
        return (low + (high - low) * made).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """low .. high - 1."""
        return torch.randint(
            low, high, shape, generator=self._generator, device=self.device, dtype=dtype
        )

    def permutation(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self._generator, device=self.device)

    def tensor(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass
class Trial:
    """A case with its tensors.

    run: the kernel. cost: of one call. reference: what it must give, within `tolerance` of
    `error_of`, which counts differing elements if `exact`. peers: what else computes it, each built
    when it is timed, so that one that is not there fails alone. capture: whether the call fits into
    a CUDA graph.
    """

    run: Call
    cost: Callable[[], Cost]
    reference: Call
    tolerance: float = CLOSE
    exact: bool = False
    peers: Mapping[str, Callable[[], Call]] = field(default_factory=dict)
    capture: bool = True


@dataclass(frozen=True)
class Goal:
    """A speed that is wanted. of: "bound", or the peer that is compared with; least: bound or peer
    milliseconds over the kernel's."""

    of: str
    least: float


@dataclass(frozen=True)
class Case:
    """timed: whether it is measured, too; the others are for their correctness alone."""

    group: str
    kernel: str
    shape: str
    make: Callable[[Maker], Trial]
    goal: Goal | None = None
    timed: bool = True

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape}"


def kernel_module(name: str) -> Any:
    """A module of runtime/kernels/gpu, imported when a case needs it: that registers operators."""
    return importlib.import_module(f"smelt.runtime.kernels.gpu.{name}")


def operators(module: str) -> Any:
    """torch.ops.smelt with the operators of a kernel module."""
    kernel_module(module)
    return torch.ops.smelt


def bound_of(tokens: int) -> int:
    """The bound on tokens that a step of so many is compiled for, 0 for none."""
    for bound in (FEW_ROWS, SOME_ROWS):
        if tokens <= bound:
            return bound
    return 0


_compiled: dict[Any, Any] = {}


def inductor(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function` through torch.compile with symbolic sizes, as a step is compiled; on a CPU, where
    only the way there is tried, without Inductor."""
    if function not in _compiled:
        backend = "inductor" if device.type == "cuda" else "eager"
        _compiled[function] = torch.compile(function, dynamic=True, backend=backend)
    found: Callable[..., Any] = _compiled[function]
    return found
