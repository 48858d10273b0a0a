"""Which tokens of which sequences the next step computes. Plain Python: it never imports torch.

Continuous batching (Orca: Yu et al. 2022) with chunked prefill (Sarathi: Agrawal et al. 2023,
arXiv:2308.16369): sequences that decode go first, then running ones still in their prompt, then
new ones, within a budget of tokens a step, each group in the policy's order. When blocks run out,
what the prefix cache holds for nobody goes first, then sequences that wait with a cache, then the
last running one steps back; it is later computed again, from its first token that is lost.
"""

from __future__ import annotations

import heapq
import time
from bisect import insort
from collections.abc import Callable

from .blocks import BlockTable, Copies, PagedMemory
from .length_scaling import LengthScaling
from .policies import Policy, make_policy
from .prefix_cache import PrefixCache
from .sequence import Chunk, Sequence


class Scheduler:
    """Keeps the waiting and running sequences and hands out lanes and blocks.

    max_tokens: tokens a step; max_running: sequences that may run at a time; max_rows: rows of
    logits a step; prefix_cache: keep what was computed for later requests; policy: the order, a
    name or an object; clock: seconds, for arrival, aging and deadlines; rope: set where cached keys
    depend on the length of their sequence.
    """

    def __init__(
        self,
        memory: PagedMemory,
        max_tokens: int,
        max_running: int,
        max_rows: int | None = None,
        *,
        prefix_cache: bool = True,
        policy: str | Policy = "fcfs",
        clock: Callable[[], float] = time.monotonic,
        rope: LengthScaling | None = None,
    ) -> None:
        self.memory = memory
        self.cache = PrefixCache(memory, prefix_cache)
        self.policy = make_policy(policy)
        self.clock = clock
        self.rope = rope
        self.max_tokens = max_tokens
        self.max_rows = max_rows or max_tokens
        self.max_running = min(max_running, max_tokens, self.max_rows)
        self.waiting: list[Sequence] = []  # both in the policy's order
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.asked_tokens = 0  # of prompts, and how many of them the prefix cache had
        self.found_tokens = 0
        self.copies: Copies = []
        self._lanes = list(range(self.max_running - 1, -1, -1))
        self._deadlines: list[tuple[float, int, int, Sequence]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; its `limit` must fit `memory.capacity`, else it could never end.

        A sequence that brings tables of its own (a fork) keeps them while nobody needs the blocks.
        """
        if sequence.limit > self.memory.capacity:
            raise ValueError(f"limit {sequence.limit} exceeds capacity {self.memory.capacity}")
        sequence.arrival = sequence.arrival or self.clock()
        sequence.entered = True
        self.policy.arrived(sequence, self.max_tokens)
        if sequence.deadline is not None:
            entry = (sequence.deadline, sequence.id, sequence.index, sequence)
            heapq.heappush(self._deadlines, entry)
        self._wait(sequence)

    def fork(self, lead: Sequence, sequence: Sequence) -> None:
        """Queue a sequence that goes on from the cache of a running one, blocks shared."""
        sequence.tables = [table.fork() for table in lead.tables]
        sequence.node, sequence.cached_blocks = lead.node, lead.cached_blocks
        sequence.computed, sequence.reused = lead.computed, lead.reused
        sequence.regime = lead.regime
        sequence.arrival = lead.arrival
        self.add(sequence)

    def expired(self) -> list[Sequence]:
        """Sequences whose deadline has passed, each once; the caller finishes them."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= self.clock():
            sequence = heapq.heappop(self._deadlines)[-1]
            if sequence.finish_reason is None:
                late.append(sequence)
        return late

    def plan(self) -> list[Chunk]:
        """The next step's chunks, blocks reserved; empty only when there is no work.

        `copies` then holds the blocks to copy before the step runs. After the step, call
        `commit`; a sequence that ends goes through `finish`.
        """
        if self.waiting and self.policy.preemptive:
            self._reorder()
        if self.rope is not None:
            self._drop_outgrown()
        before = self.preemptions
        chunks = self._decodes()
        self._prefills(chunks)
        if self.preemptions == before:
            self._admit(chunks)
        while not chunks and self.running:
            # Only prompts run, and none of them finds a block: the last one steps back.
            self._preempt(self.running[-1])
            self._prefills(chunks)
        if not chunks and self.waiting:
            self._admit(chunks)
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """The chunks' own tokens (not their drafts) are in the cache now."""
        now = self.clock()
        changed = False
        for chunk in chunks:
            sequence = chunk.sequence
            self.advance(sequence, chunk.start + chunk.known)
            changed |= self.policy.served(sequence, 1, now)
        if changed:
            self.running.sort(key=self.policy.key)

    def advance(self, sequence: Sequence, computed: int) -> None:
        """So many tokens are in the cache: keep full blocks, free what no window sees."""
        sequence.computed = computed
        size = self.memory.block_size
        if self.cache.enabled and sequence.node and (sequence.cached_blocks + 1) * size <= computed:
            self._keep_blocks(sequence)
        for table in sequence.tables:
            if table.window:
                table.slide(computed)

    def finish(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a sequence out, waiting or running; the prefix cache has its blocks if `keep`."""
        if sequence.lane >= 0:
            self.running.remove(sequence)
            self._free_lane(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence, keep)

    def tables(self) -> list[list[BlockTable]]:
        """The tables of all sequences that hold blocks, for integrity checks."""
        return [s.tables for s in (*self.running, *self.waiting) if s.tables]

    def _wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=self.policy.key)

    def _reorder(self) -> None:
        """Let waiting sequences age, and take the places of running ones they precede."""
        key = self.policy.key
        now = self.clock()
        if self.policy.aged(self.waiting, now):
            self.waiting.sort(key=key)
        places = len(self._lanes)
        for sequence in self.waiting[: self.max_running]:
            if places:
                places -= 1
            elif self.running and key(sequence) < key(self.running[-1]):
                self._pause(self.running[-1], now)
            else:
                return

    def _pause(self, sequence: Sequence, now: float) -> None:
        """Back to the queue with its cache, which is taken only when blocks run out."""
        self.running.remove(sequence)
        self._free_lane(sequence)
        sequence.queued = now
        self._wait(sequence)

    def _drop_outgrown(self) -> None:
        """A cache whose keys have the factors of a shorter sequence is given up, and made anew."""
        for sequence in [s for s in self.running if self._regime(s) != s.regime]:
            self._preempt(sequence)
        for sequence in self.waiting:
            if sequence.tables and self._regime(sequence) != sequence.regime:
                self._release(sequence, True)

    def _regime(self, sequence: Sequence) -> int:
        if self.rope is None:
            return 0
        return self.rope.regime(len(sequence.tokens), sequence.prompt_length)

    def _decodes(self) -> list[Chunk]:
        """One token each first, so that nobody's draft keeps another from decoding."""
        chunks: list[Chunk] = []
        for sequence in list(self.running):
            if sequence.lane < 0 or sequence.pending != 1:
                continue  # preempted by another one in this loop, or still in its prompt
            if self._reserve(sequence, sequence.computed + 1):
                chunks.append(Chunk(sequence, sequence.computed, 1, 1))
        chunks = [chunk for chunk in chunks if chunk.sequence.lane >= 0]
        spare = min(self.max_tokens, self.max_rows) - len(chunks)
        for chunk in chunks:
            if chunk.sequence.draft and spare > 0:
                spare -= self._add_draft(chunk, spare)
        return chunks

    def _add_draft(self, chunk: Chunk, spare: int) -> int:
        """Put as much of a draft into a decode chunk as tokens, limit and free blocks allow."""
        sequence = chunk.sequence
        room = self.memory.room(sequence.tables, sequence.computed) - sequence.computed - 1
        count = min(len(sequence.draft), spare, room, sequence.limit - len(sequence.tokens))
        if self.rope is not None and (most := self.rope.room(len(sequence.tokens))) is not None:
            count = min(count, most)
        if count <= 0 or not self._grow(sequence, sequence.computed + 1 + count):
            return 0
        chunk.draft = sequence.draft[:count]
        chunk.parents = sequence.parents[:count] if sequence.parents else None
        chunk.count = chunk.rows = 1 + count
        return count

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for a running sequence, at the cost of later ones, or of itself (False)."""
        while not self._grow(sequence, tokens):
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        while True:
            copies = self.memory.grow(sequence.tables, sequence.computed, tokens)
            if copies is not None:
                self.copies += copies
                return True
            if not self._reclaim():
                return False

    def _reclaim(self) -> bool:
        """Free a block or more that no running sequence uses."""
        if self.cache.reclaim():
            return True
        for sequence in reversed(self.waiting):
            if sequence.tables:
                self._release(sequence, True)
                self.preemptions += 1
                sequence.preempted += 1
                return True
        return False

    def _prefills(self, chunks: list[Chunk]) -> None:
        """Chunks for running sequences still in their prompt."""
        for sequence in self.running:
            if sequence.pending > 1:
                self._chunk(sequence, chunks)

    def _chunk(self, sequence: Sequence, chunks: list[Chunk]) -> int:
        budget, rows = self._left(chunks)
        # Where every prompt token's logits are wanted, rows limit the chunk, too.
        every = sequence.fresh and not sequence.generated
        count = min(sequence.pending, budget, rows) if every else min(sequence.pending, budget)
        if rows < 1:
            return 0
        start = sequence.computed
        while (room := self.memory.room(sequence.tables, start) - start) < count:
            if not self._reclaim():
                break
        count = min(count, room)
        if count <= 0 or not self._grow(sequence, start + count):
            return 0
        last = count == sequence.pending
        chunks.append(Chunk(sequence, start, count, count if every else int(last)))
        return count

    def _left(self, chunks: list[Chunk]) -> tuple[int, int]:
        """Tokens and rows that the step can still take."""
        tokens = self.max_tokens - sum(chunk.count for chunk in chunks)
        return tokens, self.max_rows - sum(chunk.rows for chunk in chunks)

    def _admit(self, chunks: list[Chunk]) -> None:
        while self.waiting and self._lanes and min(self._left(chunks)) > 0:
            sequence = self.waiting.pop(0)
            restored = not sequence.tables
            if restored:
                self._restore(sequence)
            if not self._chunk(sequence, chunks):
                if restored:
                    self._release(sequence, True)
                self._wait(sequence)
                return
            if not sequence.generated and restored:
                self.asked_tokens += sequence.prompt_length
                self.found_tokens += sequence.reused
            sequence.lane = self._lanes.pop()
            for table in sequence.tables:
                table.changed_from = 0
            insort(self.running, sequence, key=self.policy.key)

    def _restore(self, sequence: Sequence) -> None:
        """Give a starting sequence tables that hold what the cache has of its tokens.

        At least one token is left to compute, since its logits are wanted.
        """
        sequence.tables = self.memory.new_tables()
        sequence.computed = sequence.cached_blocks = 0
        sequence.regime = self._regime(sequence)
        if not self.cache.enabled:
            return
        # Equal tokens with other factors are other keys.
        salt = (sequence.salt, sequence.regime) if sequence.regime else sequence.salt
        sequence.node = self.cache.root(salt)
        if sequence.fresh and not sequence.generated:
            return
        size, blocks = self.memory.block_size, self.memory.capacity // self.memory.block_size
        nodes, found = self.cache.find(sequence.tokens[:-1], salt)
        if found % size and -(-sequence.limit // size) >= blocks:
            # Copying the block that is shared in part takes one more than this pool has.
            nodes, found = nodes[:-1], found - found % size
        if not found:
            return
        self.cache.touch(nodes)
        for group, table in enumerate(sequence.tables):
            table.adopt([node.blocks[group] for node in nodes], found)
        sequence.computed = found
        sequence.cached_blocks = found // size
        if not sequence.generated:
            sequence.reused = found
        if sequence.cached_blocks:
            sequence.node = nodes[sequence.cached_blocks - 1]

    def _keep_blocks(self, sequence: Sequence) -> None:
        """Put blocks that became full into the tree, or use those it has of the same tokens."""
        size, node = self.memory.block_size, sequence.node
        while node is not None and (sequence.cached_blocks + 1) * size <= sequence.computed:
            if not node.alive:  # all that followed it is gone, and so would be ours
                sequence.node = None
                return
            index = sequence.cached_blocks
            tokens = tuple(sequence.tokens[index * size : (index + 1) * size])
            child = node.children.get(tokens)
            if child is None:
                child = self.cache.add(node, tokens, [t.blocks[index] for t in sequence.tables])
            else:
                for table, block in zip(sequence.tables, child.blocks, strict=True):
                    if table.blocks[index] != block:
                        table.pool.share(block)
                        table.replace(index, block)
            sequence.node = node = child
            sequence.cached_blocks += 1

    def _release(self, sequence: Sequence, keep: bool) -> None:
        """Give a sequence's blocks back, the last and unfinished one to the cache if `keep`."""
        size, node = self.memory.block_size, sequence.node
        rest = sequence.computed - sequence.cached_blocks * size
        if keep and node is not None and node.alive and 0 < rest < size:
            tokens = tuple(sequence.tokens[sequence.computed - rest : sequence.computed])
            if node.closest(tokens)[1] < rest:
                blocks = [table.blocks[sequence.cached_blocks] for table in sequence.tables]
                self.cache.add(node, tokens, blocks)
        for table in sequence.tables:
            table.clear()
        if not keep and node is not None:
            self.cache.forget(node)
        sequence.tables = []
        sequence.node = None
        sequence.computed = sequence.cached_blocks = 0

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free_lane(sequence)
        self._release(sequence, True)
        sequence.preempted += 1
        self.preemptions += 1
        self._wait(sequence)

    def _free_lane(self, sequence: Sequence) -> None:
        self._lanes.append(sequence.lane)
        sequence.lane = -1
