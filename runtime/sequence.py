"""One sequence while it runs, what a step computes of it, and what it reports. No torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .blocks import BlockTable
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .detokenizer import TextStream
    from .prefix_cache import Node
    from .sampler import SamplerState


@dataclass(eq=False)
class Sequence:
    """One answer under way: its tokens, how many of them are in the cache, and where.

    id: of the request; index: which of its samples; tokens: prompt, then what was generated;
    computed: the first so many are in the cache; limit: most tokens it may reach, prompt included;
    lane: its row in per-sequence arrays while it runs, otherwise -1; reused: prompt tokens that
    were in the cache already. arrival, deadline: seconds of the scheduler's clock; priority: less
    goes first; salt: requests of different salts share no cache; level, served: of the policy.
    regime: which rotary factors its cached keys have (`LengthScaling.regime`).
    fresh: every prompt token must be computed (their log probabilities are wanted). draft:
    proposed tokens to verify in the next step; parents: of each the index of the one before it,
    -1 for the last known token; None for a chain. logprobs: whether those of its tokens are wanted;
    prompt_logprobs: those found so far, None if they are not wanted. added, last: when the request
    came and its newest token, in seconds. entered: the scheduler has it.
    """

    id: int
    tokens: list[int]
    params: SamplingParams
    limit: int
    end_tokens: frozenset[int] = frozenset()
    index: int = 0
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None
    salt: Hashable = None
    regime: int = 0
    fresh: bool = False
    tables: list[BlockTable] = field(default_factory=list)
    node: Node | None = None
    cached_blocks: int = 0
    prompt_length: int = 0
    computed: int = 0
    reused: int = 0
    preempted: int = 0
    lane: int = -1
    level: int = 0
    served: int = 0
    queued: float = 0.0
    draft: list[int] = field(default_factory=list)
    parents: list[int] | None = None
    logprobs: bool = False
    prompt_logprobs: list[Any] | None = None
    added: float = 0.0
    last: float = 0.0
    entered: bool = False
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

    rows: of how many of them, counted from the last, the logits are wanted. draft: the last of
    the tokens, which are proposals and not the sequence's yet; parents: as in `Sequence`.
    """

    sequence: Sequence
    start: int
    count: int
    rows: int
    draft: list[int] = field(default_factory=list)
    parents: list[int] | None = None

    @property
    def known(self) -> int:
        """How many of the tokens are the sequence's own."""
        return self.count - len(self.draft)


@dataclass
class StepOutput:
    """What one step gave a sequence: new token ids, text that is now final, and why it ended.

    index: which sample of the request. finish_reason: None while it runs, else "stop" (end token,
    stop string, end of a grammar), "length", "abort", "timeout" or "error" (then `error` holds
    what happened). reused_tokens: of the prompt, found in the cache. logprobs: one entry a token
    where they were asked for; prompt_logprobs: one a prompt token but the first, with the first
    output. silent_end: whether the last token is an end token, which is no text.
    """

    id: int
    token_ids: list[int]
    text: str
    finish_reason: str | None = None
    error: Exception | None = None
    reused_tokens: int = 0
    index: int = 0
    logprobs: list[Any] | None = None
    prompt_logprobs: list[Any] | None = None
    silent_end: bool = False
