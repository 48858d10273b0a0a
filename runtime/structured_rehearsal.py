"""A few answers under a new grammar, before any request uses it.

An ambiguous grammar can compile at once and then need seconds for a mask, more with each token; by
then it would hold up every request of the engine. So the compiling process goes first.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection

from .errors import UserError

STEPS = 64
ANSWERS = 2
SLOWEST = 0.02  # seconds of processor time a step, in the later half


def rehearse(
    start: Callable[[], tuple[Callable[[], bytes], Callable[[int], bool]]],
    ends: Collection[int],
) -> None:
    """Take random tokens; `UserError` if steps are slow, a limit is hit or nothing is allowed.

    start: gives a new answer's `fill`, the packed mask as bytes, and `accept`.
    """
    for seed in range(ANSWERS):
        rng = random.Random(seed)
        fill, accept = start()
        spent = 0.0
        for step in range(STEPS):
            before = time.process_time()
            token = _pick(fill(), ends, rng)
            if token is None:
                if step == 0 and seed == 0:
                    _check_not_empty(fill(), ends)
                break
            if not accept(token):
                raise UserError(f"it exceeds the library's limits after {step + 1} tokens")
            if step >= STEPS // 2:
                spent += time.process_time() - before
        mean = spent / (STEPS // 2)
        if mean > SLOWEST:
            raise UserError(f"it takes {mean * 1e3:.0f} ms a token, too ambiguous to follow")


def _pick(mask: bytes, ends: Collection[int], rng: random.Random) -> int | None:
    """Any allowed token that does not end the answer."""
    places = [place for place, byte in enumerate(mask) if byte]
    rng.shuffle(places)
    for place in places:
        found = [8 * place + bit for bit in range(8) if mask[place] >> bit & 1]
        found = [token for token in found if token not in ends]
        if found:
            return rng.choice(found)
    return None


def _check_not_empty(mask: bytes, ends: Collection[int]) -> None:
    if not any(mask[end // 8] >> end % 8 & 1 for end in ends):
        raise UserError("nothing matches it")
