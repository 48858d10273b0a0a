"""Compiled logits equal eager transformers' for each family, by AOTInductor and our kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import FAMILIES

import smelt
from smelt.compiler.api import Artifact
from smelt.compiler.trace import PackedForward, _small_model
from smelt.runtime.batch import Batch, no_tree

# Together these cover two window groups, learned positions with Conv1D, and experts.
QUICK = ("gemma3_text", "gpt2", "qwen3_moe")
FAMILY = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES
]


def batch(chunks: list[tuple[list[int], int, list[int]]], groups: int, width: int) -> Batch:
    """chunks: (token ids, tokens cached before, block table) of each sequence, packed."""
    ids, positions, slots, starts, lengths = [], [], [], [0], []
    for tokens, before, table in chunks:
        ids += tokens
        span = range(before, before + len(tokens))
        positions += span
        slots += [table[p // 16] * 16 + p % 16 for p in span]
        starts.append(len(ids))
        lengths.append(before + len(tokens))
    tables = [table + [0] * (width - len(table)) for _, _, table in chunks]
    return Batch(
        torch.tensor(ids),
        torch.tensor(positions),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        [torch.tensor(slots)] * groups,
        [torch.tensor(tables, dtype=torch.int32)] * groups,
        torch.arange(len(ids)),
        no_tree(len(ids)),
    )


@pytest.mark.parametrize("family", FAMILY)
def test_compiled_logits_equal_eager(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from smelt.runtime.artifact import open_artifact

    small, model, _, _ = _small_model(AutoConfig.for_model(family), False)
    artifact = smelt.compile(model, tmp_path / "out")
    assert isinstance(artifact, Artifact)
    program = open_artifact(artifact.folder).program
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, small.vocab_size, (29,), generator=generator)
    two = torch.randint(0, small.vocab_size, (21,), generator=generator)
    with torch.no_grad():
        eager_one = PackedForward(model)(one, torch.arange(29))
        eager_two = PackedForward(model)(two, torch.arange(21))
    groups = len(program.spec.groups)

    def run(caches: list[Any], *chunks: tuple[torch.Tensor, int, list[int]]) -> torch.Tensor:
        listed = [(ids.tolist(), before, table) for ids, before, table in chunks]
        return program.run(batch(listed, groups, 2), caches).float()

    def fresh() -> list[torch.Tensor]:
        return program.spec.allocate(6)

    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(run(fresh(), (one, 0, [3, 1])), eager_one, **close)
    caches = fresh()
    steps = [run(caches, (one[i : i + 1], i, [3, 1])) for i in range(29)]
    torch.testing.assert_close(torch.cat(steps), eager_one, **close)
    caches = fresh()
    parts = [run(caches, (one[a:b], a, [5, 2])) for a, b in ((0, 7), (7, 18), (18, 29))]
    torch.testing.assert_close(torch.cat(parts), eager_one, **close)
    caches = fresh()
    first = run(caches, (one[:20], 0, [4, 0]), (two[:5], 0, [2, 5]))
    second = run(caches, (one[20:], 20, [4, 0]), (two[5:], 5, [2, 5]))
    got_one, got_two = torch.cat([first[:20], second[:9]]), torch.cat([first[20:], second[9:]])
    torch.testing.assert_close(got_one, eager_one, **close)
    torch.testing.assert_close(got_two, eager_two, **close)
