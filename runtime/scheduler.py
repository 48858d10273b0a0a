"""Which tokens of which requests the next step computes. Plain Python: it never imports torch.

Continuous batching, first come first served: running requests that decode go first, then running
requests still in their prompt, then new ones, within a budget of tokens a step; a long prompt is
cut into chunks. When blocks run out, idle session caches go first, then the youngest running
request is put back and later computed again from its tokens, so that the oldest always advances.
"""

from __future__ import annotations

from collections import deque

from .blocks import PagedMemory
from .sequence import Chunk, Sequence
from .session_cache import SessionCache


class Scheduler:
    """Keeps the waiting and running requests and hands out lanes and blocks.

    max_tokens: tokens a step; max_running: requests that may hold blocks at a time.
    """

    def __init__(self, memory: PagedMemory, max_tokens: int, max_running: int) -> None:
        self.memory = memory
        self.sessions = SessionCache(memory)
        self.max_tokens = max_tokens
        self.max_running = min(max_running, max_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._lanes = list(range(self.max_running - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a request; its `limit` must fit `memory.capacity`, else it could never end."""
        if sequence.limit > self.memory.capacity:
            raise ValueError(f"limit {sequence.limit} exceeds capacity {self.memory.capacity}")
        self.waiting.append(sequence)

    def plan(self) -> list[Chunk]:
        """The next step's chunks, blocks reserved; empty only when there is no work.

        After the step, call `commit`; a request that ends goes through `finish`.
        """
        before = self.preemptions
        chunks = self._decodes()
        budget = self.max_tokens - len(chunks)
        budget -= self._prefills(chunks, budget)
        if self.preemptions == before:
            self._admit(chunks, budget)
        while not chunks and self.running:
            # Only prompts run, and none of them finds a block: the youngest steps back.
            self._preempt(self.running[-1])
            self._prefills(chunks, self.max_tokens)
        if not chunks and self.waiting:
            self._admit(chunks, self.max_tokens)
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """The chunks are in the cache now; give back what fell out of the windows."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.computed = chunk.start + chunk.count
            for table in sequence.tables:
                if table.window:
                    table.slide(sequence.computed)

    def finish(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a request out, waiting or running; its session keeps the cache if `keep`."""
        if sequence.lane >= 0:
            self.running.remove(sequence)
            self._free_lane(sequence)
        else:
            self.waiting.remove(sequence)
        self.sessions.keep(sequence, keep)

    def _decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            if sequence.lane < 0 or sequence.pending != 1:
                continue  # preempted by an older one in this loop, or still in its prompt
            if self._reserve(sequence, sequence.computed + 1):
                chunks.append(Chunk(sequence, sequence.computed, 1, 1))
        return chunks

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for a running request, at the cost of younger ones, or of itself (False)."""
        while not self._grow(sequence, tokens):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        while not self.memory.grow(sequence.tables, tokens):
            if not self.sessions.reclaim():
                return False
        return True

    def _prefills(self, chunks: list[Chunk], budget: int) -> int:
        """Chunks for running requests still in their prompt; returns the tokens taken."""
        taken = 0
        for sequence in self.running:
            if sequence.pending > 1 and taken < budget:
                taken += self._chunk(sequence, chunks, budget - taken)
        return taken

    def _chunk(self, sequence: Sequence, chunks: list[Chunk], budget: int) -> int:
        count = min(sequence.pending, budget)
        while (room := self.memory.room(sequence.tables) - sequence.computed) < count:
            if not self.sessions.reclaim():
                break
        count = min(count, room)
        if count <= 0 or not self._grow(sequence, sequence.computed + count):
            return 0
        rows = 1 if count == sequence.pending else 0
        chunks.append(Chunk(sequence, sequence.computed, count, rows))
        return count

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        while self.waiting and budget > 0 and self._lanes:
            sequence = self.waiting[0]
            self.sessions.restore(sequence)
            taken = self._chunk(sequence, chunks, budget)
            if not taken:
                self.sessions.keep(sequence, True)
                return
            budget -= taken
            self.waiting.popleft()
            sequence.lane = self._lanes.pop()
            for table in sequence.tables:
                table.changed_from = 0
            self.running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_lane(sequence)
        for table in sequence.tables:
            table.clear()
        sequence.tables = []
        sequence.computed = 0
        sequence.preempted += 1
        self.preemptions += 1
        # Victims leave youngest first, so putting each in front keeps the order of arrival.
        self.waiting.appendleft(sequence)

    def _free_lane(self, sequence: Sequence) -> None:
        self._lanes.append(sequence.lane)
        sequence.lane = -1
