"""Log probabilities are those of a float32 log-softmax of the model's logits."""

from __future__ import annotations

import math

import pytest
import torch

from smelt.runtime import logprobs as module
from smelt.runtime.logprobs import top_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 1, 5, 99])
def test_values_equal_log_softmax(dtype: torch.dtype, k: int) -> None:
    logits = (torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    tokens = [3, 49, int(logits[2].argmax()), int(logits[3].argmin())]
    expected = logits.float().log_softmax(-1)
    found = top_logprobs(logits, tokens, k)
    for row, (token, got) in enumerate(zip(tokens, found, strict=True)):
        assert got.token == token
        assert got.logprob == expected[row, token].item()
        assert got.rank == 1 + sum(v > expected[row, token] for v in expected[row])
        assert len(got.top) == min(k, 50)
        assert [v for _, v in got.top] == sorted(expected[row].tolist(), reverse=True)[:k]
        assert all(expected[row, t].item() == v for t, v in got.top)
    assert found[2].rank == 1
    if dtype == torch.float32:
        assert found[3].rank == 50


def test_ties_share_the_better_rank() -> None:
    found = top_logprobs(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), [2], 2)
    assert found[0].rank == 1
    assert found[0].logprob == pytest.approx(2 - math.log(math.e + 2 * math.e**2 + 1))


def test_a_long_prompt_is_normalised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(10, 7)
    tokens = [i % 7 for i in range(10)]
    whole = top_logprobs(logits, tokens, 3)
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 21)
    assert top_logprobs(logits, tokens, 3) == whole
    assert top_logprobs(logits[:0], [], 3) == []
