"""Padded steps give what unpadded ones give and write nothing more; a graph is a plain call."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.fake_step import FakeStep, one_thread  # noqa: F401  (autouse fixture)
from helpers.graphs import Calls
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.runtime.batch import Batch, BatchLayout, batch_input_names
from smelt.runtime.batch_builder import BatchBuilder
from smelt.runtime.blocks import PagedMemory
from smelt.runtime.cuda_graphs import (
    MOST_QUERY,
    MOST_ROWS,
    Bucket,
    Buckets,
    GraphedProgram,
    _Graph,
    packing,
    pad,
    sizes,
    static_bytes,
    with_graphs,
)
from smelt.runtime.engine import Engine
from smelt.runtime.length_scaling import DYNAMIC, LengthScaling
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.sequence import Chunk, Sequence
from smelt.runtime.speculation.ngram import NgramDrafter

LAYOUT = BatchLayout(512, 256, 64, 512, 1024)


def test_sizes_grow_by_a_quarter_at_most() -> None:
    found = sizes(256)
    assert found[:14] == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112]
    assert found[14:] == [128, 160, 192, 224, 256]
    assert sizes(0) == [] and sizes(1) == [1] and sizes(8) == [1, 2, 4, 8]
    assert sizes(9) == [1, 2, 4, 8, 9] and sizes(100)[-3:] == [80, 96, 100]
    for limit in range(1, 600):
        assert sizes(limit) == sorted(set(sizes(limit))) and sizes(limit)[-1] == limit


def step_of(sequences: int, rows: int, query: int, tree: int = 0) -> Batch:
    """Only the sizes matter."""
    long = torch.zeros(rows, dtype=torch.int64)
    short = torch.zeros(sequences, dtype=torch.int32)
    tables = torch.zeros(sequences, 3, dtype=torch.int32)
    mask = torch.zeros(rows, tree, dtype=torch.bool)
    starts = torch.zeros(sequences + 1, dtype=torch.int32)
    return Batch(long, long, starts, short, [long], [tables], long, mask, None, query)


@pytest.mark.parametrize("limits", [(512, 256, 512), (7, 256, 512), (512, 5, 300), (40, 256, 33)])
def test_buckets_cover_every_step_that_decodes(limits: tuple[int, int, int]) -> None:
    tokens, sequences, rows = limits
    layout = replace(LAYOUT, max_tokens=tokens, max_sequences=sequences, max_rows=rows)
    buckets = Buckets(layout, 1)
    most = min(tokens, rows, MOST_ROWS)
    for b in range(1, min(sequences, most) + 1):
        for drafted in range(MOST_QUERY):
            count = b * (1 + drafted)
            found = buckets.find(step_of(b, count, 1 + drafted))
            if count > most:
                assert found is None
                continue
            assert found is not None and not found.tree
            assert b <= found.sequences <= min(layout.max_sequences, max(8, b * 2))
            needed = -(-count // found.sequences)
            assert count <= found.rows <= min(most, found.sequences * needed * 1.7)
            assert drafted or found.rows == found.sequences


def test_other_steps_are_not_for_graphs() -> None:
    buckets = Buckets(LAYOUT, 1)
    assert buckets.find(step_of(3, 20, 16)) == Bucket(4, 20)
    assert buckets.find(step_of(3, 21, 16, tree=9)) == Bucket(4, 36, True)
    prompt = replace(step_of(3, 20, 16), logits_rows=torch.zeros(3, dtype=torch.int64))
    assert buckets.find(prompt) is None
    assert buckets.find(step_of(1, 40, 16)) is None  # rows that are nobody's
    assert buckets.find(step_of(3, 20, 17)) is None  # a prompt
    assert buckets.find(step_of(3, 20, 0)) is None  # nobody knows
    assert buckets.find(step_of(20, MOST_ROWS + 1, 16)) is None
    long = replace(LAYOUT, max_blocks=1 << 17)
    assert Buckets(long, 1).find(step_of(8, 8, 1)) == Bucket(8, 8)
    assert Buckets(long, 1).find(step_of(9, 9, 1)) is None  # tables of 4.5 MiB
    assert Buckets(long, 2).find(step_of(8, 8, 1)) is None
    none = Buckets(replace(LAYOUT, max_blocks=1 << 21), 1)
    assert none.largest is None and none.find(step_of(1, 1, 1)) is None


@pytest.mark.parametrize("rope", [False, True])
def test_what_is_left_over_is_nobodys(rope: bool) -> None:
    names = batch_input_names(2, rope)
    bucket = Bucket(4, 8, True)
    packed = packing(bucket, LAYOUT, names)
    buffer = torch.full((packed.nbytes,), 77, dtype=torch.uint8)
    arrays = dict(zip(names, (v.numpy() for v in packed.views(buffer)), strict=True))
    for array in arrays.values():
        array.fill(1)
    small = torch.int32
    given_ = {
        "input_ids": torch.tensor([5, 6, 7, 8, 9]),
        "position_ids": torch.tensor([3, 4, 0, 1, 2]),
        "query_start": torch.tensor([0, 2, 5], dtype=small),
        "seq_lens": torch.tensor([5, 3], dtype=small),
        "tree_mask": torch.ones(5, 3, dtype=torch.bool),
        "rope_lens": torch.tensor([9, 9, 8, 8, 8]),
        "logits_rows": torch.tensor([1, 4]),
        "slot_mapping_0": torch.arange(5) + 40,
        "slot_mapping_1": torch.arange(5) + 80,
        "block_tables_0": torch.tensor([[3, 4], [5, 6]], dtype=small),
        "block_tables_1": torch.tensor([[7, 8], [9, 2]], dtype=small),
    }
    pad(arrays, {name: given_[name] for name in names}, 5)
    assert arrays["input_ids"].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert arrays["position_ids"].tolist() == [3, 4, 0, 1, 2, 0, 0, 0]
    assert arrays["query_start"].tolist() == [0, 2, 5, 5, 5]
    assert arrays["seq_lens"].tolist() == [5, 3, 0, 0]
    assert arrays["logits_rows"].tolist() == [1, 4, 0, 0, 0, 0, 0, 0]
    for group in (0, 1):
        slots = arrays[f"slot_mapping_{group}"].tolist()
        assert slots == [*given_[f"slot_mapping_{group}"].tolist(), -1, -1, -1]
        table = arrays[f"block_tables_{group}"]
        assert table.shape == (4, LAYOUT.max_blocks)
        assert np.array_equal(table[:2, :2], given_[f"block_tables_{group}"].numpy())
        assert (table[2:] == 1).all() and (table[:, 2:] == 1).all()  # what was there before
    mask = arrays["tree_mask"]
    assert mask[:5, :3].all() and mask.sum() == 15 and mask.shape == (8, MOST_QUERY)
    if rope:
        assert arrays["rope_lens"].tolist() == [9, 9, 8, 8, 8, 1, 1, 1]
    # An input that lies on the device is not written: only what is behind it counts.
    pad(arrays, {n: given_[n] for n in names if n != "input_ids"}, 5)
    assert not arrays["input_ids"].any()
    pad(arrays, {}, 0)
    assert not arrays["query_start"].any() and (arrays["slot_mapping_0"] == -1).all()
    assert arrays["input_ids"].dtype == np.int64 and arrays["seq_lens"].dtype == np.int32


class World:
    """Sequences with a cache of their own, and the batches of steps over them.

    Blocks are dealt out in a random order; what no sequence holds is NaN.
    """

    def __init__(self, step: FakeStep, lengths: list[int], seed: int) -> None:
        self.step, self.rng = step, random.Random(seed)
        spec, blocks = step.spec, 200
        self.caches = [torch.full_like(c, float("nan")) for c in spec.allocate(blocks)]
        memory = PagedMemory(blocks, spec.block_size, [g.window for g in spec.groups])
        for pool in memory.pools:
            self.rng.shuffle(pool._free)
        self.builder = BatchBuilder(spec, step.layout, len(lengths))
        self.sequences = []
        for lane, length in enumerate(lengths):
            tokens = [self.rng.randrange(97) for _ in range(length + 30)]
            sequence = Sequence(lane, tokens, SamplingParams(), 128)
            sequence.tables, sequence.lane = memory.new_tables(), lane
            assert memory.grow(sequence.tables, 0, length + 30) is not None
            sequence.computed = length
            self.sequences.append(sequence)
            if length:
                step.run(self.builder.build([Chunk(sequence, 0, length, 0)]), self.caches)

    def batch(self, counts: list[int], rows: list[int]) -> Batch:
        pairs = zip(self.sequences, counts, rows, strict=False)
        return self.builder.build([Chunk(s, s.computed, n, r) for s, n, r in pairs if n])


def poisoned(cache: torch.Tensor) -> torch.Tensor:
    """With a value in the places of NaN, to compare."""
    return cache.nan_to_num(-123.0)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=7),
    query=st.sampled_from([1, 1, 4, 9]),
    windows=st.sampled_from([(0,), (0, 7)]),
    rope=st.booleans(),
    kind=st.sampled_from([None, "final", "eagle3"]),
    seed=st.integers(0, 999),
)
def test_a_padded_step_equals_the_step(
    lengths: list[int],
    query: int,
    windows: tuple[int, ...],
    rope: bool,
    kind: str | None,
    seed: int,
) -> None:
    step = FakeStep(
        windows=windows,
        max_tokens=64,
        max_rows=64,
        rope=LengthScaling(DYNAMIC, 40) if rope else None,
        features=kind,
    )
    world = World(step, lengths, seed)
    backend = Calls()
    graphed = GraphedProgram(step, backend)
    caches = [cache.clone() for cache in world.caches]
    for _ in range(3):
        counts = [world.rng.randint(1, query) for _ in lengths]
        batch = world.batch(counts, counts)
        before = [cache.clone() for cache in caches]
        if kind is None:
            wanted = [step.run(batch, world.caches)]
            found = [graphed.run(batch, caches)]
        else:
            wanted = list(step.run_with_features(batch, world.caches))
            found = list(graphed.run_with_features(batch, caches))
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.shape == theirs.shape and torch.equal(mine, theirs)
        # The same slots are written, with the same values, and no others.
        for layer, (mine, theirs) in enumerate(zip(caches, world.caches, strict=True)):
            assert torch.equal(poisoned(mine), poisoned(theirs))
            changed = (poisoned(mine) != poisoned(before[layer])).flatten(3).any(-1).any(1)
            slots = batch.slot_mapping[step.group_of[layer]]
            blocks, offsets = changed.nonzero(as_tuple=True)
            written = set((blocks * step.spec.block_size + offsets).tolist())
            assert written <= set(slots.tolist())
        for sequence, count in zip(world.sequences, counts, strict=True):
            sequence.computed += count
    assert backend.replays == 3 and backend.captures == graphed.graphs


def test_a_graph_is_captured_once_for_a_size() -> None:
    step = FakeStep(max_tokens=64, max_rows=64)
    world = World(step, [3, 5, 9, 4, 11], 0)
    backend = Calls()
    graphed = GraphedProgram(step, backend)
    for count, captures in ((1, 1), (3, 2), (4, 2), (5, 3), (3, 3), (1, 3)):
        graphed.run(world.batch([1] * count, [1] * count), world.caches)
        assert backend.captures == graphed.graphs == captures
    assert backend.replays == 6
    assert graphed.graph_bytes == graphed._buffer.nbytes + 3000
    # A prompt, or another engine's caches: as it is.
    for batch, caches in (
        (world.batch([16, 16], [1, 1]), world.caches),
        (world.batch([1], [1]), list(world.caches)),
    ):
        before = len(step.batches)
        result = graphed.run(replace(batch, max_query=batch.max_query + 1), caches)
        assert len(step.batches) == before + 1
        assert step.batches[-1].tensors()[0] is batch.input_ids
        assert len(result) == len(batch.logits_rows)
    assert backend.replays == 6 and backend.captures == 3


def test_what_a_graph_reads_has_the_size_and_bounds_of_its_bucket() -> None:
    step = FakeStep(max_tokens=64, max_rows=64)
    world = World(step, [3, 5, 9], 0)
    graphed = GraphedProgram(step, Calls())
    graphed.run(world.batch([2, 1, 1], [2, 1, 1]), world.caches)
    batch = step.batches[-1]
    assert (len(batch.seq_lens), len(batch.input_ids), len(batch.logits_rows)) == (4, 4, 4)
    assert batch.max_query == MOST_QUERY and batch.tree_mask.shape == (4, 0)
    assert all(table.shape == (4, step.layout.max_blocks) for table in batch.block_tables)
    storages = {tensor.untyped_storage().data_ptr() for tensor in batch.tensors()}
    assert storages == {graphed._buffer.untyped_storage().data_ptr()}


class OnDevice(torch.Tensor):
    """A tensor of the host that says it is not."""

    device = torch.device("meta")  # type: ignore[assignment]

    def numpy(self, *, force: bool = False) -> np.ndarray:
        raise AssertionError("read on the host")


def test_inputs_on_the_device_are_copied_there() -> None:
    """As `input_ids` of a step that was launched early."""
    step = FakeStep(max_tokens=64, max_rows=64)
    names = batch_input_names(2, False)
    packed = packing(Bucket(4, 8), step.layout, names)
    buffer = torch.empty(packed.nbytes, dtype=torch.uint8)
    graph = _Graph(packed, names, step, buffer)
    world = World(step, [3, 5], 0)
    kept = graph.batch
    for ids in (torch.tensor([7, 8, 9]), torch.tensor([4, 5])):
        batch = world.batch([2, 1][: len(ids) - 1], [2, 1])
        graph.fill(replace(batch, input_ids=ids.as_subclass(OnDevice)))
        assert kept.input_ids.tolist() == ids.tolist() + [0] * (8 - len(ids))
        assert torch.equal(kept.position_ids[: len(ids)], batch.position_ids)
        assert kept.query_start.tolist()[:2] == [0, 2] and int(kept.query_start[4]) == len(ids)


def test_graphs_are_for_cuda_alone() -> None:
    step = FakeStep()
    assert with_graphs(step) is step
    engine = Engine(step, blocks=8, drafter=NgramDrafter())
    assert engine.program is step and engine.metrics.graphs == 0


def test_memory_that_graphs_take() -> None:
    step = FakeStep(max_tokens=64, max_rows=64, max_position=512, max_sequences=64)
    layout, row = step.layout, step.vocab_size * 4
    graphed = GraphedProgram(step, Calls())
    names = batch_input_names(2, False)
    assert graphed._buffer.nbytes == packing(Bucket(64, 64, True), layout, names).nbytes
    for count, rows in ((1, 16), (5, 16), (8, 16), (16, 16), (17, 48), (40, 112), (999, 112)):
        assert static_bytes(layout, 2, row, count) == graphed._buffer.nbytes + rows * row
    world = World(step, [3] * 8, 0)
    graphed.run(world.batch([1] * 8, [1] * 8), world.caches)
    graphed.run(world.batch([3] * 8, [3] * 8), world.caches)
    held = sum(place.nbytes for place in graphed._shared.values())
    assert held == (16 + 32) * row == static_bytes(layout, 2, row, 24) - graphed._buffer.nbytes
    assert static_bytes(replace(layout, max_blocks=1 << 21), 2, row, 8) == 0
