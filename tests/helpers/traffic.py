"""Random requests that come while others run, some of them aborted, and what became of each."""

from __future__ import annotations

import random
from typing import Any

from smelt.runtime.engine import Engine
from smelt.runtime.sampling_params import SamplingParams

Key = tuple[int, int]
Found = dict[Key, tuple[list[int], str]]


class Plan:
    """Requests, when they come (in tokens that all have got by then), and when they are aborted."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        trunk = [rng.randrange(97) for _ in range(24)]
        self.requests = []
        for _ in range(rng.randint(1, 9)):
            prompt = trunk[: rng.choice((0, 4, 11, 24))]
            prompt = prompt + [rng.randrange(97) for _ in range(rng.randint(1, 9))]
            params: dict[str, Any] = {
                "max_tokens": rng.choice((1, 2, 5, 12)),
                "ignore_eos": rng.random() < 0.5,
                "seed": rng.randrange(9),
            }
            if rng.random() < 0.5:
                params |= rng.choice(
                    (
                        {"temperature": 0.8, "n": 3},
                        {"temperature": 1.2, "top_k": 9},
                        {"temperature": 1.0, "top_p": 0.7, "min_p": 0.02},
                        {"temperature": 1.0, "typical_p": 0.8},
                    )
                )
            if rng.random() < 0.3:
                params |= rng.choice(
                    (
                        {"repetition_penalty": 1.4},
                        {"presence_penalty": 0.9, "frequency_penalty": 0.4},
                        {"min_tokens": 1, "bad_words": [[3], [5, 6]]},
                        {"logprobs": 2},
                        {"prompt_logprobs": 1},
                    )
                )
            came = rng.choice((0, 0, rng.randint(0, 40)))
            aborted = rng.randint(0, 6) if rng.random() < 0.2 else None
            self.requests.append((prompt, params, came, aborted))


def drive(engine: Engine, plan: Plan, scores: dict[Key, Any] | None = None) -> Found:
    """Every answer's tokens and why it ended."""
    waiting = sorted(enumerate(plan.requests), key=lambda r: r[1][2])
    found: Found = {}
    mine: dict[int, int] = {}
    total = 0
    while waiting or engine.has_work:
        while waiting and (waiting[0][1][2] <= total or not engine.has_work):
            index, (prompt, params, _, _) = waiting.pop(0)
            mine[engine.add_request(prompt, SamplingParams(**params))] = index
        for output in engine.step():
            assert output.error is None
            key = (mine[output.id], output.index)
            tokens, _ = found.get(key, ([], ""))
            found[key] = ([*tokens, *output.token_ids], output.finish_reason or "")
            if scores is not None and output.logprobs is not None:
                scores.setdefault(key, []).extend(output.logprobs)
            total += len(output.token_ids)
        for number, index in list(mine.items()):
            aborted = plan.requests[index][3]
            if aborted is not None and len(found.get((index, 0), ([], ""))[0]) >= aborted:
                engine.abort(number)
        engine.check_integrity()
    return found


def tidy(engine: Engine) -> None:
    """Nothing is left, and every block comes back."""
    assert engine.metrics.running == engine.metrics.waiting == 0
    engine.check_integrity()
    engine.scheduler.cache.clear()
    assert engine.memory.free == engine.memory.pools[0].size


def settled(found: Found, plan: Plan) -> Found:
    """Without the answers whose number of tokens depends on when the abort came."""
    return {key: value for key, value in found.items() if plan.requests[key[0]][3] is None}
