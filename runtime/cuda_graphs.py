"""Decode steps as CUDA graphs: the host launches one thing and not some hundred kernels.

A graph replays the kernels of one step on the very same addresses and sizes, so a step is padded to
the next of a few sizes (`Bucket`), and its inputs are copied to where the graph reads them:

    step -> pad into pinned arrays -> one copy to the device -> replay -> rows of logits, cut to R

Padding is nobody's: added sequences have no rows and no length, added rows have slot -1, so nothing
is written for them and no sequence sees them. Block tables are as wide as the whole context; what
lies behind a sequence's own blocks is stale and never read. The graph's last kernels copy what the
step gives to one place that graphs of like size share, because a graph's own outputs keep their
memory for good. So a result holds until the next step runs.

A bucket's graph is captured when a step first falls into it: capturing all of them when the engine
opens would take seconds, and a single answer needs one. All share a pool for what they compute in
between. Captured as they come, and not the largest first, they also leave in it what smaller ones
took before a larger one came: little beside the logits.

Everything but `CudaBackend` is the same on every device.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from .batch import ROPE_INPUT, Batch, BatchLayout, batch_input_names
from .transfer import HostCopy, Packing

if TYPE_CHECKING:
    from .engine_options import StepProgram

# A step with more rows keeps the device busy for longer than its launches take.
MOST_ROWS = 256
# Most tokens of one sequence: the bound of the packages that serve decoding and drafts.
MOST_QUERY = 16
# Rows of a sequence, on average: one, and as many as the drafts have that are worth it.
TIMES = (1, 2, 3, 5, 9, MOST_QUERY)
# Copying longer tables to the device would take longer than the launches do.
MOST_TABLE_BYTES = 4 << 20

Replay = Callable[[], None]


class GraphBackend(Protocol):
    """Captures graphs. nbytes: device memory that they have taken so far."""

    nbytes: int

    def capture(self, call: Callable[[], None]) -> Replay:
        """Call `call` once, then record it: what comes back runs it on the same memory."""


class CudaBackend:
    """All graphs share one pool: they run one after another and leave nothing behind in it."""

    def __init__(self, device: torch.device) -> None:
        self.nbytes = 0
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, call: Callable[[], None]) -> Replay:
        current = torch.cuda.current_stream(self._device)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        # Kernels are loaded and workspaces made before, which is not allowed while capturing.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            call()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            call()
        self.nbytes += max(0, free - torch.cuda.mem_get_info(self._device)[0])
        return graph.replay


class Bucket(NamedTuple):
    """The size of a graph's step: sequences, rows (tokens, and logits of all), a tree mask."""

    sequences: int
    rows: int
    tree: bool = False


