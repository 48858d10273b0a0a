"""Which package runs a step, and that all of them share the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.manifests import sample_manifest

from smelt.runtime import specialised
from smelt.runtime.artifact import Program
from smelt.runtime.batch import Batch, no_tree
from smelt.runtime.batch_builder import BatchBuilder
from smelt.runtime.blocks import PagedMemory
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.sequence import Chunk, Sequence
from smelt.runtime.specialised import Bounds, Specialised, open_steps

STEPS = [
    {"file": "graphs/few.pt2", "max_tokens": 16, "max_query": 16},
    {"file": "graphs/some.pt2", "max_tokens": 64, "max_query": 16},
    {"file": "graphs/step.pt2", "max_tokens": 0, "max_query": 0},
]
FILES = {entry["file"]: {"bytes": 1, "sha256": ""} for entry in STEPS}


class Named:
    """A step whose logits say who gave them."""

    def __init__(self, number: int) -> None:
        self.number = number

    def run(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.tensor([self.number, len(inputs)])

    def outputs(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.run(inputs), torch.tensor([-self.number])]


def choose(steps: list[tuple[int, int]], tokens: int, max_query: int) -> int:
    pairs = [(Bounds(*bounds), Named(i)) for i, bounds in enumerate(steps)]
    found = Specialised(pairs).choose(tokens, max_query)
    assert isinstance(found, Named)
    return found.number


@pytest.mark.parametrize(
    ("tokens", "max_query", "number"),
    [
        *((1, 1, 0), (16, 16, 0), (16, 1, 0), (17, 1, 1), (64, 16, 1), (65, 1, 2)),
        *((16, 17, 2), (17, 17, 2), (500, 500, 2), (1, 0, 2), (64, 0, 2)),
    ],
)
def test_the_first_package_whose_bounds_hold(tokens: int, max_query: int, number: int) -> None:
    assert choose([(16, 16), (64, 16), (0, 0)], tokens, max_query) == number


def test_a_bound_of_zero_holds_anything() -> None:
    assert choose([(0, 4), (0, 0)], 10**6, 4) == 0
    assert choose([(0, 4), (0, 0)], 1, 5) == 1
    assert choose([(8, 0), (0, 0)], 8, 10**6) == 0
    assert choose([(8, 0), (0, 0)], 8, 0) == 0
    assert choose([(0, 0)], 10**6, 0) == 0


def test_a_program_runs_the_package_of_its_step() -> None:
    steps = [(Bounds(e["max_tokens"], e["max_query"]), Named(i)) for i, e in enumerate(STEPS)]
    program = Program(sample_manifest(), Specialised(steps))
    long, small = torch.int64, torch.int32
    for tokens, max_query, number in ((4, 4, 0), (40, 2, 1), (40, 40, 2), (4, 0, 2)):
        row = torch.zeros(tokens, dtype=long)
        batch = Batch(
            *(row, row, torch.tensor([0, tokens], dtype=small), torch.zeros(1, dtype=small)),
            *([row, row], [torch.zeros(1, 1, dtype=small)] * 2, row[:1], no_tree(tokens)),
            max_query=max_query,
        )
        assert program.run(batch, [row] * 3).tolist() == [number, len(batch.tensors()) + 3]
        assert program.run_with_features(batch, [row] * 3)[1].tolist() == [-number]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_packages_are_opened_over_one_set_of_weights(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    opened: list[tuple[Any, ...]] = []

    class Opened(Named):
        def __init__(self, path: Path, weights: Any, single_threaded: bool) -> None:
            opened.append((path, weights, single_threaded))
            super().__init__(len(opened))

    monkeypatch.setattr("smelt.runtime.package.Package", Opened)
    constants = {"w": torch.zeros(2)}
    for steps in (STEPS, []):
        opened.clear()
        found = sample_manifest(steps=steps, files=FILES)
        found.target["device"] = device
        made = open_steps(Path("/x"), found, constants)
        names = [e["file"] for e in steps] or ["graphs/step.pt2"]
        assert [path for path, *_ in opened] == [Path("/x") / name for name in names]
        assert all(w is constants for _, w, _ in opened)
        # A graph cannot be captured of a package that looks after its threads.
        assert all(single == (device == "cuda") for *_, single in opened)
        assert made.choose(1000, 1000).number == len(names)  # type: ignore[attr-defined]
    assert specialised.Bounds() == Bounds(0, 0)


def sequences(*counts: int) -> list[Chunk]:
    memory = PagedMemory(40, 16, [0, 8])
    chunks = []
    for lane, count in enumerate(counts):
        sequence = Sequence(lane, list(range(count + 2)), SamplingParams(), 60)
        sequence.tables, sequence.lane = memory.new_tables(), lane
        assert memory.grow(sequence.tables, 0, 40) is not None
        chunks.append(Chunk(sequence, 0, count, 1))
    return chunks


def test_a_batch_knows_how_many_tokens_a_sequence_brings() -> None:
    loaded = sample_manifest()
    builder = BatchBuilder(loaded.cache, loaded.layout, 4)
    assert builder.build(sequences(1, 1, 1)).max_query == 1
    assert builder.build(sequences(2, 7, 1)).max_query == 7
    # Padded steps all run in the same package, whatever is in them.
    padded = BatchBuilder(loaded.cache, loaded.layout, 4, 32)
    for counts in ((1, 1), (9, 2), (20,)):
        assert padded.build(sequences(*counts)).max_query == 32


def test_it_is_read_from_tensors_where_nobody_says_it() -> None:
    spec = sample_manifest().cache
    builder = BatchBuilder(spec, sample_manifest().layout, 4)
    built = builder.build(sequences(2, 7, 1))
    values = {
        "input_ids": built.input_ids,
        "position_ids": built.position_ids,
        "query_start": built.query_start,
        "seq_lens": built.seq_lens,
        "logits_rows": built.logits_rows,
        "tree_mask": built.tree_mask,
        **{f"slot_mapping_{g}": t for g, t in enumerate(built.slot_mapping)},
        **{f"block_tables_{g}": t for g, t in enumerate(built.block_tables)},
    }
    assert Batch.named(values, spec).max_query == 7
    assert Batch.named(values, spec, 9).max_query == 9
    assert len(Batch.named(values, spec).tensors()) == len(values)  # it is no input
