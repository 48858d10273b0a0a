"""What a request asks of the sampler and when it wants to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UserError

# A stop string holds back as much text as it is long, and is compared at every token.
MAX_STOP_LENGTH = 1024
MAX_STOPS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; wrong values raise `UserError`, one line each.

    temperature: 0 takes the most likely token (greedy), otherwise logits are divided by it.
    top_p: keep the smallest set of most likely tokens whose probabilities reach it; 1 keeps all.
    top_k: keep the k most likely tokens; 0 keeps all.
    min_p: drop tokens less likely than min_p times the most likely one; 0 drops none.
    repetition_penalty: above 1 makes tokens of the prompt and the answer less likely; 1 is none.
    seed: the same seed gives the same tokens, whatever else runs in the batch; None is random.
    max_tokens: most tokens to generate; None means up to the end of the context.
    stop: strings that end the answer and are not part of it (a single string is taken as one).
    stop_token_ids: further token ids that end the answer, beside the model's own end tokens.
    ignore_eos: do not end at the model's end tokens (`stop_token_ids` still end it).
    min_tokens: no end token and no stop string takes effect before so many tokens.

    Filters apply in the order penalty, temperature, top_k, top_p, min_p. Tokens tied with the last
    one kept are kept too, so that the outcome does not depend on how a sort breaks ties.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 64
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _number("temperature", self.temperature, "0 (greedy) or more", lambda x: x >= 0)
        _number("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        _number("min_p", self.min_p, "between 0 and 1", lambda x: 0 <= x <= 1)
        _number("repetition_penalty", self.repetition_penalty, "above 0", lambda x: x > 0)
        _integer("top_k", self.top_k, "0 (off) or more", lambda x: x >= 0)
        _integer("min_tokens", self.min_tokens, "0 or more", lambda x: x >= 0)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, "1 or more", lambda x: x >= 1)
            if self.min_tokens > self.max_tokens:
                raise UserError(
                    f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}: "
                    "give a min_tokens of at most max_tokens"
                )
        if self.seed is not None:
            _integer("seed", self.seed, "0 or more", lambda x: x >= 0)
        self._check_stops()

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOPS:
            raise UserError(f"stop has {len(self.stop)} strings, at most {MAX_STOPS} are taken")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UserError(f"stop holds {text!r}: give strings of one character or more")
            if len(text) > MAX_STOP_LENGTH:
                raise UserError(
                    f"a stop string has {len(text)} characters, at most {MAX_STOP_LENGTH} are taken"
                )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, "token ids of 0 or more", lambda x: x >= 0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _number(name: str, value: Any, wanted: str, fits: Any) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not fits(value):
        raise UserError(f"{name} is {value!r}: give a number that is {wanted}")


def _integer(name: str, value: Any, wanted: str, fits: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not fits(value):
        raise UserError(f"{name} is {value!r}: give {wanted}")
