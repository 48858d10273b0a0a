"""`smelt generate --input`: a file of requests, with a bar while it runs and a summary after it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smelt.runtime.batch_file import BatchFile, Summary, percentile

from .progress import counting

if TYPE_CHECKING:
    from smelt.runtime.llm import LLM
    from smelt.runtime.metrics import Metrics
    from smelt.runtime.sampling_params import SamplingParams


def answer_file(
    source: Path,
    target: Path,
    params: SamplingParams,
    opener: Callable[[], LLM],
    as_json: bool,
) -> None:
    """Answer what `target` lacks of `source`; the summary goes to stdout."""
    file = BatchFile(source, target, params)
    summary = Summary(skipped=len(file.finished & file.requests.keys()))
    total = len(file.remaining)
    if summary.skipped:
        print(f"smelt: {summary.skipped} answers are there already", file=sys.stderr)
    with opener() as llm, counting("answering") as progress:
        began = time.perf_counter()
        for _, output in file.run(llm):
            summary.add(output)
            if progress is not None:
                progress(summary.done, total)
        summary.seconds = time.perf_counter() - began
        found = report(summary, llm.engine.metrics)
    if as_json:
        print(json.dumps(found))
    else:
        print("\n".join(_lines(found, target)))


def report(summary: Summary, metrics: Metrics) -> dict[str, Any]:
    """The summary as numbers: rates in tokens a second, times in seconds."""
    seconds = max(summary.seconds, 1e-9)
    found: dict[str, Any] = {
        "answered": summary.done,
        "skipped": summary.skipped,
        "failed": summary.failed,
        "prompt_tokens": summary.prompt_tokens,
        "generated_tokens": summary.generated_tokens,
        "seconds": summary.seconds,
        "tokens_per_s": summary.generated_tokens / seconds,
        "hit_rate": metrics.hit_rate,
        "preemptions": metrics.preemptions,
    }
    for name, values in (("ttft_s", summary.ttft_s), ("itl_s", summary.itl_s)):
        for share in (50, 95, 99):
            found[f"{name}_p{share}"] = percentile(values, share / 100)
    if metrics.drafted_tokens:
        found["acceptance"] = metrics.acceptance
        found["accepted_length"] = metrics.accepted_length
    return found


def _lines(found: dict[str, Any], target: Path) -> list[str]:
    def times(name: str) -> str:
        return " / ".join(f"{found[f'{name}_p{share}'] * 1e3:.1f}" for share in (50, 95, 99))

    failed = f", {found['failed']} of them failed" if found["failed"] else ""
    lines = [
        f"{found['answered']} answers in {found['seconds']:.1f} s{failed}: {target}",
        f"generated          {found['tokens_per_s']:.1f} tokens/s",
        f"first token        {times('ttft_s')} ms (p50 / p95 / p99)",
        f"between tokens     {times('itl_s')} ms (p50 / p95 / p99)",
        f"prompts in cache   {found['hit_rate']:.1%}",
    ]
    if "acceptance" in found:
        lines.append(
            f"drafts accepted    {found['acceptance']:.1%}, "
            f"{found['accepted_length']:.2f} tokens a drafted step"
        )
    return lines
