"""One section of the GPU benchmark, in a process of its own; `gpu.py` starts it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch._dynamo

from .gpu_cases import Scale
from .gpu_lines import Lines
from .gpu_measure import device_of, facts, yardsticks

SECTIONS = ("card", "checks", "package", "peers", "models")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", help=f"{', '.join(SECTIONS)}, or a group of kernels")
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True, help="where packages lie")
    parser.add_argument("--until", type=float, required=True, help="of time.time()")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--bandwidth", type=float, default=0.0)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--most", type=int, default=0)
    parser.add_argument("--group", default="", help="of kernels, for checks")
    parser.add_argument(
        "--job", action="append", default=[], help="model and precision; of peers: model"
    )
    parser.add_argument("--done", default="[]", help="names of rows that are not wanted, as JSON")
    given = parser.parse_args()
    lines = Lines(given.lines)
    device = device_of(given.smoke)
    if device.type == "cpu":
        torch.set_num_threads(1)  # of a machine that others use, too
    # One function is compiled for more shapes here than torch allows, and then goes on uncompiled.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    scale = Scale(given.smoke)
    if given.section == "card":
        lines.begin("card")
        lines.note({**facts(device), **yardsticks(device)})
    elif given.section == "package":
        from .gpu_packages import jobs_of, make

        (job,) = jobs_of(scale, given.layers, given.job)
        make(job, given.base, device.type, lines)
    elif given.section == "peers":
        from .gpu_models import warm_peer

        warm_peer(scale, given.job[0], given.layers, device, lines)
    else:
        from .gpu_kernels import Settings, check, measure

        settings = Settings(device, scale, given.until, given.bandwidth, given.most)
        done = json.loads(given.done)
        if given.section == "checks":
            check(given.group, settings, lines, done)
        elif given.section == "models":
            from .gpu_models import run
            from .gpu_packages import jobs_of

            run(settings, jobs_of(scale, given.layers, given.job), given.base, lines, done)
        else:
            measure(given.section, settings, lines, done)
    lines.end()
    return 0


if __name__ == "__main__":
    began = time.perf_counter()
    status = main()
    print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr)
    sys.exit(status)
