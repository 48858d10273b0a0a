"""What changes a row's logits before the temperature: penalties, biases, and what is not allowed.

Where a request needs something of the size of the vocabulary, it is kept with the request and only
follows the tokens that are new; a step then adds the kept rows to the logits in one operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from .errors import UserError
from .filters import NO_VALUE
from .masks import Prepared, prepare
from .sampling_params import SamplingParams
from .transfer import send

if TYPE_CHECKING:
    from .sampler import Row


@runtime_checkable
class Encoder(Protocol):
    """What strings of `bad_words` need of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""


def encode_bad_words(
    words: Sequence[str | Sequence[int]], tokenizer: object, vocab_size: int | None = None
) -> list[list[int]]:
    """Token ids of each bad word: a string's with and without a space before it, lists as they are.

    `UserError` if there are strings and the tokenizer cannot encode (or is None), or if a string
    has a token that a model of `vocab_size` tokens lacks.
    """
    found: list[list[int]] = []
    for word in words:
        if not isinstance(word, str):
            found.append(list(word))
            continue
        if not isinstance(tokenizer, Encoder):
            raise UserError(
                f"bad_words has the string {word!r}: give a tokenizer to the engine, or token ids"
            )
        for text in (word.lstrip(), " " + word.lstrip()):
            tokens = tokenizer.encode(text, add_special_tokens=False)
            if not tokens:
                raise UserError(f"bad_words: {word!r} has no tokens, leave it out")
            if vocab_size is not None and max(tokens) >= vocab_size:
                raise UserError(
                    f"bad_words: {word!r} has token id {max(tokens)}, "
                    f"and the model's vocabulary has {vocab_size}: leave it out"
                )
            found.append(tokens)
    return [list(word) for word in dict.fromkeys(map(tuple, found))]


class Seen:
    """bool [V]: which tokens a history has, kept while it grows."""

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None
        self._marked = 0

    def row(
        self, history: list[int], draft: Sequence[int], vocab_size: int, device: torch.device
    ) -> torch.Tensor:
        """bool [V] for `history`, a list that only grows from call to call, and `draft`."""
        if self._seen is None:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        if self._marked < len(history):
            self._seen[_inside(history[self._marked :], vocab_size, device)] = True
            self._marked = len(history)
        if not draft:
            return self._seen
        seen = self._seen.clone()
        seen[_inside(draft, vocab_size, device)] = True
        return seen


class Shift:
    """float32 [V] that is added to a request's logits, kept while its answer grows.

    Presence and frequency penalty, logit_bias, single bad tokens and allowed tokens are all sums
    (what is not allowed adds minus infinity), so one row holds them.
    """

    def __init__(self, params: SamplingParams, prompt_length: int, banned: Iterable[int]) -> None:
        self._params = params
        self._banned = list(banned)
        self._counted = prompt_length
        self._penalised = params.presence_penalty != 0 or params.frequency_penalty != 0
        self._fixed: torch.Tensor | None = None  # what does not depend on the answer
        self._shift: torch.Tensor | None = None
        self._counts: Counter[int] = Counter()

    @classmethod
    def of(cls, params: SamplingParams, prompt_length: int, banned: list[int]) -> Shift | None:
        """None where there is nothing to add."""
        sums = (params.presence_penalty, params.frequency_penalty, params.logit_bias)
        if not any(sums) and not banned and not params.allowed_token_ids:
            return None
        return cls(params, prompt_length, banned)

    def row(
        self, history: list[int], draft: Sequence[int], vocab_size: int, device: torch.device
    ) -> torch.Tensor:
        """float32 [V] for `history`, a list that only grows from call to call, and `draft`."""
        if self._fixed is None or self._shift is None:
            self._fixed = self._start(vocab_size, device)
            self._shift = self._fixed.clone() if self._penalised else self._fixed
        if not self._penalised:
            return self._shift
        if self._counted < len(history):
            new = history[self._counted :]
            self._counts.update(new)
            self._counted = len(history)
            self._set(self._shift, {token: self._counts[token] for token in new})
        if not draft:
            return self._shift
        shift = self._shift.clone()
        counts = Counter(draft)
        self._set(shift, {token: n + self._counts[token] for token, n in counts.items()})
        return shift

    def _start(self, vocab_size: int, device: torch.device) -> torch.Tensor:
        params = self._params
        fixed = torch.zeros(vocab_size, device=device)
        if params.logit_bias:
            tokens = _inside(params.logit_bias, vocab_size, device)
            values = [v for t, v in params.logit_bias.items() if t < vocab_size]
            fixed[tokens] = send(values, torch.float32, device)
        if params.allowed_token_ids:
            excluded = torch.ones(vocab_size, dtype=torch.bool, device=device)
            excluded[_inside(params.allowed_token_ids, vocab_size, device)] = False
            fixed[excluded] = NO_VALUE
        fixed[_inside(self._banned, vocab_size, device)] = NO_VALUE
        return fixed

    def _set(self, shift: torch.Tensor, counts: dict[int, int]) -> None:
        """Write the entries of tokens that the answer has so many times, each at least once."""
        assert self._fixed is not None
        params = self._params
        counts = {token: n for token, n in counts.items() if token < len(shift)}
        tokens = send(list(counts), torch.int64, shift.device)
        penalty = [params.presence_penalty + params.frequency_penalty * n for n in counts.values()]
        shift[tokens] = self._fixed[tokens] - send(penalty, torch.float32, shift.device)


