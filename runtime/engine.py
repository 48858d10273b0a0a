"""The engine: requests in, tokens out, one packed step at a time.

Synchronous and for one thread: `add_request`, then `step` until nothing is left. Which tokens a
step computes is the scheduler's decision, which token follows the sampler's; here they meet the
compiled program and its caches.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any

import torch

from .ahead import Ahead
from .batch_builder import BatchBuilder
from .blocks import PagedMemory
from .cache_moves import copy_blocks, move_slots
from .cuda_graphs import GraphedProgram, with_graphs
from .detokenizer import Decoder
from .engine_options import DETERMINISTIC_TOKENS, EngineOptions, StepProgram
from .errors import SmeltError, UserError
from .filters import warm_up
from .kv_cache import allocate_cache, cache_blocks
from .logprobs import keep_prompt_logprobs
from .metrics import Metrics
from .requests import RequestFactory
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .selection import Selection
from .sequence import Chunk, StepOutput
from .sequence import Sequence as Sample
from .speculation.heads import check_features
from .speculation.speculator import Speculator
from .speculation.verify import Taken, slots_to_move

if TYPE_CHECKING:
    from .structured_compiler import CompiledGrammar


class Engine:
    """Runs many requests at once over one program and one paged cache.

    tokenizer: for text and stop strings; without one, outputs have token ids only.
    eos_token_ids: ids that end an answer. max_position: the model's context, if it is shorter than
    the graph's. options, or their fields by name: `EngineOptions`.
    """

    def __init__(
        self,
        program: StepProgram,
        *,
        tokenizer: Decoder | None = None,
        eos_token_ids: Iterable[int] = (),
        max_position: int | None = None,
        options: EngineOptions | None = None,
        **fields: object,
    ) -> None:
        chosen = options or EngineOptions(**fields)  # type: ignore[arg-type]
        self.program = program = with_graphs(program) if chosen.cuda_graphs else program
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        spec, layout = program.spec, program.layout
        blocks = chosen.blocks
        if blocks is None:
            blocks = cache_blocks(
                spec,
                layout,
                program.device,
                tokens=chosen.kv_cache_tokens,
                fraction=chosen.kv_cache_fraction,
            )
        windows = [group.window for group in spec.groups]
        self.memory = PagedMemory(blocks, spec.block_size, windows)
        self.caches = allocate_cache(spec, blocks, program.device)
        warm_up(program.vocab_size, program.device)
        tokens = min(layout.max_tokens, chosen.max_tokens)
        padded = 0
        if chosen.deterministic:
            padded = min(DETERMINISTIC_TOKENS, layout.max_tokens, layout.max_rows)
            tokens = min(tokens, padded)
        if tokens < 1:
            raise UserError(f"max_tokens is {tokens}: give 1 or more tokens a step")
        self.scheduler = Scheduler(
            self.memory,
            tokens,
            layout.max_sequences,
            layout.max_rows,
            prefix_cache=chosen.prefix_cache,
            policy=chosen.policy,
            rope=spec.rope,
        )
        running = self.scheduler.max_running
        self.builder = BatchBuilder(spec, layout, running, padded)
        self.speculator = (
            Speculator(chosen.drafter, chosen.draft_tokens) if chosen.drafter else None
        )
        if self.speculator is not None and self.speculator.features:
            check_features(program, self.speculator.features, self.speculator.name)
        self.context = min(layout.max_position, max_position or layout.max_position)
        self.requests = RequestFactory(self)
        self._metrics = Metrics(blocks=blocks)
        self._alive: dict[int, list[Sample]] = {}
        self._forks: dict[Sample, list[Sample]] = {}
        ahead = program.device.type == "cuda" if chosen.run_ahead is None else chosen.run_ahead
        self._ahead: Ahead | None = None
        if ahead and self.speculator is None:  # a draft needs the tokens before it
            self._ahead = Ahead(self.scheduler, self.builder, program, self.caches, self._forks)
        self._ended: list[StepOutput] = []
        self._compiling: dict[int, Future[CompiledGrammar]] = {}

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to report."""
        return bool(self._alive or self._ended)

    @property
    def capacity(self) -> int:
        """Most tokens a request may have, prompt and answer: by context, graph and cache."""
        graph = self.program.layout.max_blocks * self.program.spec.block_size
        return min(self.context, graph, self.memory.capacity)

    @property
    def metrics(self) -> Metrics:
        """Counters and the present state of queue and cache."""
        metrics, scheduler = self._metrics, self.scheduler
        metrics.running = len(scheduler.running)
        metrics.waiting = len(scheduler.waiting)
        metrics.preemptions = scheduler.preemptions
        metrics.evictions = scheduler.cache.evictions
        metrics.asked_tokens = scheduler.asked_tokens
        metrics.reused_tokens = scheduler.found_tokens
        metrics.free_blocks = self.memory.free
        metrics.cached_blocks = scheduler.cache.nodes
        if isinstance(self.program, GraphedProgram):
            metrics.graphs, metrics.graph_bytes = self.program.graphs, self.program.graph_bytes
        return metrics

    def add_request(
        self,
        token_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        salt: Hashable = None,
        detokenize: bool = True,
    ) -> int:
        """Queue a prompt and return the request's id; `UserError` if it can never run.

        priority: smaller goes first, where the policy looks at it. timeout_s: seconds after which
        it ends with what it has (finish reason "timeout"). salt: only requests of the same salt
        share the prefix cache. detokenize: False leaves texts empty, unless a stop string needs
        them.
        """
        samples = self.requests.make(token_ids, params or SamplingParams(), detokenize)
        lead = samples[0]
        now = time.perf_counter()
        for sample in samples:
            sample.priority, sample.salt, sample.added = priority, salt, now
            if timeout_s is not None:
                sample.deadline = self.scheduler.clock() + timeout_s
        if len(samples) > 1:
            self._forks[lead] = samples[1:]
        structured = lead.params.structured
        if structured is None:
            self._start(samples)
        else:
            self._compiling[lead.id] = self.requests.compile(structured)
        self._alive[lead.id] = samples
        self._metrics.requests += 1
        return lead.id

    def _start(self, samples: list[Sample], grammar: CompiledGrammar | None = None) -> None:
        self.requests.start(samples, grammar)
        self.scheduler.add(samples[0])

    def _start_compiled(self) -> None:
        """Queue the requests whose grammar is there; wait for one only if nothing else is to do."""
        if not self._ended and not self.scheduler.has_work:
            wait(self._compiling.values(), timeout=0.1, return_when=FIRST_COMPLETED)
        for number, future in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[number]
            samples = self._alive.get(number)
            if samples is None:
                continue  # aborted meanwhile
            try:
                self._start(samples, future.result())
            except Exception as error:
                for sample in list(samples):
                    self._end(sample, "error", error)

    def abort(self, request_id: int) -> None:
        """End a request now; its last outputs (finish reason "abort") come with the next step."""
        for sample in list(self._alive.get(request_id, ())):
            self._end(sample, "abort")

    def step(self) -> list[StepOutput]:
        """Compute one step; an output for each sequence that got a token or ended."""
        for sample in self.scheduler.expired():
            for each in [sample, *self._forks.get(sample, ())]:
                self._end(each, "timeout")
        if self._compiling:
            self._start_compiled()
        if self.speculator is not None:
            self.speculator.draft(self.scheduler.running)
        chunks = self._ahead.chunks() if self._ahead is not None else []
        chunks = chunks or self.scheduler.plan()
        outputs, self._ended = self._ended, []
        if not chunks:
            return outputs
        try:
            taken, selection, logits = self._run(chunks)
        except Exception as error:  # reported with every request of the step
            for chunk in chunks:
                for each in [chunk.sequence, *self._forks.get(chunk.sequence, ())]:
                    self._end(each, "error", error)
            outputs += self._ended
            self._ended = []
            return outputs
        for chunk in chunks:
            lead = chunk.sequence
            if lead not in taken:
                continue
            for fork in self._forks.pop(lead, ()):
                self.scheduler.fork(lead, fork)
                outputs.append(self._taken(fork, taken[fork], selection, logits))
            outputs.append(self._taken(lead, taken[lead], selection, logits, chunk))
        return outputs

    def _taken(self, sample: Sample, *step: Any) -> StepOutput:
        """`_take`, whose failure is this sequence's alone."""
        try:
            return self._take(sample, *step)
        except Exception as error:
            return self._finished(sample, StepOutput(sample.id, [], ""), "error", error)

    def _run(self, chunks: list[Chunk]) -> tuple[dict[Sample, Taken], Selection, torch.Tensor]:
        """Compute the step and choose tokens; the chunks are in the cache after it."""
        program = self.program
        copies, self.scheduler.copies = self.scheduler.copies, []
        copy_blocks(self.caches, program.spec, copies)
        proposals = self.speculator.proposals if self.speculator else {}
        selection = Selection(chunks, proposals, self._forks, program.vocab_size, program.device)
        logits, features = self._ahead.logits(chunks) if self._ahead is not None else None, None
        began = time.perf_counter()
        if logits is None:
            batch = self.builder.build(chunks)
            began = time.perf_counter()
            if self.speculator is not None and self.speculator.features:
                logits, features = program.run_with_features(batch, self.caches)
            else:
                logits = program.run(batch, self.caches)
        keep_prompt_logprobs(chunks, logits)
        launch = self._ahead.after(chunks) if self._ahead is not None else None
        taken, chosen = selection.choose(logits, launch)
        self.scheduler.commit(chunks)
        self._count(chunks)
        if self.speculator is not None:
            seconds = time.perf_counter() - began
            self.speculator.learn(chunks, taken, seconds, self._metrics)
            if features is not None:
                self.speculator.observe(chunks, taken, self._forks, features)
        return taken, selection, chosen

    def _count(self, chunks: list[Chunk]) -> None:
        self._metrics.steps += 1
        for chunk in chunks:
            if chunk.start < chunk.sequence.prompt_length:
                self._metrics.prefilled_tokens += chunk.count

    def _take(
        self,
        sample: Sample,
        taken: Taken,
        selection: Selection,
        logits: torch.Tensor,
        chunk: Chunk | None = None,
    ) -> StepOutput:
        """Take chosen tokens in: text, stop conditions, and the end if there is one."""
        if taken.tokens[0] is None:
            error = SmeltError(
                f"request {sample.id}: the logits after token {len(sample.tokens)} are NaN or "
                "all excluded; try --check-numerics when compiling, or another --dtype"
            )
            return self._finished(sample, StepOutput(sample.id, [], ""), "error", error)
        output = StepOutput(sample.id, [], "", reused_tokens=sample.reused, index=sample.index)
        if not sample.generated:
            output.prompt_logprobs = sample.prompt_logprobs
        flush, reason = True, None
        assert sample.sampler is not None
        for token in taken.tokens:
            assert token is not None
            reason, flush = self._append(sample, token, output)
            if reason is not None:
                break
        self._time(sample, len(output.token_ids))
        if sample.logprobs:
            tokens = output.token_ids
            output.logprobs = selection.logprobs(logits, sample, tokens, taken.path)
        if chunk is not None and taken.path:
            moves = slots_to_move(chunk, taken.path)
            if moves:
                move_slots(self.caches, self.program.spec, sample.tables, moves)
            computed = chunk.start + chunk.known + len(taken.path)
            self.scheduler.advance(sample, min(computed, len(sample.tokens)))
        if reason is not None:
            return self._finished(sample, output, reason, flush=flush)
        return output

    def _append(self, sample: Sample, token: int, output: StepOutput) -> tuple[str | None, bool]:
        """One more token: why the answer ends with it, and whether held text belongs to it."""
        sample.tokens.append(token)
        output.token_ids.append(token)
        self._metrics.generated_tokens += 1
        assert sample.sampler is not None
        sample.sampler.accept((token,))
        armed = sample.generated >= sample.params.min_tokens
        if (token in sample.end_tokens and armed) or sample.sampler.finished:
            # An end token is no text; a finished structure's last token is.
            output.silent_end = token in sample.end_tokens
            if sample.text is not None and not output.silent_end:
                output.text += sample.text.push(token, False)[0]
            return "stop", True
        if sample.text is not None:
            piece, stopped = sample.text.push(token, armed)
            output.text += piece
            if stopped:
                return "stop", False
        return ("length", True) if len(sample.tokens) >= sample.limit else (None, True)

    def _time(self, sample: Sample, tokens: int) -> None:
        now = time.perf_counter()
        if sample.last:
            self._metrics.itl.add((now - sample.last) / tokens, tokens)
        else:
            self._metrics.ttft.add(now - sample.added)
        sample.last = now

    def _finished(
        self,
        sample: Sample,
        output: StepOutput,
        reason: str,
        error: Exception | None = None,
        *,
        flush: bool = True,
    ) -> StepOutput:
        """Release a sequence's cache; `flush` adds the text that was still held back."""
        if flush and sample.text is not None:
            rest, stopped = sample.text.finish()
            output.text += rest
            if stopped and reason == "length":
                reason = "stop"
        sample.finish_reason = reason
        self._metrics.errors += reason == "error"
        alive = self._alive[sample.id]
        alive.remove(sample)
        if not alive:
            del self._alive[sample.id]
        self._forks.pop(sample, None)
        if sample.entered:
            self.scheduler.finish(sample, keep=reason != "error")
        if self.speculator is not None:
            self.speculator.drop(sample)
        output.index, output.finish_reason, output.error = sample.index, reason, error
        output.reused_tokens = sample.reused
        return output

    def _end(self, sample: Sample, reason: str, error: Exception | None = None) -> None:
        if sample.finish_reason is None:
            output = StepOutput(sample.id, [], "")
            self._ended.append(self._finished(sample, output, reason, error))

    def close(self) -> None:
        """End all requests without a report, and give caches and helpers back."""
        for number in list(self._alive):
            self.abort(number)
        self._ended.clear()
        self._compiling.clear()
        self.requests.close()
        self.caches.clear()

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if a cache block is lost or counted wrongly (tests, soak)."""
        self.memory.check_integrity(self.scheduler.tables(), self.scheduler.cache.blocks())
