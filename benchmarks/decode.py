"""smelt against transformers on random-weight Llama shapes, in one interleaved run.

    python -m benchmarks.decode                           # shapes S and M, all contenders
    python -m benchmarks.decode --shapes tiny --rounds 2  # minutes, to see that it works
    python -m benchmarks.decode --only smelt-int4,openvino-int4,llama-q4   # after `make peers`

Every round times the memory bandwidth and then each contender once (prefill of one prompt, then
decode), beginning with another contender each round; medians over the rounds are compared. Each
contender lives in its own process through all rounds. Then start-up times, in fresh processes.
Results go to benchmarks/results as JSON, with every single round. `contenders.py` says what each
contender does, `shapes.py` what the models are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from . import startup
from .contenders import NAMES, PEERS
from .shapes import SHAPES, Shape, artifact, cache_folder, checkpoint, peer_model
from .worker import Worker

RESULTS = Path(__file__).resolve().parent / "results"
BASE = "hf-eager"


def main() -> None:
    options = arguments()
    log = cache_folder() / "benchmark.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "benchmarks.decode", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "prompt": options.prompt,
        "gen": options.gen,
        "machine": facts(),
        "shapes": {},
    }
    for name in options.shapes:
        shape = SHAPES[name]
        say(f"shape {name}")
        folders = {c: folder_of(c, shape) for c in options.only}
        found: dict[str, Any] = {"config": shape.config(), "int4_group_size": shape.group}
        if options.rounds:
            found["speed"] = speeds(folders, options, log)
            print_speed(name, found["speed"])
        if options.startup_rounds:
            # torch.compile's start is its compilation: it is not measured.
            starting = {c: f for c, f in folders.items() if c != "hf-compile"}
            found["startup"] = startup.measure(
                starting, options.prompt, options.startup_rounds, log, say
            )
            print_startup(name, found["startup"])
        result["shapes"][name] = found
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    say(f"results: {options.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="S,M", help=f"of {', '.join(SHAPES)}; default S,M")
    parser.add_argument("--only", default=",".join(NAMES), help="contenders, with commas between")
    parser.add_argument("--rounds", type=int, default=5, help="of prefill and decode; 0: none")
    parser.add_argument("--startup-rounds", type=int, default=5, help="0: none")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--gen", type=int, default=128, help="tokens generated")
    default = RESULTS / f"decode-{time.strftime('%Y-%m-%d')}.json"
    parser.add_argument("--out", type=Path, default=default, help="JSON file")
    options = parser.parse_args()
    for flag, known in (("shapes", SHAPES), ("only", [*NAMES, *PEERS])):
        listed = [item.strip() for item in getattr(options, flag).split(",") if item.strip()]
        wrong = [item for item in listed if item not in known]
        if wrong or not listed:
            parser.error(f"--{flag}: {', '.join(wrong) or 'nothing'} is not of {', '.join(known)}")
        setattr(options, flag, listed)
    if options.prompt < 1 or options.gen < 2:
        parser.error("--prompt must be at least 1 and --gen at least 2")
    return options


def folder_of(contender: str, shape: Shape) -> Path:
    """Checkpoint or artifact that the contender loads; made on the first run."""
    if contender.startswith("smelt-"):
        return artifact(shape, contender.removeprefix("smelt-"))
    if contender in PEERS:
        return peer_model(shape, contender)
    return checkpoint(shape)


def speeds(folders: dict[str, Path], options: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Run the rounds; {"bandwidth": ..., "contenders": {name: medians and rounds}}."""
    workers: list[Worker] = []
    try:
        for name, folder in {"bandwidth": Path(), **folders}.items():
            workers.append(Worker(name, folder, options.prompt, options.gen, log))
            workers[-1].round(0)
            say(f"{name} is warm")
        rounds: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
        reader, *others = workers
        for index in range(options.rounds):
            rounds["bandwidth"].append(reader.round(index))
            at = index % len(others)
            for worker in others[at:] + others[:at]:
                rounds[worker.name].append(worker.round(1 + index))
            say(f"round {index + 1} of {options.rounds}")
    finally:
        for worker in workers:
            worker.close()
    reads = [found["bytes_per_s"] for found in rounds["bandwidth"]]
    made: dict[str, Any] = {
        "bandwidth_bytes_per_s": median(reads),
        "bandwidth_rounds": reads,
        "contenders": {w.name: summary(w, rounds[w.name], median(reads)) for w in others},
    }
    base = made["contenders"].get(BASE)
    for found in made["contenders"].values() if base else ():
        for rate in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            found[f"{rate}_over_{BASE}"] = found[rate] / base[rate]
    return made


def summary(worker: Worker, rounds: list[dict[str, Any]], bandwidth: float) -> dict[str, Any]:
    """Medians over a contender's rounds."""
    decode = median(r["decode_tokens"] / r["decode_s"] for r in rounds)
    return {
        **worker.facts,
        "prefill_tokens_per_s": median(r["prefill_tokens"] / r["prefill_s"] for r in rounds),
        "decode_tokens_per_s": decode,
        "ttft_s": median(r["ttft_s"] for r in rounds),
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in rounds),
        "bound_fraction": worker.facts["weight_bytes_per_token"] * decode / bandwidth,
        "rounds": rounds,
    }


def facts() -> dict[str, Any]:
    """The machine and the versions, as far as they decide the result."""
    import os

    from smelt.runtime import isa, machine

    return {
        "cpu": machine.cpu_model(),
        "cores": machine.usable_cores(),
        "instruction_sets": sorted(f for f in isa.available() if f.startswith(("avx", "amx"))),
        "last_level_cache_bytes": machine.last_level_cache(),
        "memory_bytes": machine.memory()[0],
        "load_average": os.getloadavg()[0],
        "versions": {n: machine.package_version(n) for n in ("torch", "transformers", "smelt")},
    }


def print_speed(shape: str, found: dict[str, Any]) -> None:
    """A table of one shape's medians, with ratios to transformers eager."""
    rows = []
    for name, one in found["contenders"].items():
        ratios = [
            f"{one[key]:.2f}" if (key := f"{rate}_over_{BASE}") in one else "-"
            for rate in ("decode_tokens_per_s", "prefill_tokens_per_s")
        ]
        rows.append(
            (
                name,
                f"{one['weight_bytes_per_token'] / 1e6:.0f}",
                f"{one['decode_tokens_per_s']:.1f}",
                ratios[0],
                f"{one['bound_fraction']:.2f}",
                f"{one['prefill_tokens_per_s']:.0f}",
                ratios[1],
                f"{one['peak_rss_bytes'] / 2**20:.0f}",
            )
        )
    bandwidth = found["bandwidth_bytes_per_s"] / 1e9
    heads = ("MB a token", "decode tok/s", "x eager", "of bound", "prefill tok/s", "x eager", "MiB")
    print_table(f"{shape}, memory bandwidth {bandwidth:.1f} GB/s", heads, rows)


def print_startup(shape: str, found: dict[str, Any]) -> None:
    """A table of one shape's start-up times."""
    rows = []
    base = found.get(BASE, {}).get("median_s")
    for name, one in found.items():
        ratio = f"{one['median_s'] / base:.2f}" if base else "-"
        rows.append((name, f"{one['median_s']:.2f}", f"{one['over_import_torch_s']:.2f}", ratio))
    heads = ("first token s", "over import torch", "of eager's")
    print_table(f"{shape}, process start to first token", heads, rows)


def print_table(title: str, heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("contender")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=110).print(table)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
