"""Start-up: seconds from starting a process to its first token after a 128-token prompt.

Each measurement is a fresh process; contenders take turns, so that all meet the same state of the
machine. A first turn is thrown away: after it, files lie in the page cache for everybody. A bare
`import torch` is the base that no contender can go below.

As a child: `python -m benchmarks.startup NAME FOLDER PROMPT` prints "ready" behind its first token.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from .contenders import PEERS, make
from .shapes import ROOT, python_of

BASE = "import torch"


def measure(
    folders: Mapping[str, Path], prompt: int, rounds: int, log: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """{contender: {"median_s", "rounds_s", "over_import_torch_s"}}, the bare import included."""
    names = [BASE, *folders]
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        for name in _turned(names, index):
            seconds = once(name, folders.get(name), prompt, log)
            if index:
                times[name].append(seconds)
        say(f"start-up: {'warm-up' if not index else f'round {index} of {rounds}'}")
    base = median(times[BASE])
    return {
        name: {
            "median_s": median(values),
            "rounds_s": values,
            "over_import_torch_s": median(values) - base,
        }
        for name, values in times.items()
    }


def _turned(names: list[str], index: int) -> list[str]:
    """The same names, beginning with another one each round."""
    at = index % len(names)
    return names[at:] + names[:at]


def once(name: str, folder: Path | None, prompt: int, log: Path) -> float:
    """Seconds from starting the process to its "ready". Raises RuntimeError where it fails."""
    if name == BASE:
        command = [sys.executable, "-c", "import torch; print('ready', flush=True)"]
    else:
        command = [python_of(name), "-m", "benchmarks.startup", name, str(folder), str(prompt)]
    with log.open("a") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        seconds = None
        for line in process.stdout:
            if line.strip() == "ready":
                seconds = time.perf_counter() - started
        if process.wait() or seconds is None:
            raise RuntimeError(f"start-up of {name} failed; its output is in {log}")
    return seconds


def first_token(name: str, folder: Path, prompt: int) -> None:
    """Load as a user's program does, and get one token."""
    # Ids that every vocabulary here has; which ones does not matter to the time.
    ids = [2 + i % 256 for i in range(prompt)]
    if name.startswith("smelt-"):
        import smelt

        llm = smelt.load(folder, kv_cache_tokens=CACHE_TOKENS)
        params = smelt.SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        assert llm.generate([ids], params)[0].token_ids
    elif name in PEERS:
        make(name, folder, prompt, 1).round(0)
    else:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        with torch.inference_mode():
            out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            out.logits[0, -1].argmax().item()
    print("ready", flush=True)


# Room for a chat; transformers' cache grows as it needs.
CACHE_TOKENS = 2048

if __name__ == "__main__":
    first_token(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
