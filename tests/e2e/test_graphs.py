"""A compiled artifact in several packages, padded as graphs are, and run ahead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.graphs import Calls

from smelt.runtime.artifact import Program, open_artifact
from smelt.runtime.batch_builder import BatchBuilder
from smelt.runtime.blocks import PagedMemory
from smelt.runtime.cuda_graphs import GraphedProgram
from smelt.runtime.engine import Engine
from smelt.runtime.sampling_params import SamplingParams
from smelt.runtime.sequence import Chunk, Sequence

PROMPTS = [[5, 9, 300, 2], [7], list(range(20, 61)), [8, 8, 8], [11, 4]]


@pytest.fixture(scope="module")
def three(fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The demo model, its package three times over, each for other steps."""
    folder = tmp_path_factory.mktemp("three") / "demo"
    shutil.copytree(fp32, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["steps"] = []
    for name, tokens, query in (("few", 16, 16), ("some", 64, 16), ("step", 0, 0)):
        file = f"graphs/{name}.pt2"
        if name != "step":
            shutil.copyfile(folder / "graphs" / "step.pt2", folder / file)
            manifest["files"][file] = manifest["files"]["graphs/step.pt2"]
        manifest["steps"].append({"file": file, "max_tokens": tokens, "max_query": query})
    path.write_text(json.dumps(manifest))
    return open_artifact(folder).program


def answers(program: Program | GraphedProgram, **options: bool) -> list[list[int]]:
    engine = Engine(program, blocks=60, **options)
    params = [SamplingParams(max_tokens=12, temperature=i % 2, seed=i) for i in range(5)]
    ids = [engine.add_request(p, each) for p, each in zip(PROMPTS, params, strict=True)]
    found: dict[int, list[int]] = {i: [] for i in ids}
    while engine.has_work:
        for output in engine.step():
            found[output.id] += output.token_ids
    engine.check_integrity()
    return [found[i] for i in ids]


def test_packages_share_the_weights_and_give_one_answer(three: Program, fp32: Path) -> None:
    plain = answers(open_artifact(fp32).program)
    assert answers(three) == plain
    backend = Calls()
    assert answers(GraphedProgram(three, backend), run_ahead=True) == plain
    assert backend.replays > 8
    # One copy: what is changed is changed for all of them.
    few, some, step = (three._steps.choose(n, 1) for n in (1, 20, 100))
    assert len({id(few), id(some), id(step)}) == 3
    pointers = [{w.data_ptr() for w in each._weights.values()} for each in (few, some, step)]  # type: ignore[attr-defined]
    assert pointers[0] == pointers[1] == pointers[2]


@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [4, 1, 2], [9, 16], [1] * 5])
def test_a_padded_step_of_the_model_equals_the_step(three: Program, counts: list[int]) -> None:
    lengths = [10, 3, 40, 17, 5][: len(counts)]
    memory = PagedMemory(60, three.spec.block_size, [g.window for g in three.spec.groups])
    builder = BatchBuilder(three.spec, three.layout, 5)
    caches = three.spec.allocate(60)
    chunks = []
    for lane, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        sequence = Sequence(lane, [(lane + 7 * i) % 400 for i in range(60)], SamplingParams(), 60)
        sequence.tables, sequence.lane = memory.new_tables(), lane
        assert memory.grow(sequence.tables, 0, 60) is not None
        three.run(builder.build([Chunk(sequence, 0, length, 1)]), caches)
        chunks.append(Chunk(sequence, length, count, count))
    batch = builder.build(chunks)
    other = [cache.clone() for cache in caches]
    wanted = three.run(batch, caches)
    found = GraphedProgram(three, Calls()).run(batch, other)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(other, caches, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        assert torch.equal(mine == 0, theirs == 0)