class BadWords:
    """Sequences of two or more tokens that must not come; found by the token before the last."""

    def __init__(self, words: Iterable[Sequence[int]]) -> None:
        self._by_end: dict[int, list[tuple[list[int], int]]] = {}
        for word in words:
            if len(word) > 1:
                *prefix, last = word
                self._by_end.setdefault(prefix[-1], []).append((prefix, last))
        lengths = (len(p) for words in self._by_end.values() for p, _ in words)
        self._longest = max(lengths, default=0)

    def next(self, history: list[int], draft: Sequence[int]) -> list[int]:
        """Tokens that would complete a word behind history and draft."""
        before = draft[-1] if draft else history[-1] if history else -1
        words = self._by_end.get(before)
        if words is None:
            return []
        tail = [*history[-self._longest :], *draft][-self._longest :]
        return [last for prefix, last in words if tail[-len(prefix) :] == prefix]


def process(
    logits: torch.Tensor, rows: Sequence[Row], prepared: Prepared | None = None
) -> torch.Tensor:
    """Scores [R, V] in float32: logits after everything that comes before the temperature.

    logits [R, V] of any float dtype, left as they are; the result may be the same tensor where
    nothing changes it. prepared: of the same rows; without it, grammar masks are made here. Minus
    infinity stands for what is not allowed.
    """
    if not any(row.state.processed for row in rows):
        return logits.float()
    scores = logits.to(torch.float32, copy=True)
    _penalise(scores, rows)
    _add(scores, rows)
    _forbid(scores, rows)
    if any(row.state.matcher is not None for row in rows):
        if prepared is None:
            prepared = prepare(rows, scores.shape[1], scores.device)
        prepared.apply(scores)
    return scores


def _penalise(scores: torch.Tensor, rows: Sequence[Row]) -> None:
    """Repetition penalty (Keskar et al. 2019, "CTRL"), of prompt and answer."""
    chosen = [(i, row, row.state.seen) for i, row in enumerate(rows) if row.state.seen]
    if not chosen:
        return
    size, device = scores.shape[1], scores.device
    seen = torch.stack([s.row(row.history, row.draft, size, device) for _, row, s in chosen])
    factors = [row.state.params.repetition_penalty for _, row, _ in chosen]
    penalty = send(factors, torch.float32, device)
    index = send([i for i, _, _ in chosen], torch.int64, device)
    found = scores[index]
    changed = torch.where(found < 0, found * penalty[:, None], found / penalty[:, None])
    scores[index] = torch.where(seen, changed, found)


def _add(scores: torch.Tensor, rows: Sequence[Row]) -> None:
    chosen = [(i, row, row.state.shift) for i, row in enumerate(rows) if row.state.shift]
    if not chosen:
        return
    size, device = scores.shape[1], scores.device
    shifts = torch.stack([s.row(row.history, row.draft, size, device) for _, row, s in chosen])
    if len(chosen) == len(rows):
        scores += shifts
    else:
        scores[send([i for i, _, _ in chosen], torch.int64, device)] += shifts


def _forbid(scores: torch.Tensor, rows: Sequence[Row]) -> None:
    """Tokens that would complete a bad word, and end tokens before `min_tokens`."""
    places: list[int] = []
    tokens: list[int] = []
    for i, row in enumerate(rows):
        state = row.state
        banned = state.bad_words.next(row.history, row.draft) if state.bad_words else []
        # A grammar may have nothing left but its end: its mask decides (masks.py).
        if state.matcher is None and row.early:
            banned = [*banned, *state.ends]
        banned = [token for token in banned if token < scores.shape[1]]
        places += [i] * len(banned)
        tokens += banned
    if places:
        where, what = (send(each, torch.int64, scores.device) for each in (places, tokens))
        scores[where, what] = NO_VALUE


def _inside(tokens: Iterable[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """int64: those of the token ids that the vocabulary has."""
    found = [token for token in tokens if token < vocab_size]
    return send(found, torch.int64, device)
