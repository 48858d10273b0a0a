"""What drafting gains on real text: the same prompts with and without, in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .errors import SmeltError, UserError
from .llm import LLM, Prompt
from .sampling_params import SamplingParams

# Questions and beginnings of the kinds that drafts are good and bad at: copying, lists, talk.
PROMPTS = (
    "Repeat the following sentence twice: The old lighthouse keeper counted the ships at dawn.",
    "Write the numbers from one to twenty as words, separated by commas.",
    "Tell a short story about a child who finds a key in the garden.",
    "Explain in a few sentences why the sky is blue.",
    "List five animals that live in the sea and say one thing about each of them.",
    "Correct the spelling and repeat the sentence: Teh quick brown fox jumsp over the lazy dog.",
)


@dataclass
class DraftMeasurement:
    """Rates are generated tokens a second over all prompts, one at a time, medians of rounds.

    acceptance: share of the drafted tokens that were taken; accepted_length: tokens a drafted step
    gave; drafted_steps: share of the steps that had a draft; same: whether all greedy tokens were
    those without drafts (outside deterministic mode a tie may fall differently).
    """

    drafter: str
    tokens_per_s: float
    plain_tokens_per_s: float
    acceptance: float
    accepted_length: float
    drafted_steps: float
    same: bool

    @property
    def speed_up(self) -> float:
        return self.tokens_per_s / self.plain_tokens_per_s


def measure_draft(
    llm: LLM, prompts: Sequence[Prompt], gen: int = 64, rounds: int = 3
) -> DraftMeasurement:
    """Answer each prompt greedily, with the LLM's drafter and without, in turns.

    Raises UserError for an LLM that was opened without a draft.
    """
    engine = llm.engine
    speculator = engine.speculator
    if speculator is None or speculator.drafter is None:
        raise UserError("nothing drafts here: open the artifact with a draft")
    name = speculator.drafter.name
    params = llm.chat_params(SamplingParams(max_tokens=gen))
    rates: dict[bool, list[float]] = {True: [], False: []}
    answers: dict[bool, list[list[int]]] = {True: [], False: []}
    metrics = engine.metrics
    steps = 0
    try:
        llm.generate(list(prompts[:1]), params)
        for _ in range(rounds):
            for drafting in (True, False):
                engine.speculator = speculator if drafting else None
                before = metrics.steps
                seconds, found = _round(llm, prompts, params)
                steps += metrics.steps - before if drafting else 0
                rates[drafting].append(sum(map(len, found)) / seconds)
                answers[drafting] = found
    finally:
        engine.speculator = speculator
    return DraftMeasurement(
        name,
        median(rates[True]),
        median(rates[False]),
        metrics.acceptance,
        metrics.accepted_length,
        metrics.draft_steps / max(1, steps),
        answers[True] == answers[False],
    )


def _round(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams
) -> tuple[float, list[list[int]]]:
    llm.engine.scheduler.cache.clear()  # every round reads its prompts anew
    began = time.perf_counter()
    found = []
    for prompt in prompts:
        output = llm.generate([prompt], params)[0]
        if output.error is not None:
            raise SmeltError(f"a step failed: {output.error}")
        found.append(output.token_ids)
    return time.perf_counter() - began, found


def prompts_of(llm: LLM, texts: Sequence[str]) -> list[Prompt]:
    """As a user's messages where the model has a chat template, else as they are."""
    if llm.tokenizer.chat_template is None:
        return list(texts)
    return [llm.chat_prompt([{"role": "user", "content": text}]) for text in texts]
