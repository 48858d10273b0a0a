"""One request while it runs, a cache kept between requests, and what a step reports. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .blocks import BlockTable
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .detokenizer import TextStream
    from .sampler import SamplerState


class Session:
    """A conversation whose cache is kept between its requests, one request at a time.

    tokens: what the kept cache holds, empty while a request runs or after blocks ran out.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.busy = False


@dataclass(eq=False)
class Sequence:
    """A request: its tokens, how many of them are in the cache, and where.

    tokens: prompt, then what was generated; computed: the first so many are in the cache;
    limit: most tokens it may reach, prompt included; lane: its row in per-sequence arrays while
    it runs, otherwise -1; reused: prompt tokens that were in the cache already.
    """

    id: int
    tokens: list[int]
    params: SamplingParams
    limit: int
    end_tokens: frozenset[int] = frozenset()
    tables: list[BlockTable] = field(default_factory=list)
    session: Session | None = None
    prompt_length: int = 0
    computed: int = 0
    reused: int = 0
    preempted: int = 0
    lane: int = -1
    finish_reason: str | None = None
    sampler: SamplerState | None = None
    text: TextStream | None = None

    def __post_init__(self) -> None:
        self.prompt_length = self.prompt_length or len(self.tokens)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens known but not yet in the cache; at least 1 while it runs, 1 while it decodes."""
        return len(self.tokens) - self.computed


@dataclass
class Chunk:
    """`count` tokens of a sequence from position `start`, computed in this step.

    rows: of how many of them, counted from the last, the logits are wanted.
    """

    sequence: Sequence
    start: int
    count: int
    rows: int


@dataclass
class StepOutput:
    """What one step gave a request: new token ids, text that is now final, and why it ended.

    finish_reason: None while it runs, else "stop" (end token, stop string), "length", "abort" or
    "error" (then `error` holds what happened). reused_tokens: of the prompt, found in the cache.
    """

    id: int
    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    error: Exception | None = None
    reused_tokens: int = 0
