"""What a request asks of the sampler and when it wants to stop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError
from .structured import Structured

# A stop string holds back as much text as it is long, and is compared at every token.
MAX_STOP_LENGTH = 1024
MAX_STOPS = 64
MAX_BAD_WORDS = 4096
MAX_BAD_WORD_LENGTH = 1024  # characters or tokens
MAX_LOGPROBS = 20
MAX_CHOICES = 64


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
    presence_penalty: -2 to 2, subtracted from the logit of a token that the answer has already.
    frequency_penalty: -2 to 2, subtracted once for each time the answer has the token (as OpenAI
    defines both: the prompt does not count).
    logit_bias: token id to a number from -100 to 100 that is added to its logit.
    bad_words: strings or lists of token ids that the answer must not contain. A string stands for
    its tokens with and without a space before it; the last token of a sequence is not chosen where
    those before it have just been generated.
    allowed_token_ids: no other token is ever chosen; empty allows all. Name an end token as well,
    otherwise the answer ends by length only.
    typical_p: keep the tokens whose surprise is nearest to the distribution's entropy until their
    probabilities reach it; 1 keeps all (Meister et al. 2022, "Locally typical sampling").
    logprobs: report each chosen token's log probability and so many of the best (0 to 20), of the
    model's own distribution, before any penalty, temperature or filter; None reports nothing.
    prompt_logprobs: the same for each token of the prompt but the first.
    n: answers to return (1 to 64), each with its own random numbers.
    best_of: answers to generate, of which the n with the highest mean log probability are returned;
    None is n.
    structured: what the text has to match, a `Structured`.

    Before the temperature come, in this order: repetition penalty, presence and frequency penalty,
    logit_bias, bad words, allowed tokens, min_tokens, structure. Filters apply in the order
    temperature, top_k, top_p, min_p, typical_p. Tokens tied with the last one kept are kept too, so
    that the outcome does not depend on how a sort breaks ties.
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    bad_words: Sequence[str | Sequence[int]] = ()
    allowed_token_ids: Sequence[int] = ()
    typical_p: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    structured: Structured | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        self._set("stop", stop)
        self._set("stop_token_ids", tuple(self.stop_token_ids or ()))
        self._set("allowed_token_ids", _tuple("allowed_token_ids", self.allowed_token_ids))
        self._set("bad_words", _bad_words(self.bad_words))
        self._set("logit_bias", _logit_bias(self.logit_bias))
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
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), "between -2 and 2", lambda x: -2 <= x <= 2)
        _number("typical_p", self.typical_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                wanted = f"None, or how many of the best to report, 0 to {MAX_LOGPROBS}"
                _integer(name, getattr(self, name), wanted, lambda x: 0 <= x <= MAX_LOGPROBS)
        self._check_stops()
        self._check_choices()
        if self.structured is not None and not isinstance(self.structured, Structured):
            raise UserError(f"structured is {self.structured!r}: give a smelt Structured or None")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `UserError` for a token id that a model of `vocab_size` tokens does not have.

        Strings of bad_words are checked when they are encoded (`encode_bad_words`).
        """
        lists = [word for word in self.bad_words if not isinstance(word, str)]
        named: list[tuple[str, Iterable[int]]] = [
            ("logit_bias", self.logit_bias),
            ("allowed_token_ids", self.allowed_token_ids),
            ("bad_words", [token for word in lists for token in word]),
        ]
        for name, tokens in named:
            if (largest := max(tokens, default=0)) >= vocab_size:
                raise UserError(
                    f"{name} has token id {largest}: the model's vocabulary has {vocab_size} "
                    "tokens, give smaller ids"
                )

    def _check_choices(self) -> None:
        _integer("n", self.n, f"1 to {MAX_CHOICES}", lambda x: 1 <= x <= MAX_CHOICES)
        if self.best_of is not None:
            _integer(
                "best_of",
                self.best_of,
                f"None, or n ({self.n}) to {MAX_CHOICES}",
                lambda x: self.n <= x <= MAX_CHOICES,
            )
        if (self.best_of or self.n) > 1 and self.greedy:
            # Every answer would be the same one.
            name = "n" if self.best_of in (None, 1) else "best_of"
            raise UserError(
                f"{name} is {getattr(self, name)} and temperature 0, which gives one answer only: "
                "give a temperature above 0"
            )

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
    def samples(self) -> int:
        """How many answers are generated, of which `n` are returned."""
        return max(self.n, self.best_of or 1)

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


def _tuple(name: str, tokens: Any) -> tuple[int, ...]:
    """Token ids as a tuple; `name` stands in the error."""
    if tokens is None:
        return ()
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
        raise UserError(f"{name} is {tokens!r}: give a list of token ids")
    found = tuple(tokens)
    for token in found:
        _integer(name, token, "token ids of 0 or more", lambda x: x >= 0)
    return found


def _bad_words(words: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(words, str) or not isinstance(words or (), Iterable):
        raise UserError(f"bad_words is {words!r}: give a list of strings or of lists of token ids")
    words = tuple(words or ())
    if len(words) > MAX_BAD_WORDS:
        raise UserError(f"bad_words has {len(words)} entries, at most {MAX_BAD_WORDS} are taken")
    found = []
    for word in words:
        word = word if isinstance(word, str) else _tuple("bad_words", word)
        if not (word.strip() if isinstance(word, str) else word):
            raise UserError("bad_words has an empty entry: leave it out")
        if len(word) > MAX_BAD_WORD_LENGTH:
            raise UserError(
                f"an entry of bad_words has length {len(word)}, "
                f"at most {MAX_BAD_WORD_LENGTH} is taken"
            )
        found.append(word)
    return tuple(found)


def _logit_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias or {}, Mapping):
        raise UserError(f"logit_bias is {bias!r}: give a mapping of token ids to numbers")
    found = dict(bias or {})
    for token, value in found.items():
        _integer("a key of logit_bias", token, "token ids of 0 or more", lambda x: x >= 0)
        name = f"logit_bias of token {token}"
        _number(name, value, "between -100 and 100", lambda x: -100 <= x <= 100)
    return found