def sizes(limit: int) -> list[int]:
    """1, 2, 4, multiples of 8 to 64, then steps of a quarter of the power of two; last `limit`."""
    found = [size for size in (1, 2, 4) if size < limit]
    size = 8
    while size < limit:
        found.append(size)
        size += max(8, (1 << size.bit_length()) // 8)
    return [*found, limit] if limit > 0 else []


class Buckets:
    """The sizes that steps are padded to: some numbers of sequences, and multiples of them in rows.

    groups: block tables that a step has. While few rows are computed, the weights that are read for
    them take the time, so padding costs little.
    """

    def __init__(self, layout: BatchLayout, groups: int) -> None:
        self.most_rows = min(MOST_ROWS, layout.max_tokens, layout.max_rows)
        tables = MOST_TABLE_BYTES // (4 * layout.max_blocks * groups)
        self.sequences = sizes(min(self.most_rows, layout.max_sequences, tables))

    def find(self, batch: Batch) -> Bucket | None:
        """The smallest that holds a step; None where it has a prompt, or is too large for a graph.

        Prompts come in too many sizes to capture them all.
        """
        sequences, rows = len(batch.seq_lens), len(batch.input_ids)
        decodes = rows == len(batch.logits_rows) and 0 < batch.max_query <= MOST_QUERY
        if not decodes or not self.sequences:
            return None
        if sequences > self.sequences[-1] or rows > self.most_rows:
            return None
        size = self.sequences[bisect_left(self.sequences, sequences)]
        times = next((times for times in TIMES if times * size >= rows), None)
        if times is None:
            return None
        return Bucket(size, min(times * size, self.most_rows), batch.tree_mask.shape[1] > 0)

    @property
    def largest(self) -> Bucket | None:
        """Of those at most so large; None where no step is for a graph."""
        return Bucket(self.sequences[-1], self.most_rows, True) if self.sequences else None


def packing(bucket: Bucket, layout: BatchLayout, names: list[str]) -> Packing:
    """How the inputs `names` of a bucket lie in one buffer."""
    b, t = bucket.sequences, bucket.rows
    shapes: list[tuple[int, ...]] = []
    dtypes: list[torch.dtype] = []
    for name in names:
        kind = name.rstrip("0123456789").removesuffix("_")
        small = kind in ("query_start", "seq_lens", "block_tables")
        shape: tuple[int, ...] = {
            "query_start": (b + 1,),
            "seq_lens": (b,),
            "block_tables": (b, layout.max_blocks),
            "tree_mask": (t, MOST_QUERY if bucket.tree else 0),
        }.get(kind, (t,))
        shapes.append(shape)
        dtypes.append(torch.bool if kind == "tree_mask" else torch.int32 if small else torch.int64)
    return Packing(tuple(shapes), tuple(dtypes))


def pad(arrays: Mapping[str, np.ndarray], inputs: Mapping[str, torch.Tensor], rows: int) -> None:
    """Write a step's inputs into the arrays of its bucket, and what makes the rest nobody's.

    inputs: on the host; one that lies on the device is missing here. rows: tokens of the step.
    """
    for name, target in arrays.items():
        if name.startswith("slot_mapping"):
            target.fill(-1)
        elif not name.startswith("block_tables"):
            # No table entry behind a sequence's own blocks is read: it stays what it is.
            target.fill({"query_start": rows, ROPE_INPUT: 1}.get(name, 0))
        value = inputs.get(name)
        if value is not None:
            target[tuple(slice(0, size) for size in value.shape)] = value.numpy()


def static_bytes(layout: BatchLayout, groups: int, row_bytes: int, sequences: int) -> int:
    """Device memory for graphs of up to so many sequences that decode: inputs and logits.

    row_bytes: of a row of logits. What the graphs compute in between comes on top.
    """
    buckets = Buckets(layout, groups)
    if buckets.largest is None:
        return 0
    at = bisect_left(buckets.sequences, min(sequences, buckets.sequences[-1]))
    logits = sum({_shared_rows(rows) for rows in buckets.sequences[: at + 1]})
    inputs = packing(buckets.largest, layout, batch_input_names(groups, False))
    return inputs.nbytes + logits * row_bytes


def _shared_rows(rows: int) -> int:
    """Rows of the place where graphs of so many rows leave what they give."""
    return max(16, 1 << (rows - 1).bit_length())


class _Graph:
    """One bucket's graph. batch: what it reads, views of `buffer`; replay: set once captured."""

    def __init__(
        self, packed: Packing, names: list[str], program: StepProgram, buffer: torch.Tensor
    ) -> None:
        self.replay: Replay | None = None
        self._names = names
        self._buffer = buffer[: packed.nbytes]
        self._inputs = dict(zip(names, packed.views(buffer), strict=True))
        self.batch = Batch.named(self._inputs, program.spec, MOST_QUERY)
        # In turns: one is written while the device may still have to fetch the other.
        self._copies = [HostCopy(packed, program.device) for _ in range(2)]

    def clear(self) -> None:
        """The inputs of a step of nobody's tokens, which leaves the caches as they are."""
        self._fill({}, 0)

    def fill(self, batch: Batch) -> None:
        """The inputs of `batch`; what lies on the device already is copied there."""
        inputs = dict(zip(self._names, batch.tensors(), strict=True))
        late = [name for name, tensor in inputs.items() if tensor.device.type != "cpu"]
        self._fill({n: t for n, t in inputs.items() if n not in late}, len(batch.input_ids))
        for name in late:
            self._inputs[name][: len(inputs[name])].copy_(inputs[name])

    def _fill(self, inputs: Mapping[str, torch.Tensor], rows: int) -> None:
        self._copies.reverse()
        arrays = dict(zip(self._names, self._copies[0].arrays(), strict=True))
        pad(arrays, inputs, rows)
        self._copies[0].send(self._buffer)


class GraphedProgram:
    """A step program that runs decode steps as graphs, and all others as they are.

    What a step gives holds until the next one. The caches of the first step are the only ones
    whose steps are graphs: their addresses are part of them.
    """

    def __init__(self, program: StepProgram, backend: GraphBackend) -> None:
        self.spec, self.layout = program.spec, program.layout
        self.vocab_size, self.device = program.vocab_size, program.device
        self.features = program.features
        self._program = program
        self._backend: GraphBackend = backend
        self._names = batch_input_names(len(self.spec.groups), self.spec.rope is not None)
        self._buckets = Buckets(self.layout, len(self.spec.groups))
        largest = self._buckets.largest
        nbytes = packing(largest, self.layout, self._names).nbytes if largest else 0
        self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._graphs: dict[tuple[Bucket, bool], _Graph] = {}
        self._shared: dict[tuple[int, int], torch.Tensor] = {}
        self._caches: list[torch.Tensor] | None = None
        self._failed = False

    @property
    def graphs(self) -> int:
        """How many were captured."""
        return len(self._graphs)

    @property
    def graph_bytes(self) -> int:
        """Device memory that graphs and their inputs take, as measured while capturing."""
        return self._buffer.nbytes + self._backend.nbytes

    def run(self, batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor:
        return self._run(batch, caches, False)[0]

    def run_with_features(
        self, batch: Batch, caches: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = self._run(batch, caches, True)
        return logits, features

    def _run(
        self, batch: Batch, caches: list[torch.Tensor], features: bool
    ) -> tuple[torch.Tensor, ...]:
        if self._caches is None:
            self._caches = caches
        bucket = self._buckets.find(batch) if caches is self._caches else None
        graph = self._graph(bucket, features) if bucket is not None else None
        if bucket is None or graph is None or graph.replay is None:
            return self._plain(batch, caches, features)
        graph.fill(batch)
        graph.replay()
        given = [len(batch.logits_rows)]
        if features and self.features is not None:
            given.append(given[0] if self.features.kind == "final" else len(batch.input_ids))
        shared = _shared_rows(bucket.rows)
        return tuple(self._shared[i, shared][:rows] for i, rows in enumerate(given))

    def _plain(
        self, batch: Batch, caches: list[torch.Tensor], features: bool
    ) -> tuple[torch.Tensor, ...]:
        if features:
            return self._program.run_with_features(batch, caches)
        return (self._program.run(batch, caches),)

    def _graph(self, bucket: Bucket, features: bool) -> _Graph | None:
        graph = self._graphs.get((bucket, features))
        if graph is not None or self._failed:
            return graph
        packed = packing(bucket, self.layout, self._names)
        graph = _Graph(packed, self._names, self._program, self._buffer)
        graph.clear()
        batch, caches = graph.batch, self._caches or []
        shared = _shared_rows(bucket.rows)

        def call() -> None:
            for index, found in enumerate(self._plain(batch, caches, features)):
                place = self._shared.get((index, shared))
                if place is None:  # in the call before the capture
                    place = self._shared[index, shared] = found.new_empty(shared, *found.shape[1:])
                place[: len(found)].copy_(found)

        try:
            graph.replay = self._backend.capture(call)
        except RuntimeError as error:
            line = str(error).strip().split("\n")[0]
            warnings.warn(f"steps run on without new CUDA graphs: {line}", stacklevel=2)
            self._failed = True
            return None
        self._graphs[bucket, features] = graph
        return graph


def with_graphs(program: StepProgram) -> StepProgram:
    """`program` with decode steps as graphs, where it runs on CUDA."""
    if program.device.type != "cuda":
        return program
    return GraphedProgram(program, CudaBackend(program.device))
