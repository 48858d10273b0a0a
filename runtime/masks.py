"""Which tokens a request's grammar allows, worked out while the model computes the logits.

A mask is packed, one bit a token as the grammar libraries fill it: int32 [ceil(V / 32)], lowest bit
first. Each request's masks are filled by one job of a thread pool; the libraries release the
interpreter's lock, and the step needs it only to start.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch

from .bitmask import set_bits
from .filters import NO_VALUE
from .transfer import send

if TYPE_CHECKING:
    from .sampler import Row


class Matcher(Protocol):
    """Where one answer stands in its grammar. Used by one thread at a time.

    error: what went wrong, None while all is well.
    """

    error: str | None

    @property
    def finished(self) -> bool:
        """Whether an end token was accepted, or nothing at all may follow."""

    def fill(self, mask: torch.Tensor, draft: Sequence[int] = ()) -> bool:
        """Write what may follow the accepted tokens and then `draft`; the state stays as it was.

        mask: int32 [ceil(V / 32)] on the CPU, contiguous; end tokens are set exactly where the
        grammar may end. False where the draft does not match (the mask is then of no meaning) or
        after an `error`.
        """

    def accept(self, tokens: Sequence[int]) -> bool:
        """Move over tokens that were taken, end tokens included; False where they do not match."""


class Prepared:
    """Masks of the rows that have a grammar; `apply` waits for them. Made by `prepare`."""

    def __init__(
        self, rows: list[int], masks: torch.Tensor | None, jobs: Sequence[Future[None]]
    ) -> None:
        self._rows = rows
        self._masks = masks
        self._jobs = jobs

    def wait(self) -> None:
        """Return when all masks are there."""
        for job in self._jobs:
            job.result()
        self._jobs = ()

    def apply(self, scores: torch.Tensor) -> None:
        """Set what the grammars do not allow to minus infinity. scores float32 [R, V], in place."""
        self.wait()
        if self._masks is None:
            return
        packed = self._masks.to(scores.device, non_blocking=True)
        allowed = unpack(packed, scores.shape[1])
        if len(self._rows) == len(scores):
            scores.masked_fill_(~allowed, NO_VALUE)
        else:
            rows = send(self._rows, torch.int64, scores.device)
            scores[rows] = scores[rows].masked_fill(~allowed, NO_VALUE)


NOTHING = Prepared([], None, ())


def prepare(rows: Sequence[Row], vocab_size: int, device: torch.device) -> Prepared:
    """Start what can be done before the logits exist; call it before the model runs.

    The rows of a call are those of the step's logits in the same order. Until the result is waited
    for, by `sample` or `process`, none of its requests may `accept`.
    """
    if not any(row.state.matcher is not None for row in rows):
        return NOTHING
    chosen = [i for i, row in enumerate(rows) if row.state.matcher is not None]
    width = (vocab_size + 31) // 32
    pinned = device.type == "cuda"
    masks = torch.full((len(chosen), width), -1, dtype=torch.int32, pin_memory=pinned)
    # Rows of one request share a matcher, which only one thread may move.
    requests: dict[int, list[tuple[Row, torch.Tensor]]] = {}
    for place, i in enumerate(chosen):
        requests.setdefault(id(rows[i].state), []).append((rows[i], masks[place]))
    return Prepared(chosen, masks, [_pool().submit(_fill, jobs) for jobs in requests.values()])


@cache
def _pool() -> ThreadPoolExecutor:
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    return ThreadPoolExecutor(workers, thread_name_prefix="smelt-grammar")


def _fill(jobs: list[tuple[Row, torch.Tensor]]) -> None:
    for row, mask in jobs:
        matcher = row.state.matcher
        assert matcher is not None
        if not matcher.fill(mask, row.draft):
            # Behind a draft that does not match, the row is never used: the draft was rejected. Of
            # a matcher in error nothing is allowed, and the row reports that nothing can be chosen.
            mask.fill_(0 if matcher.error else -1)
        elif row.early:
            _hold_ends(mask, row.state.ends)


def _hold_ends(mask: torch.Tensor, ends: Sequence[int]) -> None:
    """Take end tokens out, unless the grammar has nothing left but its end."""
    held = mask.clone()
    set_bits(held, ends, False)
    if held.any():
        mask.copy_(held)


def unpack(masks: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """bool [G, V] of int32 masks [G, ceil(V / 32)]."""
    packed = masks.contiguous().view(torch.uint8)
    # A table of bytes is three times as fast as shifting each bit into place.
    bits = _table(str(masks.device))[packed.long()]
    return bits.view(len(masks), -1)[:, :vocab_size]


@cache
def _table(device: str) -> torch.Tensor:
    """bool [256, 8]: the bits of each byte, lowest first."""
    values = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return (values & 1).bool()
