"""Which kernels a device spends its time on, and how long it has nothing to do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from .gpu_measure import first_line

LISTED = 16
LONGEST_NAME = 80


def profile(work: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Of `work`, which runs so many steps, by torch's profiler: {"idle_share", "kernels"}, or
    {"error"} where the profiler does not work here.

    Watching slows the host, so that the idle share is an upper bound.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    cuda = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    try:
        with watch(activities=[activity]) as seen:
            work()
            if cuda:
                torch.cuda.synchronize()
        events = [event for event in seen.events() or () if event.device_type == wanted]
    except RuntimeError as error:
        return {"error": first_line(error)}
    if not events:
        return {"error": "the profiler saw nothing"}
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        times[event.name[:LONGEST_NAME]].append(event.time_range.elapsed_us())
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))
    return {
        "idle_share": idle_share([(e.time_range.start, e.time_range.end) for e in events]),
        "kernels": [
            {"name": name, "us_a_step": sum(own) / steps, "calls_a_step": len(own) / steps}
            for name, own in ordered[:LISTED]
        ],
    }


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Of the time from the first begin to the last end, what no span covers."""
    spans = sorted(spans)
    begin, covered, until = spans[0][0], 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1.0 - covered / max(1e-9, until - begin)
