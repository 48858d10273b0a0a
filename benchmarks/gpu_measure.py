"""How the GPU benchmark measures: the card's own rates, the time of a call, the error of a result.

A call is timed twice. `ms` is what a call takes inside a CUDA graph over so many copies of its
tensors that none is still in the second-level cache when its turn comes again: what it costs in a
decode step, whose layers follow each other without the host. `do_bench_ms` is the median of
triton.testing.do_bench, which launches from Python and clears that cache between calls; for calls
shorter than a launch it is the launch's time. On a CPU both are time.perf_counter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from smelt.runtime.kernels.gpu.roofline import CARDS, Card

Call = Callable[[], Any]

# Copies of a call's tensors hold this many times the second-level cache.
CACHES = 3
MOST_COPIES = 24
# A graph holds calls enough that its own launch does not matter.
GRAPH_CALLS = 24
REPLAYS = 7
# do_bench's milliseconds of warming up and of measuring.
WARMUP_MS, MEASURE_MS = 5, 25
YARDSTICK_BYTES = 4 << 30
YARDSTICK_SIDE = 8192


def device_of(smoke: bool) -> torch.device:
    """Where the benchmark runs; raises SystemExit where a card is wanted and none is there."""
    if smoke:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --smoke runs the same code on the CPU")
    return torch.device("cuda")


def card_of(device: torch.device) -> tuple[Card, str]:
    """The card's data sheet, and how it was found. On the CPU an H200 stands for it."""
    if device.type == "cpu":
        return CARDS["H200"], "stands in for the CPU"
    name = torch.cuda.get_device_name(device)
    known = [card for card in CARDS.values() if card.name in name]
    if known:
        return known[0], f"named {name}"
    major, minor = torch.cuda.get_device_capability(device)
    same = [card for card in CARDS.values() if card.capability == 10 * major + minor]
    if not same:
        raise RuntimeError(f"runtime/kernels/gpu/roofline.py knows no card like {name}")
    return same[0], f"{name} is not known; another card of capability {major}.{minor}"


def synchronize(device: torch.device) -> None:
    """Wait for the device; raises what its kernels left behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(device: torch.device) -> int:
    """Of the second-level cache."""
    if device.type == "cpu":
        return 1 << 20
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def copies_of(nbytes: int, device: torch.device) -> int:
    """How many copies of a call's tensors do not fit into the second-level cache together."""
    if device.type == "cpu":
        return 1
    return max(1, min(MOST_COPIES, -(-CACHES * cache_bytes(device) // max(1, nbytes))))


def timed(calls: Sequence[Call], device: torch.device, capture: bool = True) -> dict[str, Any]:
    """{"ms", "do_bench_ms"} of a call, given over copies of its tensors.

    Where a graph cannot be captured `ms` is do_bench's, and "no_graph" says why. capture: False for
    calls that read from the host.
    """
    direct = direct_ms(calls[0], device)
    if device.type == "cpu":
        return {"ms": direct, "do_bench_ms": direct}
    if not capture:
        return {"ms": direct, "do_bench_ms": direct, "no_graph": "the call reads from the host"}
    try:
        return {"ms": _graph_ms(calls), "do_bench_ms": direct}
    except RuntimeError as error:
        synchronize(device)  # raises again if the device itself has failed
        return {"ms": direct, "do_bench_ms": direct, "no_graph": first_line(error)}


def direct_ms(call: Call, device: torch.device) -> float:
    """Milliseconds of a call by do_bench, on a CPU of one call by the clock."""
    if device.type == "cpu":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    from triton.testing import do_bench

    return float(do_bench(call, warmup=WARMUP_MS, rep=MEASURE_MS, return_mode="median"))


def _graph_ms(calls: Sequence[Call]) -> float:
    """Milliseconds of one call, the median over replays of a graph of many."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    rounds = max(1, -(-GRAPH_CALLS // len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    spans = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    spans[0].record()
    for event in spans[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(spans)]
    return median(times) / (rounds * len(calls))


def yardsticks(device: torch.device) -> dict[str, Any]:
    """What this card does now: bytes a second of a large copy, operations a second of cuBLAS."""
    small = device.type == "cpu"
    size = (1 << 22) if small else YARDSTICK_BYTES
    side = 64 if small else YARDSTICK_SIDE
    rates: dict[str, Any] = {}
    for kind, build in (("bf16", _bf16), ("int8", _int8), ("fp8", _fp8)):
        try:
            rates[kind] = 2e3 * side**3 / direct_ms(build(side, device), device)
        except (RuntimeError, NotImplementedError) as error:
            rates[kind] = {"error": first_line(error)}
    seconds = direct_ms(_copy(size, device), device) / 1e3
    return {"copy_bytes_per_s": 2 * size / seconds, "operations_per_s": rates}


def _copy(size: int, device: torch.device) -> Call:
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _bf16(side: int, device: torch.device) -> Call:
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return lambda: a @ a.t()


def _int8(side: int, device: torch.device) -> Call:
    a = torch.randint(-9, 9, (side, side), device=device, dtype=torch.int8)
    return lambda: torch._int_mm(a, a.t())


def _fp8(side: int, device: torch.device) -> Call:
    a = torch.randn(side, side, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16)


def facts(device: torch.device) -> dict[str, Any]:
    """The card and the versions, as far as they decide the result."""
    from smelt.runtime import machine

    card, how = card_of(device)
    found: dict[str, Any] = {
        "device": str(device),
        "data_sheet": card.name,
        "data_sheet_because": how,
        "versions": {n: machine.package_version(n) for n in ("torch", "triton", "transformers")},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cache_bytes": cache_bytes(device),
            "cuda": torch.version.cuda,
        }
    return found


def error_of(found: Any, expected: Any, exact: bool) -> float:
    """How far a result is from its reference, both a tensor or tuple of tensors.

    The largest |found - expected| / (|expected| + root mean square of expected), infinity where
    only one is NaN; exact: the share of elements that are not the same. Raises ValueError for
    another shape.
    """
    pairs = list(zip(_tuple(found), _tuple(expected), strict=True))
    return max(_error(a, b, exact) for a, b in pairs)


def _tuple(x: Any) -> tuple[torch.Tensor, ...]:
    return (x,) if isinstance(x, torch.Tensor) else tuple(x)


def _error(found: torch.Tensor, expected: torch.Tensor, exact: bool) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"the result is {[*found.shape]}, its reference {[*expected.shape]}")
    if not found.numel():
        return 0.0
    a, b = found.to(expected.device).float(), expected.float()
    if exact:
        same = (a == b) | (a.isnan() & b.isnan())
        return float((~same).float().mean())
    if not torch.equal(a.isnan(), b.isnan()):
        return float("inf")
    a, b = a.nan_to_num(), b.nan_to_num()
    rms = b.pow(2).mean().sqrt().clamp(min=1e-30)
    return float(((a - b).abs() / (b.abs() + rms)).max())


def first_line(error: BaseException) -> str:
    """An exception in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else '?'}"[:300]


def used_memory(device: torch.device) -> int:
    """Most bytes that were allocated on the device, or of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
