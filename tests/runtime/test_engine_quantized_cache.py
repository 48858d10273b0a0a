"""The engine over a quantized cache: prefixes, chunks and preemption give the oracle's tokens."""

from __future__ import annotations

import pytest
import torch
from helpers.fake_step import FakeStep, one_thread  # noqa: F401  (autouse fixture)

from smelt.runtime.engine import Engine
from smelt.runtime.kv_cache import cache_blocks
from smelt.runtime.ops.cache_format import QUANTIZED
from smelt.runtime.sampling_params import SamplingParams

from .test_engine import prompts, run

FORMATS = tuple(QUANTIZED)


@pytest.mark.parametrize("name", FORMATS)
def test_a_chat_prefills_only_new_tokens(name: str) -> None:
    step = FakeStep(windows=(0,), max_tokens=64, format=name)
    engine = Engine(step, blocks=64)
    history = list(range(20))
    for turn in range(3):
        expected = step.greedy(history, 6)
        request = engine.add_request(history, SamplingParams(max_tokens=6))
        assert run(engine)[request] == (expected, "length")
        history = [*history, *expected, 50 + turn, 60, 70]
    # What a turn leaves in the cache, all but its last sampled token, is not computed again.
    assert engine.metrics.reused_tokens == 25 + 34
    assert engine.metrics.prefilled_tokens == 20 + 4 + 4


@pytest.mark.parametrize("name", FORMATS)
def test_chunks_and_too_few_blocks_change_no_token(name: str) -> None:
    step = FakeStep(format=name)
    wanted = prompts(6, 20, seed=1)
    expected = [step.greedy(prompt, 8) for prompt in wanted]
    engine = Engine(step, blocks=10)
    ids = [engine.add_request(prompt, SamplingParams(max_tokens=8)) for prompt in wanted]
    found = run(engine)
    assert engine.metrics.preemptions > 0
    assert [found[i][0] for i in ids] == expected


@pytest.mark.parametrize("name", FORMATS)
def test_the_memory_is_what_was_planned(name: str) -> None:
    step = FakeStep(format=name)
    engine = Engine(step, blocks=9)
    planned = 9 * step.spec.block_size * step.spec.bytes_per_token()
    assert sum(cache.nbytes for cache in engine.caches) == planned
    assert all(cache.dtype == torch.uint8 for cache in engine.caches)


def test_the_same_memory_holds_more_tokens() -> None:
    fraction = 1e-6
    device = torch.device("cpu")
    blocks = {
        name: cache_blocks(step.spec, step.layout, device, fraction=fraction)
        for name in ("auto", *FORMATS)
        if (step := FakeStep(format=name, max_position=2**20))
    }
    assert blocks["auto"] < blocks["int8"] < blocks["fp8"] < blocks["int4"]
