"""What a draft is worth on a demo model: greedy answers to held-out questions.

    python -m smelt.models.demo.acceptance OUT --draft medusa:models/demo/smelt-demo-medusa

Prints the share of drafted levels that were taken, tokens a step that had a draft, and the speed
of one sequence at a time with the draft over that without, in turn on the same questions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import smelt

from .data import read_heldout


@dataclass(frozen=True)
class Worth:
    """tokens: of the answers of one round; different: answers that a draft changed, of all rounds.

    seconds: of each round without and with the draft. speedup: the median of their ratios. steps:
    of all rounds without and with. length: tokens a step that had a draft.
    """

    tokens: int
    different: int
    drafted: int
    accepted: int
    length: float
    steps: tuple[int, int]
    seconds: list[tuple[float, float]]

    @property
    def speedup(self) -> float:
        return statistics.median(plain / drafted for plain, drafted in self.seconds)


def questions(each: int) -> list[list[dict[str, str]]]:
    """The first `each` held-out chats of every task, up to the model's answer."""
    return [
        [dict(m) for m in s.messages] for found in read_heldout().values() for s in found[:each]
    ]


def measure(
    artifact: Path, draft: str, draft_tokens: int | None, each: int = 4, rounds: int = 1
) -> Worth:
    """Answer the questions `rounds` times, each with and without the draft in turn.

    draft_tokens: levels of a tree; None for what pays. The first answers of a round warm up.
    """
    params = smelt.SamplingParams(temperature=0.0, max_tokens=64)
    plain = smelt.load(artifact, kv_cache_tokens=2048)
    drafting = smelt.load(artifact, kv_cache_tokens=2048, draft=draft, draft_tokens=draft_tokens)
    asked = questions(each)
    different = tokens = 0
    seconds = []
    for _ in range(rounds):
        spent, tokens = [0.0, 0.0], 0
        for number, chat in enumerate(asked):
            said: list[list[int]] = [[], []]
            # Who goes first finds the caches cold, so they take turns.
            for i in (0, 1) if number % 2 else (1, 0):
                llm = (plain, drafting)[i]
                began = time.perf_counter()
                said[i] = llm.chat(chat, params).token_ids
                spent[i] += time.perf_counter() - began
            tokens += len(said[0])
            different += said[0] != said[1]
        seconds.append((spent[0], spent[1]))
    metrics = drafting.engine.metrics
    return Worth(
        tokens,
        different,
        metrics.drafted_tokens,
        metrics.accepted_tokens,
        metrics.accepted_length,
        (plain.engine.metrics.steps, metrics.steps),
        seconds,
    )


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description="Measure what a draft is worth.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--draft-tokens", type=int, help="levels of a tree; default: what pays")
    parser.add_argument("--each", type=int, default=4, help="questions of every task")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    worth = measure(given.artifact, given.draft, given.draft_tokens, given.each, given.rounds)
    plain, drafting = (
        statistics.median(worth.tokens / round_[i] for round_ in worth.seconds) for i in (0, 1)
    )
    print(
        f"{worth.tokens} tokens of answers, {worth.different} answers differ\n"
        f"{worth.drafted} drafted, {worth.accepted} taken, "
        f"{worth.length:.2f} tokens a step with a draft\n"
        f"steps {worth.steps[0]} -> {worth.steps[1]}; "
        f"tokens/s {plain:.0f} -> {drafting:.0f}, {worth.speedup:.2f}x"
    )


if __name__ == "__main__":
    main()
