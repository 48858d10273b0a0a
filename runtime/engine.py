"""The engine: requests in, tokens out, one packed step at a time.

Synchronous and for one thread: `add_request`, then `step` until nothing is left. Which tokens a
step computes is the scheduler's decision, which token follows the sampler's; here they meet the
compiled program and its caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .batch import Batch, BatchLayout, CacheSpec
from .batch_builder import BatchBuilder
from .blocks import PagedMemory
from .detokenizer import Decoder, TextStream
from .errors import SmeltError, UserError
from .kv_cache import allocate_cache, cache_blocks
from .processors import encode_bad_words
from .sampler import Row, SamplerState, sample
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .sequence import Chunk, Session, StepOutput
from .sequence import Sequence as Request


class StepProgram(Protocol):
    """A compiled step: packed tokens in, logits out, caches changed in place."""

    spec: CacheSpec
    layout: BatchLayout
    vocab_size: int
    device: torch.device

    def run(self, batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
        """Logits [R, V] of `batch.logits_rows`, of any float dtype."""


@dataclass
class Metrics:
    """Counters since the engine was made. Tokens: computed prompt, found in a cache, generated."""

    steps: int = 0
    prefilled_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    running: int = 0
    waiting: int = 0
    blocks: int = 0
    free_blocks: int = 0


class Engine:
    """Runs many requests at once over one program and one paged cache.

    tokenizer: for text and stop strings; without one, outputs have token ids only.
    eos_token_ids: ids that end an answer. max_position: the model's context, if it is shorter than
    the graph's. blocks: cache blocks, otherwise from `kv_cache_tokens` or `kv_cache_fraction`.
    """

    def __init__(
        self,
        program: StepProgram,
        *,
        tokenizer: Decoder | None = None,
        eos_token_ids: Iterable[int] = (),
        max_position: int | None = None,
        blocks: int | None = None,
        kv_cache_tokens: int | None = None,
        kv_cache_fraction: float | None = None,
    ) -> None:
        self.program = program
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        spec, layout = program.spec, program.layout
        if blocks is None:
            blocks = cache_blocks(
                spec,
                layout,
                program.device,
                tokens=kv_cache_tokens,
                fraction=kv_cache_fraction,
            )
        windows = [group.window for group in spec.groups]
        self.memory = PagedMemory(blocks, spec.block_size, windows)
        self.caches = allocate_cache(spec, blocks, program.device)
        running = min(layout.max_sequences, layout.max_rows)
        self.scheduler = Scheduler(self.memory, layout.max_tokens, running)
        self.builder = BatchBuilder(spec, layout, program.device, self.scheduler.max_running)
        self.context = min(layout.max_position, max_position or layout.max_position)
        self._metrics = Metrics(blocks=blocks)
        self._requests: dict[int, Request] = {}
        self._ended: list[StepOutput] = []
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to report."""
        return bool(self._requests or self._ended)

    @property
    def capacity(self) -> int:
        """Most tokens a request may have, prompt and answer: by context, graph and cache."""
        graph = self.program.layout.max_blocks * self.program.spec.block_size
        return min(self.context, graph, self.memory.capacity)

    @property
    def metrics(self) -> Metrics:
        """Counters and the present state of queue and cache."""
        metrics = self._metrics
        metrics.running = len(self.scheduler.running)
        metrics.waiting = len(self.scheduler.waiting)
        metrics.preemptions = self.scheduler.preemptions
        metrics.free_blocks = self.memory.free
        return metrics

    def open_session(self) -> Session:
        """A conversation whose cache is kept between requests (`add_request(session=...)`)."""
        return Session()

    def close_session(self, session: Session) -> None:
        """Give the blocks of a session back."""
        self.scheduler.sessions.drop(session)

    def add_request(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        session: Session | None = None,
    ) -> int:
        """Queue a prompt and return the request's id; `UserError` if it can never run.

        session: reuse the longest common prefix with what the session has in the cache.
        """
        params = params or SamplingParams()
        prompt = list(token_ids)
        self._check_prompt(prompt)
        if params.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer: give one to the engine, or token ids")
        if session is not None and session.busy:
            raise UserError("this session still runs a request: wait for it, or abort it")
        limit = self.capacity
        if params.max_tokens is not None:
            limit = min(limit, len(prompt) + params.max_tokens)
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self.eos_token_ids
        request = Request(self._next_id, prompt, params, limit, ends, session=session)
        params.check_vocabulary(self.program.vocab_size)
        bad_words = encode_bad_words(params.bad_words, self.tokenizer, self.program.vocab_size)
        request.sampler = SamplerState(params, len(prompt), ends, bad_words=bad_words)
        if self.tokenizer is not None:
            request.text = TextStream(self.tokenizer, params.stop)
        self._next_id += 1
        self.scheduler.add(request)
        self._requests[request.id] = request
        if session is not None:
            session.busy = True
        return request.id

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise UserError("the prompt has no tokens: give some text")
        if min(prompt) < 0 or max(prompt) >= self.program.vocab_size:
            wrong = next(t for t in prompt if not 0 <= t < self.program.vocab_size)
            raise UserError(
                f"token id {wrong} is outside the model's vocabulary of {self.program.vocab_size}"
            )
        if len(prompt) >= self.context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the model's context is {self.context}: "
                "shorten the prompt, so that an answer fits behind it"
            )
        if len(prompt) >= self.capacity:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the KV cache holds {self.capacity}: "
                "shorten the prompt, or raise --kv-cache-tokens"
            )

    def abort(self, request_id: int) -> None:
        """End a request now; its last output (finish reason "abort") comes with the next step."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, "abort")

    def step(self) -> list[StepOutput]:
        """Compute one step; one output for each request that got a token or ended."""
        chunks = self.scheduler.plan()
        outputs, self._ended = self._ended, []
        if not chunks:
            return outputs
        try:
            logits = self.program.run(self.builder.build(chunks), self.caches)
            self.scheduler.commit(chunks)
            self._count(chunks)
            sampled = [c for c in chunks if c.rows]
            tokens = self._sample(sampled, logits) if sampled else []
        except Exception as error:  # reported with every request of the step
            for chunk in chunks:
                self._end(chunk.sequence, "error", error)
            outputs += self._ended
            self._ended = []
            return outputs
        for chunk, token in zip(sampled, tokens, strict=True):
            outputs.append(self._advance(chunk.sequence, token))
        return outputs

    def _count(self, chunks: list[Chunk]) -> None:
        metrics = self._metrics
        metrics.steps += 1
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.start < sequence.prompt_length:
                metrics.prefilled_tokens += chunk.count
            if sequence.reused and chunk.start == sequence.reused:
                metrics.reused_tokens += sequence.reused

    def _sample(self, chunks: list[Chunk], logits: torch.Tensor) -> list[int | None]:
        rows = []
        for chunk in chunks:
            assert chunk.sequence.sampler is not None
            rows.append(Row(chunk.sequence.sampler, chunk.sequence.tokens))
        tokens = sample(logits, rows)
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.state.accept((token,))
        return tokens

    def _advance(self, request: Request, token: int | None) -> StepOutput:
        """Take a sampled token in: text, stop conditions, and the end if there is one."""
        if token is None:
            error = SmeltError(
                f"request {request.id}: the logits after token {len(request.tokens)} are NaN or "
                "all excluded; try --check-numerics when compiling, or another --dtype"
            )
            return self._finished(request, [], "", "error", error)
        request.tokens.append(token)
        self._metrics.generated_tokens += 1
        armed = request.generated >= request.params.min_tokens
        if token in request.end_tokens and armed:
            return self._finished(request, [token], "", "stop")
        piece = ""
        if request.text is not None:
            piece, stopped = request.text.push(token, armed)
            if stopped:
                return self._finished(request, [token], piece, "stop", flush=False)
        if len(request.tokens) >= request.limit:
            return self._finished(request, [token], piece, "length")
        return StepOutput(request.id, [token], piece, reused_tokens=request.reused)

    def _finished(
        self,
        request: Request,
        tokens: list[int],
        piece: str,
        reason: str,
        error: Exception | None = None,
        *,
        flush: bool = True,
    ) -> StepOutput:
        """Release a request's cache; `flush` adds the text that was still held back."""
        if flush and request.text is not None:
            rest, stopped = request.text.finish()
            piece += rest
            if stopped and reason == "length":
                reason = "stop"
        request.finish_reason = reason
        del self._requests[request.id]
        self.scheduler.finish(request, keep=reason != "error")
        if request.session is not None:
            request.session.busy = False
        return StepOutput(request.id, tokens, piece, reason, error, request.reused)

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        self._ended.append(self._finished(request, [], "", reason, error))

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if a cache block is lost or counted wrongly (tests, soak)."""
        owners = [request.tables for request in self.scheduler.running]
        self.memory.check_integrity([*owners, *self.scheduler.sessions.tables()])
