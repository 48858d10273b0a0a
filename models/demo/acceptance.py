"""How much of a draft a demo model takes: greedy answers to held-out questions.

    python -m smelt.models.demo.acceptance OUT --draft medusa:models/demo/smelt-demo-medusa

Prints the share of drafted levels that were taken, tokens a step that had a draft, and the speed
of one sequence at a time with the draft over that without, in turn on the same questions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import smelt

from .data import read_heldout


def questions(each: int) -> list[list[dict[str, str]]]:
    """The first `each` held-out chats of every task, up to the model's answer."""
    return [
        [dict(m) for m in s.messages] for found in read_heldout().values() for s in found[:each]
    ]


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description="Measure what a draft is worth.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--draft-tokens", type=int, help="levels of a tree; default: what pays")
    parser.add_argument("--each", type=int, default=4, help="questions of every task")
    args = parser.parse_args()
    params = smelt.SamplingParams(temperature=0.0, max_tokens=64)
    plain = smelt.load(args.artifact, kv_cache_tokens=2048)
    draft = smelt.load(
        args.artifact, kv_cache_tokens=2048, draft=args.draft, draft_tokens=args.draft_tokens
    )
    seconds, tokens, different = [0.0, 0.0], 0, 0
    for chat in questions(args.each):
        said = []
        for i, llm in enumerate((plain, draft)):
            began = time.perf_counter()
            said.append(llm.chat(chat, params).token_ids)
            seconds[i] += time.perf_counter() - began
        tokens += len(said[0])
        different += said[0] != said[1]
    metrics = draft.engine.metrics
    accepted = metrics.accepted_tokens
    print(
        f"{tokens} tokens of answers, {different} answers differ\n"
        f"{metrics.drafted_tokens} drafted, {accepted} taken, "
        f"{metrics.accepted_length:.2f} tokens a step with a draft\n"
        f"steps {plain.engine.metrics.steps} -> {metrics.steps}; "
        f"tokens/s {tokens / seconds[0]:.0f} -> {tokens / seconds[1]:.0f}"
    )


if __name__ == "__main__":
    main()
